"""The display of a run in training: a live panel on a terminal, aligned lines in a log.

Both show the lines that metrics.jsonl receives. There is no thread and no timer: `show` and `tick`
redraw the panel a few times a second, so that all cores are left to the training.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from glasslm.runs.history import sample_note
from glasslm.runs.metrics import EvalLine, Line, SampleLine
from glasslm.text import (
    escape_control_chars,
    format_duration,
    format_number,
    quote_path,
    to_one_line,
)
from glasslm.training.dashboard import View, build_panel

if TYPE_CHECKING:
    from rich.live import Live

REDRAW_S = 0.2
MAX_COLUMNS, MAX_ROWS = 100, 32  # of the panel
MIN_PRINT_S, PRINT_SHARE = 1.0, 0.01  # seconds between printed steps; share of the time so far


class Display:
    """A context manager that shows a run on `stream` (default: standard error).

    It is live (default: where the stream is a terminal) or prints lines. Where the stream is closed
    (a closed terminal, `| head`), the display stops and the run continues.
    """

    def __init__(
        self,
        max_steps: int | None = None,
        title: str = "",
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        # Python has None for a stream that was closed before the start.
        self._is_closed = stream is None or stream.closed
        self.stream = io.StringIO() if stream is None or stream.closed else stream
        self.view = View(title=escape_control_chars(title), max_steps=max_steps)
        is_live = can_draw(self.stream) if live is None else live
        self._live: Live | None = _make_live(self.stream) if is_live else None
        self._drawn_at = self._printed_at = -math.inf
        self._started_at = time.monotonic()

    def __enter__(self) -> Display:
        if self._live is not None:
            with self._stop_when_closed():
                self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            with self._stop_when_closed():
                self._draw(self._live)
        if self._live is not None:
            with self._stop_when_closed():
                self._live.stop()

    def show_earlier(self, lines: Iterable[Line]) -> None:
        """Let the curves begin with the lines of earlier parts of the run."""
        for line in lines:
            self.view.update(line)

    def show(self, line: Line) -> None:
        """Show a line of metrics.jsonl."""
        self.view.update(line)
        if not self._is_closed:
            with self._stop_when_closed():
                self._show(line)

    def note(self, message: str) -> None:
        """Show a message that is no line of metrics.jsonl, above the panel or as a line."""
        if self._is_closed:
            return
        with self._stop_when_closed():
            if self._live is None:
                print(message, file=self.stream, flush=True)
            else:
                from rich.text import Text

                self._live.console.print(Text(message))

    def tick(self, step: int) -> None:
        """Note that a step is done, and redraw the panel when it is due."""
        self.view.step = step
        if self._live is not None and self._is_redraw_due():
            with self._stop_when_closed():
                self._draw(self._live)

    @contextmanager
    def _stop_when_closed(self) -> Iterator[None]:
        """Stop the display where writing to its stream in the block fails."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: the program itself has closed the stream
            live, self._live, self._is_closed = self._live, None, True
            if live is not None:
                with suppress(OSError, ValueError):
                    live.stop()  # restores the standard streams

    def _show(self, line: Line) -> None:
        if self._live is None:
            self._print(line)
            return
        if line["kind"] == "warning":
            from rich.text import Text

            self._live.console.print(Text(f"{format_line(line, None)}", style="yellow"))
        if line["kind"] != "step" or self._is_redraw_due():
            self._draw(self._live)

    def _is_redraw_due(self) -> bool:
        return time.monotonic() - self._drawn_at >= REDRAW_S

    def _draw(self, live: Live) -> None:
        width, height = live.console.size
        panel = build_panel(self.view, min(width, MAX_COLUMNS), min(height - 1, MAX_ROWS))
        live.update(panel, refresh=True)
        self._drawn_at = time.monotonic()

    def _print(self, line: Line) -> None:
        if line["kind"] == "step":
            # At growing distances, so that logs of long runs stay short.
            now = time.monotonic()
            if now - self._printed_at < max(MIN_PRINT_S, PRINT_SHARE * (now - self._started_at)):
                return
            self._printed_at = now
        print(format_line(line, self.view.max_steps), file=self.stream, flush=True)


