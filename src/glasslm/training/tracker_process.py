"""The process of one tracker: `python -m glasslm.training.tracker_process NAME RUN START STEP`.

It reads metrics.jsonl as it grows and passes its lines to Weights & Biases or TensorBoard. Messages
to the run go to standard output, one JSON object a line: `where`, `done` or `failed`. The end of
standard input means that the run has ended.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from glasslm import strict_json
from glasslm.runs.metrics import COMPLETED_STATUSES, Line, timing_of
from glasslm.runs.run_folder import Run
from glasslm.text import as_float, quote_path, to_one_line
from glasslm.training.evaluation_windows import evaluation_windows

MAX_CLOSE_S = 20.0  # a run waits for its trackers after its last line
MAX_CONNECT_S = 10  # for wandb to find its server; trackers.MAX_START_S is longer
MAX_UPLOAD_S = 15  # of MAX_CLOSE_S, for wandb to send the rest
POLL_S = 0.5


class Tracker(Protocol):
    """Shows a run. It is created with the run and the step after which it continues."""

    where: str  # the address, as a message to the user

    def log(self, line: Line) -> None:
        """Show a line of metrics.jsonl; each line comes once."""
        ...

    def close(self, status: str | None) -> None:
        """End, with the status of the run; None where its last line is missing."""
        ...


def metric_values(line: Line) -> dict[str, float]:
    """The numbers of a line that both trackers draw, by name; NaN for non-finite ones."""
    values: dict[str, Any]
    if line["kind"] == "step":
        group, values = "train", {name: line.get(name) for name in ("loss", "lr", "grad_norm")}
        values |= {**line.get("auxiliary", {}), **line.get("preference", {})}
        values["tokens_per_s"] = timing_of(line)["tokens_per_s"]
    elif line["kind"] == "eval":
        group, measures = line["split"], line.get("preference")
        # The loss of preference tuning is not that of a text, so it has no bpb and no perplexity.
        names = ("loss", "bpb", "perplexity") if measures is None else ("loss",)
        values = {name: line.get(name) for name in names} | dict(measures or {})
    else:
        return {}
    return {f"{group}/{name}": as_float(value) for name, value in values.items()}


class Wandb:
    """Weights & Biases: on its server, or in RUN/wandb.

    It is offline where WANDB_MODE says so and where there is no key or network.
    """

    def __init__(self, run: Run, step: int) -> None:
        """Open the run on the server, or a new one there. `step` is not needed."""
        model, record = run.config.model, run.record
        environment = {  # defaults: the user's own variables come first
            "WANDB_PROJECT": "glasslm",
            "WANDB_NAME": f"{record['preset']}-{model.n_layers}L-{model.d_model}d",
            "WANDB_NOTES": record["command"],
            "WANDB_FINISH_TIMEOUT": str(MAX_UPLOAD_S),
            "WANDB_FINISH_TIMEOUT_RAISES": "true",
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_GIT": "true",  # run.json has the commit; a diff stays on this machine
            "WANDB_DISABLE_CODE": "true",
            "WANDB_X_STATS_PID": str(os.getppid()),  # memory and time of the process that trains
        }
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self._wandb = import_module("wandb")
        arguments = {
            "id": wandb_run_id(run),
            "config": record["config"],
            "dir": str(run.path.resolve()),
            "settings": self._wandb.Settings(init_timeout=MAX_CONNECT_S),
        }
        reason = ""
        try:
            self._run = self._wandb.init(**arguments, resume="allow")
        except self._wandb.Error as error:  # there is no key or no network
            reason = f" ({to_one_line(str(error))})"
            self._wandb.teardown()  # otherwise its service keeps the id of the run in use
            self._run = self._wandb.init(**arguments, mode="offline")
        self._sync_command = f"`wandb sync {quote_path(Path(self._run.dir).parent)}`"
        without_url = (
            "switched off by WANDB_MODE"
            if self._run.disabled
            else f"offline{reason}; {self._sync_command} uploads it"
        )
        self.where = self._run.url or without_url

    def log(self, line: Line) -> None:
        """Show a line; an evaluation of the whole split goes to the summary."""
        step = line["step"]
        # The step of a whole evaluation may be an earlier one, and wandb's steps only increase.
        if line.get("split") == "whole":
            self._run.summary.update(metric_values(line) | {"whole/step": step})
        elif line["kind"] == "sample":
            text = html.escape(line["prompt"] + line["text"])
            self._run.log({"sample": self._wandb.Html(f"<pre>{text}</pre>")}, step=step)
        elif values := metric_values(line):
            self._run.log(values, step=step)

    def close(self, status: str | None) -> None:
        """Upload the rest. Raises TimeoutError where that takes longer than MAX_UPLOAD_S."""
        self._run.summary["status"] = status
        try:
            self._run.finish(exit_code=0 if status in COMPLETED_STATUSES else 1)
        except TimeoutError:
            raise TimeoutError(
                f"not all of it is uploaded: {self._sync_command} does the rest"
            ) from None


def wandb_run_id(run: Run) -> str:
    """The id of a run in wandb, 16 hexadecimal digits; a resumed run keeps it, a copy does not."""
    content = strict_json.json_bytes([run.record, run.path.resolve().name])
    return hashlib.sha256(content).hexdigest()[:16]


class TensorBoard:
    """Event files in RUN/tensorboard, written by the package tensorboard without TensorFlow."""

    def __init__(self, run: Run, step: int) -> None:
        """Start a new event file. Older events after `step` no longer count."""
        self._protos = {
            name: import_module(f"tensorboard.compat.proto.{name}_pb2")
            for name in ("event", "summary", "tensor")
        }
        self._metadata = import_module("tensorboard.plugins.text.metadata")
        writer = import_module("tensorboard.summary.writer.record_writer")
        folder = run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        n_earlier = len(list(folder.glob("events.out.tfevents.*")))
        # TensorBoard reads the files in the order of their names. EventFileWriter is not used: its
        # names begin with the time, and when its thread dies on a full disk it waits forever.
        name = f"events.out.tfevents.{n_earlier:06d}.glasslm"
        file = open(folder / name, "xb")  # noqa: SIM115 (closed below)
        self._records = writer.RecordWriter(file)
        self._write(file_version="brain.Event:2")
        if n_earlier:
            session = self._protos["event"].SessionLog
            self._write(step=step + 1, session_log=session(status=session.START))
        else:
            self._log_text("config", json.dumps(run.record["config"], indent=2), 0)
        self.where = f"`tensorboard --logdir {quote_path(run.path)}` shows it"

    def log(self, line: Line) -> None:
        """Show a line."""
        if line["kind"] == "sample":
            self._log_text("sample", line["prompt"] + line["text"], line["step"])
        make_value = self._protos["summary"].Summary.Value
        if values := [
            make_value(tag=tag, simple_value=value) for tag, value in metric_values(line).items()
        ]:
            self._log_values(values, line["step"])

    def close(self, status: str | None) -> None:
        """Close the file."""
        self._records.close()

    def _log_text(self, tag: str, text: str, step: int) -> None:
        # As a block of code, because TensorBoard renders text as Markdown.
        block = textwrap.indent(text, "    ", lambda row: True)
        tensor = self._protos["tensor"].TensorProto(
            dtype="DT_STRING", string_val=[block.encode("utf-8")]
        )
        metadata = self._metadata.create_summary_metadata(display_name=None, description=None)
        make_value = self._protos["summary"].Summary.Value
        self._log_values([make_value(tag=tag, metadata=metadata, tensor=tensor)], step)

    def _log_values(self, values: list[Any], step: int) -> None:
        self._write(step=step, summary=self._protos["summary"].Summary(value=values))

    def _write(self, **fields: Any) -> None:
        event = self._protos["event"].Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()


TRACKERS: dict[str, Callable[[Run, int], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def follow_lines(run: Run, start: int, run_ended: threading.Event) -> Iterator[Line]:
    """The lines of metrics.jsonl from byte `start` on, as they are written, until the run ends.

    Where the evaluations of a run take a sample of the split, the final one on the whole split, or
    on a larger sample, has the split "whole": it is no point of their curve, and may belong to an
    earlier step. Preference tuning measures all that is held out at each evaluation.
    """
    sampled_windows = None
    if not run.config.preference.is_active:
        sampled_windows = evaluation_windows(run.config, run.record["data"]["val_tokens"])
    sampled_tokens = (sampled_windows or 0) * run.config.model.block_size
    with open(run.path / "metrics.jsonl", "rb") as file:
        file.seek(start)
        partial_line = b""
        while True:
            # Checked before reading, so that nothing written before the end is missed.
            is_last_read = run_ended.is_set()
            *raw_lines, partial_line = (partial_line + file.read()).split(b"\n")
            for line in map(strict_json.parse_json, raw_lines):
                if (
                    sampled_windows is not None
                    and line["kind"] == "eval"
                    and line["split"] == "val"
                    and (line["whole"] or line["tokens"] > sampled_tokens)
                ):
                    line["split"] = "whole"
                yield cast(Line, line)
            if is_last_read:
                return
            run_ended.wait(POLL_S)


def main(name: str, run_dir: str, start: str, step: str) -> int:
    """Follow a run from byte `start` of its metrics and from `step` on; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the run, which ends its trackers
        signal.signal(number, signal.SIG_IGN)
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries and their child processes may print

    def send_message(**message: str) -> None:
        with suppress(OSError):  # the run was killed
            os.write(output, strict_json.json_bytes(message, indent=None))

    run_ended = threading.Event()
    threading.Thread(target=_exit_after_run, args=(run_ended,), daemon=True, name="run").start()
    run, status = Run(run_dir), None
    try:
        tracker = TRACKERS[name](run, int(step))
        send_message(where=tracker.where)
        for line in follow_lines(run, int(start), run_ended):
            tracker.log(line)
            status = line["status"] if line["kind"] == "end" else None  # of the last line
        tracker.close(status)
        send_message(done="")
    except Exception as error:  # of any kind: the run continues without this tracker
        send_message(failed=f"{type(error).__name__}: {error}")
        return 1
    return 0


def _exit_after_run(run_ended: threading.Event) -> None:
    """Set `run_ended` at the end of standard input; exit later, even where a library hangs."""
    while os.read(0, 1):  # sys.stdin has a lock, which Python needs when it exits
        pass
    run_ended.set()
    time.sleep(MAX_CLOSE_S + 5)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
