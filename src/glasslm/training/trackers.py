"""Trackers: wandb or TensorBoard shows a run's lines as they are written.

A tracker is a process of its own, which reads metrics.jsonl as it grows: `python -m glasslm.training.trackers`. So it cannot
change a run, whatever threads and handlers its library brings, and where it fails or hangs the run loses a few seconds
at its end. Its input is held open by the process that trains: when that ends, however it ends, the tracker does, too.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from glasslm import files
from glasslm.errors import InputError
from glasslm.runs.checkpoint import Progress
from glasslm.runs.metrics import Line
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, as_float, one_line, quoted
from glasslm.training.interruption import Interrupt, interruptible
from glasslm.training.loop import evaluation_windows

START_S, CLOSE_S = (
    30.0,
    20.0,
)  # how long a run waits for its trackers, before its first step and after its last line
CONNECT_S = 10  # of START_S, for wandb to find its server
UPLOAD_S = 15  # of CLOSE_S, for wandb to send the rest
QUIET_S = 2.0  # of CLOSE_S, without a word about the waiting
POLL_S = 0.5


# -- the run's side ---------------------------------------------------------------------------------------------------


def named(track: str) -> tuple[str, ...]:
    """The trackers of "wandb,tensorboard"; InputError for another name, and where a library is not installed."""
    names = tuple(dict.fromkeys(word for part in track.split(",") if (word := part.strip())))
    for name in names:
        if name not in TRACKERS:
            raise InputError(
                f"there is no tracker '{name}': choose from {', '.join(TRACKERS)}, or both with a comma"
            )
        spec = find_spec(name)
        if (
            spec is None or spec.origin is None
        ):  # a mere folder of that name, such as wandb leaves, is no library
            raise InputError(
                f"--track {name} needs {name}, which is not installed: `pip install 'glasslm[track]'`, or leave it out"
            )
    return names


@contextmanager
def tracked(
    names: tuple[str, ...], run: Run, progress: Progress | None, notify: Notify
) -> Iterator[Interrupt]:
    """Around a run, from the opening of its log to the closing: `notify` takes where it can be seen, and what failed.

    What it gives is set where a signal came while the run waited for its trackers to start.
    """
    processes: list[_Process] = []
    try:
        for name in names:
            try:
                processes.append(_Process(name, run.path, progress))
            except OSError as error:  # no memory, or too many processes
                notify(_warning(name, str(error)))
        end = time.monotonic() + START_S
        with interruptible() as interrupted:
            for process in processes:
                process.wait_for_start(end, notify, interrupted)
        yield interrupted
    finally:
        end = time.monotonic() + CLOSE_S
        for process in processes:
            process.finish()
        for process in processes:
            process.wait_for_end(end, notify)


def _warning(name: str, why: str) -> str:
    return f"warning: {name} does not track this run any more: {one_line(why, longest=400)}"  # with a path in it


class _Process:
    """A tracker's process, as the run sees it."""

    def __init__(self, name: str, run_dir: Path, progress: Progress | None) -> None:
        """A run that goes on is told from where it goes on, or from its beginning if nobody has tracked it so far."""
        self.name, self.failed = name, False
        start, step = 0, 0
        if progress and (run_dir / name).is_dir():
            start, step = progress.metrics_bytes, progress.step
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "glasslm.training.trackers",
                name,
                str(run_dir),
                str(start),
                str(step),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run
        )
        self._said: queue.Queue[dict[str, Any]] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True, name=name)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for answer in answers:
                with suppress(ValueError):  # what Python itself may print when it starts
                    self._said.put(json.loads(answer))
        self._said.put({"failed": "its process ended without a word"})

    def wait_for_start(self, end: float, notify: Notify, interrupted: Interrupt) -> None:
        if (
            not self._hears(("where", "failed"), end, notify, interrupted)
            and not interrupted.is_set()
        ):
            notify(f"note: {self.name} is not ready yet, and the run begins without waiting for it")

    def finish(self) -> None:
        """Tell it that there is nothing more to read."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait_for_end(self, end: float, notify: Notify) -> None:
        """Until `end` or Ctrl-C at most: the run is saved, and waits for nothing else."""
        try:
            if not self.failed and not self._hears(
                ("done", "failed"), time.monotonic() + QUIET_S, notify
            ):
                notify(f"waiting for {self.name}, {CLOSE_S:.0f} seconds at most; Ctrl-C ends that")
                if not self._hears(("done", "failed"), end, notify):
                    notify(_warning(self.name, f"it was left when {CLOSE_S:.0f} seconds were over"))
            self._process.wait(timeout=QUIET_S)
        except (
            subprocess.TimeoutExpired,
            KeyboardInterrupt,
        ) as error:  # its library may also hang when Python exits
            if isinstance(error, KeyboardInterrupt):
                notify(_warning(self.name, "it was left at Ctrl-C"))
            self._process.kill()
            self._process.wait()
        self._listener.join()

    def _hears(
        self,
        words: tuple[str, ...],
        end: float,
        notify: Notify,
        interrupted: Interrupt | None = None,
    ) -> bool:
        """Whether it said one of these words before `end` or a signal; what a person should know is said on."""
        while True:
            try:
                answer = self._said.get(timeout=max(0.0, min(POLL_S, end - time.monotonic())))
            except queue.Empty:
                if time.monotonic() < end and not (interrupted and interrupted.is_set()):
                    continue
                return False
            if "where" in answer:
                notify(f"{self.name}: {answer['where']}")
            if "failed" in answer:
                self.failed = True
                notify(_warning(self.name, answer["failed"]))
            if not answer.keys().isdisjoint(words):
                return True


# -- the tracker's side -----------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """What shows a run: it takes each line once, and at the end the status, None where there was no last line.

    It is made of the run and of the step after which it goes on.
    """

    where: str  # for a person to find it

    def log(self, line: Line) -> None: ...

    def close(self, status: str | None) -> None: ...


def numbers(line: Line) -> dict[str, float]:
    """What is drawn of a line, under the names that both trackers use; what is not finite is NaN."""
    if line["kind"] == "step":
        shown = {name: line[name] for name in ("loss", "lr", "grad_norm")} | line.get(
            "auxiliary", {}
        )
        group, shown = "train", shown | {"tokens_per_s": line["timing"]["tokens_per_s"]}
    elif line["kind"] == "eval":
        group, shown = line["split"], {name: line[name] for name in ("loss", "bpb", "perplexity")}
    else:
        return {}
    return {f"{group}/{name}": as_float(value) for name, value in shown.items()}


class Wandb:
    """Weights & Biases: on its server, or in RUN/wandb where WANDB_MODE says offline, or there is no key or network."""

    def __init__(self, run: Run, step: int) -> None:
        model, record = run.config.model, run.record
        environment = {  # in which the user may have said otherwise
            "WANDB_PROJECT": "glasslm",
            "WANDB_NAME": f"{record['preset']}-{model.n_layers}L-{model.d_model}d",
            "WANDB_NOTES": record["command"],
            "WANDB_FINISH_TIMEOUT": str(UPLOAD_S),
            "WANDB_FINISH_TIMEOUT_RAISES": "true",
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_GIT": "true",  # the commit is in run.json, and what else was changed stays here
            "WANDB_DISABLE_CODE": "true",
            "WANDB_X_STATS_PID": str(os.getppid()),  # whose memory and time are shown
        }
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self._wandb = import_module("wandb")
        arguments = {
            "id": identity(run),
            "config": record["config"],
            "dir": str(run.path.resolve()),
            "settings": self._wandb.Settings(init_timeout=CONNECT_S),
        }
        why = ""
        try:
            self._run = self._wandb.init(**arguments, resume="allow")
        except self._wandb.Error as error:  # there is no key or no network
            why = f" ({one_line(str(error))})"
            self._wandb.teardown()  # its service would hold on to the name of the run
            self._run = self._wandb.init(**arguments, mode="offline")
        self._sync = f"`wandb sync {quoted(Path(self._run.dir).parent)}`"
        unseen = (
            "switched off by WANDB_MODE"
            if self._run.disabled
            else f"offline{why}; {self._sync} uploads it"
        )
        self.where = self._run.url or unseen

    def log(self, line: Line) -> None:
        step = line["step"]
        if line.get("split") == "whole":  # perhaps of an earlier step, and wandb only goes forward
            self._run.summary.update(numbers(line) | {"whole/step": step})
        elif line["kind"] == "sample":
            text = html.escape(line["prompt"] + line["text"])
            self._run.log({"sample": self._wandb.Html(f"<pre>{text}</pre>")}, step=step)
        elif shown := numbers(line):
            self._run.log(shown, step=step)

    def close(self, status: str | None) -> None:
        self._run.summary["status"] = status
        try:
            self._run.finish(exit_code=0 if status in ("finished", "stopped") else 1)
        except TimeoutError:
            raise TimeoutError(f"not all of it is uploaded: {self._sync} does the rest") from None


def identity(run: Run) -> str:
    """What wandb knows the run by, also when it is resumed. A copy, which may go on in another way, is another run."""
    return hashlib.sha256(files.json_bytes([run.record, run.path.resolve().name])).hexdigest()[:16]


class TensorBoard:
    """Event files in RUN/tensorboard, by the package of that name alone: neither TensorFlow nor PyTorch is needed."""

    def __init__(self, run: Run, step: int) -> None:
        self._protos = {
            name: import_module(f"tensorboard.compat.proto.{name}_pb2")
            for name in ("event", "summary", "tensor")
        }
        self._metadata = import_module("tensorboard.plugins.text.metadata")
        writer = import_module("tensorboard.summary.writer.record_writer")
        folder = run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        before = len(list(folder.glob("events.out.tfevents.*")))
        # They are read in the order of their names. EventFileWriter's begin with the time, and it writes in a thread,
        # after whose death on a full disk it waits forever.
        name = f"events.out.tfevents.{before:06d}.glasslm"
        self._records = writer.RecordWriter(open(folder / name, "xb"))  # noqa: SIM115 (close() closes it)
        self._write(file_version="brain.Event:2")
        if before:  # what came after this step was told before a crash, and does not count any more
            session = self._protos["event"].SessionLog
            self._write(step=step + 1, session_log=session(status=session.START))
        else:
            self._text("config", json.dumps(run.record["config"], indent=2), 0)
        self.where = f"`tensorboard --logdir {quoted(run.path)}` shows it"

    def log(self, line: Line) -> None:
        if line["kind"] == "sample":
            self._text("sample", line["prompt"] + line["text"], line["step"])
        value = self._protos["summary"].Summary.Value
        if values := [value(tag=tag, simple_value=number) for tag, number in numbers(line).items()]:
            self._summary(values, line["step"])

    def close(self, status: str | None) -> None:
        self._records.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        """As a block of code, because TensorBoard reads Markdown."""
        block = textwrap.indent(text, "    ", lambda row: True)
        tensor = self._protos["tensor"].TensorProto(
            dtype="DT_STRING", string_val=[block.encode("utf-8")]
        )
        metadata = self._metadata.create_summary_metadata(display_name=None, description=None)
        value = self._protos["summary"].Summary.Value
        self._summary([value(tag=tag, metadata=metadata, tensor=tensor)], step)

    def _summary(self, values: list[Any], step: int) -> None:
        self._write(step=step, summary=self._protos["summary"].Summary(value=values))

    def _write(self, **fields: Any) -> None:
        event = self._protos["event"].Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()


TRACKERS: dict[str, Callable[[Run, int], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def follow(run: Run, start: int, over: threading.Event) -> Iterator[Line]:
    """The lines of metrics.jsonl from byte `start` on, as they are written, until it is over.

    What is measured on the whole split after a run whose evaluations took a part of it has "whole" as its split: it is
    no point of their curve, and may be about an earlier step.
    """
    in_parts = evaluation_windows(run.config, run.record["data"]["val_tokens"]) is not None
    with open(run.path / "metrics.jsonl", "rb") as file:
        file.seek(start)
        rest = b""
        while True:
            last = (
                over.is_set()
            )  # asked before reading, so that all that was written before is read
            *raw, rest = (rest + file.read()).split(b"\n")
            for line in map(files.parse_json, raw):
                final = (
                    line["kind"] == "eval" and line["split"] == "val" and line["whole"] and in_parts
                )
                yield line | ({"split": "whole"} if final else {})
            if last:
                return
            over.wait(POLL_S)


def main(name: str, run_dir: str, start: str, step: str) -> int:
    """Read along; what the run should know goes to the output, a JSON object a line: where, done or failed."""
    for signalled in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they mean the run, which says when it is over
        signal.signal(signalled, signal.SIG_IGN)
    output = os.dup(1)
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 1
    )  # libraries, and processes that they start, may print

    def answer(**words: str) -> None:
        with suppress(OSError):  # the run was killed
            os.write(output, files.json_bytes(words, indent=None))

    over = threading.Event()
    threading.Thread(target=_end_with_run, args=(over,), daemon=True, name="run").start()
    run, status = Run(run_dir), None
    try:
        tracker = TRACKERS[name](run, int(step))
        answer(where=tracker.where)
        for line in follow(run, int(start), over):
            tracker.log(line)
            status = line["status"] if line["kind"] == "end" else None  # of the last line
        tracker.close(status)
        answer(done="")
    except Exception as error:  # of whatever kind: the run goes on without this tracker
        answer(failed=f"{type(error).__name__}: {error}")
        return 1
    return 0


def _end_with_run(over: threading.Event) -> None:
    """The input ends when the run does. A library that hangs then has no one left to stop it but this."""
    while os.read(0, 1):  # sys.stdin has a lock, which Python wants when it exits
        pass
    over.set()
    time.sleep(CLOSE_S + 5)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