def can_draw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can draw the panel: with a cursor and Unicode."""
    has_unicode = (getattr(stream, "encoding", None) or "").lower().startswith("utf")
    return stream.isatty() and has_unicode and os.environ.get("TERM") not in ("dumb", "unknown")


def _make_live(stream: TextIO) -> Live:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    return Live(
        console=console, auto_refresh=False, redirect_stdout=False, vertical_overflow="crop"
    )


# -- lines of a log --------------------------------------------------------------------------------


def format_line(line: Line, max_steps: int | None) -> str:
    """A metrics line as one line of text without colours and control characters.

    >>> format_line({"kind": "eval", "step": 100, "loss": 2.0, "bpb": 2.885, "best": True}, 1000)
    'eval         100/1000  val loss 2.0000  perplexity -  bits/byte 2.885  best'
    """
    kind = line["kind"]
    total = f"/{max_steps}" if max_steps else ""
    return f"{kind:<10} {line.get('step', 0):>5}{total}  {'  '.join(_line_parts(line))}".rstrip()


def _line_parts(line: Line) -> list[str]:
    if line["kind"] == "step":
        timing = line.get("timing", {})
        parts = [
            f"loss {format_number(line.get('loss'), '.4f')}",
            f"lr {format_number(line.get('lr'), '.2e')}",
            f"norm {format_number(line.get('grad_norm'), '6.3f')}",
            f"{format_number(timing.get('tokens_per_s'), '9,.0f')} tok/s",
        ]
        parts[1:1] = measure_parts(line.get("preference", {}))
        if timing.get("remaining_s") is not None:
            parts.append(f"{format_duration(timing['remaining_s'])} left")
        return parts
    if line["kind"] == "eval" and "preference" in line:
        parts = [f"held-out loss {format_number(line.get('loss'), '.4f')}"]
        parts += measure_parts(line["preference"])
        return parts + (["best"] if line.get("best") else [])
    if line["kind"] == "eval":
        parts = [
            f"{line.get('split', 'val')} loss {format_number(line.get('loss'), '.4f')}",
            f"perplexity {format_number(line.get('perplexity'), '.2f')}",
            f"bits/byte {format_number(line.get('bpb'), '.3f')}",
        ]
        if (accuracy := line.get("accuracy")) is not None:
            parts.append(f"right {accuracy['share']:.1%}")
        if line.get("whole") is False:
            parts.append(f"on {line.get('tokens', 0):,} tokens ({sample_note(line)})")
        return parts + (["best"] if line.get("best") else [])
    if line["kind"] == "sample":
        return [to_one_line(f"{line.get('prompt', '')}{line.get('text', '')}")]
    if line["kind"] == "checkpoint":
        return [to_one_line(str(line.get("path", ""))), *(["best"] if line.get("best") else [])]
    if line["kind"] == "warning":
        return [to_one_line(f"{line.get('code', '')}: {line.get('message', '')}")]
    if line["kind"] == "resume":
        return [to_one_line(f"from {line.get('from', '')}")]
    if line["kind"] == "end":
        parts = [to_one_line(str(line.get("status", "")))]
        if line.get("best_step") is not None:
            best_loss = format_number(line.get("best_loss"), ".4f")
            parts.append(f"best loss {best_loss} at step {line['best_step']}")
        return parts
    return []


def measure_parts(measures: Mapping[str, float | None]) -> list[str]:
    """The measures of preference tuning that a line has room for.

    >>> measure_parts({"reward": 0.5, "kl": 0.01, "entropy": 0.7, "length": 3.0})
    ['reward 0.500', 'kl 0.010', 'entropy 0.700']
    """
    return [
        f"{name} {format_number(measures[name], '.3f')}"
        for name in ("reward", "accuracy", "margin", "kl", "entropy", "distinct")
        if name in measures
    ]


# -- summary ---------------------------------------------------------------------------------------


def summary_text(
    run_dir: Path | str,
    status: str,
    best: EvalLine | None = None,
    sample: SampleLine | None = None,
    report: Path | str | None = None,
    elapsed_s: float | None = None,
    ops: str = "",
    is_chat: bool = False,
) -> str:
    """The result of a run and the commands to try next, printed after it ended.

    `best` is the eval line with the lowest validation loss, `sample` the last sample line, `ops`
    the file of operations that these commands need. `is_chat`: the run learned conversations.
    """
    run, ops = quote_path(run_dir), f" --ops {quote_path(ops)}" if ops else ""
    lines = [status if elapsed_s is None else f"{status} after {format_duration(elapsed_s)}"]
    if best is not None:
        loss = format_number(best.get("loss"), ".4f")
        tokens = "the answers of the whole split" if is_chat else "the whole split"
        if note := sample_note(best):
            tokens = f"{best.get('tokens', 0):,} tokens ({note})"
        perplexity = format_number(best.get("perplexity"), ".2f")
        bpb = format_number(best.get("bpb"), ".3f")
        lines += [
            f"best validation loss {loss} on {tokens}, at step {best.get('step', 0):,}",
            f"perplexity {perplexity}, {bpb} bits per byte",
        ]
        if measures := best.get("preference"):
            lines[-2:] = [
                f"best held-out loss {loss} at step {best.get('step', 0):,}: "
                + ", ".join(measure_parts(measures))
            ]
        if (accuracy := best.get("accuracy")) is not None:
            lines += [
                f"answers that are exactly right: {accuracy['share']:.1%} of {accuracy['of']:,} "
                f"held-out examples (95%: {accuracy['ci_low']:.1%} to {accuracy['ci_high']:.1%})"
            ]
    if sample:
        text = escape_control_chars(f"{sample.get('prompt', '')}{sample.get('text', '')}")
        lines += [f"sample at step {sample.get('step', 0):,}:", ""]
        lines += [f"    {row}" for row in text.strip("\n").split("\n")]
        lines += [""]
    lines += [f"report: {report}"] if report is not None else []
    if status == "diverged":
        lines += ["Train again with a lower --lr or a longer --warmup-steps."]
    lines += ["try next:"]
    lines += [f"  glasslm resume {run}{ops}"] if status in ("interrupted", "failed") else []
    talk = f"  glasslm chat {run}{ops}" if is_chat else f"  glasslm generate {run}{ops}"
    lines += [talk, f"  glasslm evaluate {run}{ops} --text-file FILE"]
    return escape_control_chars("\n".join(lines))
