"""What a person sees while a model trains: a live panel on a terminal, plain aligned lines in a log.

Both are fed the very lines that metrics.jsonl receives. Nothing here has a thread or a timer of its own: the panel is
redrawn inside `show` and `tick`, a few times a second, so that the cores stay with the training.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from glasslm.runs.metrics import EvalLine, Line, SampleLine
from glasslm.text import duration, harmless, number, one_line, quoted, size
from glasslm.training.dashboard import View, panel

if TYPE_CHECKING:
    from rich.live import Live

REDRAW_S = 0.2
WIDEST = 100  # columns; a longer line of text is no pleasure to read
TALLEST = 32  # rows


class Display:
    """A context manager that shows a run on `stream` (standard error), live where that is a terminal.

    `past` are lines of an earlier part of the run: they are drawn in the curves and not printed again. When nobody
    reads the stream any more (a closed terminal, `| head`), the display falls silent and the run goes on.
    """

    def __init__(
        self,
        max_steps: int | None = None,
        title: str = "",
        past: Iterable[Line] = (),
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.view = View(title=harmless(title), max_steps=max_steps)
        for line in past:
            self.view.take(line)
        self._live: Live | None = (
            _live(self.stream) if (can_draw(self.stream) if live is None else live) else None
        )
        self._silent = False
        self._drawn_at = self._printed_at = -math.inf
        self._began = time.monotonic()

    def __enter__(self) -> Display:
        if self._live is not None:
            with self._while_read():
                self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            with self._while_read():
                self._draw(self._live)
        if self._live is not None:
            with self._while_read():
                self._live.stop()

    def show(self, line: Line) -> None:
        """Take in one line of metrics.jsonl."""
        self.view.take(line)
        if not self._silent:
            with self._while_read():
                self._show(line)

    def tick(self, step: int) -> None:
        """A step is done; costs next to nothing unless it is time to redraw."""
        self.view.step = step
        if self._live is not None and self._due():
            with self._while_read():
                self._draw(self._live)

    @contextmanager
    def _while_read(self) -> Iterator[None]:
        """Around whatever writes to the stream."""
        try:
            yield
        except OSError:
            live, self._live, self._silent = self._live, None, True
            if live is not None:
                with suppress(OSError):
                    live.stop()  # gives the standard streams back

    def _show(self, line: Line) -> None:
        if self._live is None:
            self._print(line)
            return
        if line["kind"] == "warning":
            from rich.text import Text

            self._live.console.print(Text(f"{plain(line, None)}", style="yellow"))
        if line["kind"] != "step" or self._due():
            self._draw(self._live)

    def _due(self) -> bool:
        return time.monotonic() - self._drawn_at >= REDRAW_S

    def _draw(self, live: Live) -> None:
        width, height = live.console.size
        live.update(panel(self.view, min(width, WIDEST), min(height - 1, TALLEST)), refresh=True)
        self._drawn_at = time.monotonic()

    def _print(self, line: Line) -> None:
        if line["kind"] == "step":
            # A second apart, later 1% of the time gone, so that logs stay short
            now = time.monotonic()
            if now - self._printed_at < max(1.0, (now - self._began) / 100):
                return
            self._printed_at = now
        print(plain(line, self.view.max_steps), file=self.stream, flush=True)


def can_draw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can move its cursor and show the characters of the panel."""
    unicode = (getattr(stream, "encoding", None) or "").lower().startswith("utf")
    return stream.isatty() and unicode and os.environ.get("TERM") not in ("dumb", "unknown")


def _live(stream: TextIO) -> Live:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    return Live(
        console=console, auto_refresh=False, redirect_stdout=False, vertical_overflow="crop"
    )


# Plain lines


def plain(line: Line, max_steps: int | None) -> str:
    """One metrics line as one line of text: first its kind, no colours, nothing that moves a cursor.

    >>> plain({"kind": "eval", "step": 100, "loss": 2.0, "perplexity": 7.389, "bpb": 2.885, "best": True}, 1000)
    'eval         100/1000  val loss 2.0000  perplexity 7.39  bits/byte 2.885  best'
    """
    kind = line["kind"]
    total = f"/{max_steps}" if max_steps else ""
    return f"{kind:<10} {line.get('step', 0):>5}{total}  {'  '.join(_words(line))}".rstrip()


def _words(line: Line) -> list[str]:
    if line["kind"] == "step":
        timing = line.get("timing", {})
        words = [f"loss {number(line.get('loss'), '.4f')}", f"lr {number(line.get('lr'), '.2e')}"]
        words += [
            f"norm {number(line.get('grad_norm'), '6.3f')}",
            f"{number(timing.get('tokens_per_s'), '9,.0f')} tok/s",
        ]
        words += (
            [f"{duration(timing['remaining_s'])} left"]
            if timing.get("remaining_s") is not None
            else []
        )
        return words
    if line["kind"] == "eval":
        name = f"{line.get('split', 'val')} loss"
        words = [
            f"{name} {number(line.get('loss'), '.4f')}",
            f"perplexity {number(line.get('perplexity'), '.2f')}",
        ]
        words += [f"bits/byte {number(line.get('bpb'), '.3f')}"]
        words += [f"on {line.get('tokens', 0):,} tokens"] if line.get("whole") is False else []
        return words + (["best"] if line.get("best") else [])
    if line["kind"] == "sample":
        return [one_line(f"{line.get('prompt', '')}{line.get('text', '')}")]
    if line["kind"] == "checkpoint":
        return [one_line(str(line.get("path", ""))), *(["best"] if line.get("best") else [])]
    if line["kind"] == "warning":
        return [one_line(f"{line.get('code', '')}: {line.get('message', '')}")]
    if line["kind"] == "resume":
        return [one_line(f"from {line.get('from', '')}")]
    if line["kind"] == "end":
        words = [one_line(str(line.get("status", "")))]
        if line.get("best_step") is not None:
            words += [
                f"best val loss {number(line.get('best_loss'), '.4f')} at step {line['best_step']}"
            ]
        return words
    return []


# What is printed first and last


def plan_text(plan: Mapping[str, Any]) -> str:
    """What is about to happen, in a few aligned lines; every entry of `plan` is optional.

    Entries: preset, corpus, parameters {total, non_embedding}, vocab_size, train_tokens, val_tokens, batch_tokens,
    max_steps, total_tokens, epochs, flops, memory_bytes, seconds, engine, device, precision, threads, processes,
    run_dir, why (a list of notes).
    """
    parameters = plan.get("parameters", {})
    rows = [
        ("model", _some(plan, "{vocab_size:,} symbols", start=_parameters(parameters))),
        ("data", _some(plan, "{train_tokens:,} tokens to learn from", "{val_tokens:,} to validate on")),
        ("training", _some(plan, "{max_steps:,} steps of {batch_tokens:,} tokens", "{total_tokens:,} in all",
                           "{epochs:.3g} epochs")),
        ("expected", ", ".join(_expected(plan))),
        ("computes", _some(plan, "{flops:.2g} FLOPs", "{engine} engine", "{device}", "{precision}", "{threads} threads",
                           "{processes} processes")),
        ("run", str(plan.get("run_dir", ""))),
    ]  # fmt: skip
    title = " on ".join(str(plan[key]) for key in ("preset", "corpus") if plan.get(key))
    rows += [("note", str(note)) for note in plan.get("why", [])]
    return harmless(
        "\n".join(
            [f"glasslm  {title}".rstrip(), *(f"  {head:<10}{text}" for head, text in rows if text)]
        )
    )


def _parameters(parameters: Mapping[str, Any]) -> list[str]:
    words = [f"{parameters['total']:,} parameters"] if "total" in parameters else []
    if words and "non_embedding" in parameters:
        words[0] += f" ({parameters['non_embedding']:,} besides embeddings)"
    for which, meaning in (("active", "compute each token"), ("trained", "are trained")):
        if parameters.get(which, parameters.get("total")) != parameters.get("total"):
            words.append(f"{parameters[which]:,} of them {meaning}")
    return words


def _expected(plan: Mapping[str, Any]) -> list[str]:
    words = [f"about {duration(plan['seconds'])}"] if plan.get("seconds") is not None else []
    return words + (
        [f"{size(plan['memory_bytes'])} of memory"] if plan.get("memory_bytes") is not None else []
    )


def _some(plan: Mapping[str, Any], *templates: str, start: Sequence[str] = ()) -> str:
    """Those of the templates whose names `plan` has, filled in."""
    names = {template: re.findall(r"\{(\w+)", template) for template in templates}
    return ", ".join(
        [
            *start,
            *(
                t.format(**plan)
                for t in templates
                if all(plan.get(n) is not None for n in names[t])
            ),
        ]
    )


def summary_text(
    run_dir: Path | str,
    status: str,
    best: EvalLine | None = None,
    sample: SampleLine | None = None,
    report: Path | str | None = None,
    elapsed_s: float | None = None,
) -> str:
    """What came of it and what to try next.

    `best` is the eval line with the lowest validation loss, `sample` the last sample line.
    """
    run = quoted(run_dir)
    lines = [status if elapsed_s is None else f"{status} after {duration(elapsed_s)}"]
    if best is not None:
        whole = (
            "on the whole split" if best.get("whole") else f"on {best.get('tokens', 0):,} tokens"
        )
        lines += [
            f"best validation loss {number(best.get('loss'), '.4f')} {whole}, at step {best.get('step', 0):,}",
            f"perplexity {number(best.get('perplexity'), '.2f')}, {number(best.get('bpb'), '.3f')} bits per byte",
        ]
    if sample:
        rows = (
            harmless(f"{sample.get('prompt', '')}{sample.get('text', '')}").strip("\n").split("\n")
        )
        lines += [
            f"what it wrote at step {sample.get('step', 0):,}:",
            "",
            *(f"    {row}" for row in rows),
            "",
        ]
    lines += [f"report: {report}"] if report is not None else []
    lines += ["try next:"]
    lines += [f"  glasslm resume {run}"] if status in ("interrupted", "failed") else []
    lines += (
        ["  training again with a lower --lr or a longer --warmup-steps"]
        if status == "diverged"
        else []
    )
    lines += [f"  glasslm generate {run}", f"  glasslm evaluate {run} --text-file FILE"]
    return harmless("\n".join(lines))
