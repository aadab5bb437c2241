"""Many runs, one study: what is finished is skipped, what was interrupted goes on, what fails does not end it.

A study is a folder with an ordinary run for each trial under runs/, and what each process said under logs/. The state
of a study is the state of its runs: there is nothing else to lose.
"""

from __future__ import annotations

import dataclasses
import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from glasslm.config.conversion import to_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.choice import cores
from glasslm.errors import DamagedError, InputError
from glasslm.lab.studies.trial_process import in_a_process
from glasslm.model import flops
from glasslm.runs.run_folder import Run
from glasslm.text import Say, duration
from glasslm.training.interruption import Interrupt, interruptible

RunnerName = Literal["local", "ray"]
OVER = ("finished", "stopped", "diverged")  # what need not be trained again
TOLD_EVERY_S = 20.0


class Trial(NamedTuple):
    """One run of a study."""

    name: str  # of its folder
    config: RunConfig


@dataclass(frozen=True)
class Runner:
    """Where the runs of a study are trained, and how many at once."""

    compute: ComputeConfig  # of each run
    name: RunnerName = "local"
    address: str | None = None  # of a Ray cluster
    workers: int = 0  # runs at once; 0: as many as there are cores for

    @property
    def threads(self) -> int:
        """Of each run: one, unless more were asked for."""
        return self.compute.threads or 1

    @property
    def slots(self) -> int:
        """Runs at once on this machine; of a cluster it is what is planned with, unless `workers` says more."""
        if self.compute.device not in ("auto", "cpu"):
            return self.workers or 1  # a GPU is shared by those who ask for it
        return self.workers or max(1, len(cores()) // self.threads)

    def alone(self, compute: ComputeConfig) -> Runner:
        """For one run at a time, here, with all cores."""
        return Runner(
            dataclasses.replace(compute, threads=max(len(cores()), self.threads)), workers=1
        )


class Ended(NamedTuple):
    """What became of a trial."""

    status: str  # finished, stopped or diverged; failed where there is no result
    run: Run
    why: str = ""  # it failed


def run_all(
    study: Path,
    trials: Sequence[Trial],
    runner: Runner,
    vocab_size: int,
    say: Say,
    command: str = "",
) -> dict[str, Ended]:
    """Train what is not over yet, and tell what became of every trial.

    `vocab_size` weighs the trials against each other, for the time left. A signal interrupts all runs, which save, and
    then ends the program as it would any. Raises InputError where a run in the folder was made with other settings than
    its trial has.
    """
    if len({trial.name for trial in trials}) < len(trials):
        raise InputError("two trials have the same name")
    waiting = [trial for trial in trials if not _is_over(study, trial)]
    work = {trial.name: cost(trial.config, vocab_size) for trial in trials}
    if len(waiting) < len(trials):
        say(f"{len(trials) - len(waiting)} of {len(trials)} runs are there already")
    waiting.sort(
        key=lambda trial: -work[trial.name]
    )  # the longest first, or the last core works alone at the end
    with interruptible() as interrupted, _executing(runner, interrupted) as (execute, slots):
        progress = _Progress(study, work, [trial.name for trial in waiting], say)
        with ThreadPoolExecutor(slots) as pool:
            jobs = {
                pool.submit(execute, study, _job(study, trial, runner, command)): trial
                for trial in waiting
            }
            codes = _wait(jobs, progress, interrupted)
    if interrupted.received:
        signal.signal(interrupted.received, signal.SIG_DFL)
        signal.raise_signal(interrupted.received)
    return {trial.name: _ended(study, trial, codes.get(trial.name)) for trial in trials}


def require_results(ended: dict[str, Ended]) -> None:
    """Raise InputError where runs failed on whose results others depend: going on tries them again."""
    failed = {name: end.why for name, end in ended.items() if end.status == "failed"}
    if failed:
        name, why = next(iter(failed.items()))
        raise InputError(
            f"{len(failed)} of {len(ended)} runs failed, on which the rest depends ({name}: {why}): mend the cause, "
            "and give the same command again, which tries them again"
        )


def cost(config: RunConfig, vocab_size: int) -> float:
    """FLOPs of a whole run."""
    tokens = config.train.max_steps * config.train.batch_size * config.model.block_size
    return tokens * flops.flops_per_token(config.model, vocab_size)


def _is_over(study: Path, trial: Trial) -> bool:
    path = _path(study, trial)
    if not (path / "run.json").exists():
        return False
    run, train = Run(path), trial.config.train
    if (
        train.epochs is not None or train.max_time is not None
    ):  # the number of steps was fixed when the run began
        train = dataclasses.replace(train, max_steps=run.config.train.max_steps)
    if run.config != dataclasses.replace(trial.config, train=train).resolved():
        raise InputError(
            f"{path} was trained with other settings: choose another folder for this study"
        )
    return run.history.status in OVER


def _ended(study: Path, trial: Trial, code: int | None) -> Ended:
    run = Run(_path(study, trial))
    try:
        status = run.history.status
    except DamagedError as error:
        return Ended("failed", run, str(error))
    if status in OVER:
        return Ended(str(status), run)
    log = study / "logs" / f"{trial.name}.log"
    said = (
        log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if log.exists()
        else []
    )
    return Ended("failed", run, f"exit code {code}: {said[-1] if said else 'it said nothing'}")


def _path(study: Path, trial: Trial) -> Path:
    return study / "runs" / trial.name


def _job(study: Path, trial: Trial, runner: Runner, command: str) -> dict[str, Any]:
    compute = dataclasses.replace(runner.compute, threads=runner.threads)
    return {
        "run_dir": str(_path(study, trial).absolute()),
        "config": to_dict(trial.config),
        "compute": to_dict(compute),
        "preset": trial.name,
        "command": command,
        "core": None,
    }


def _wait(
    jobs: dict[Future[int], Trial], progress: _Progress, interrupted: Interrupt
) -> dict[str, int]:
    """The exit codes, by name, as far as there are some when a signal comes."""
    codes: dict[str, int] = {}
    pending = dict(jobs)
    while pending:
        if interrupted.is_set():
            for job in pending:
                job.cancel()
        for job in list(pending):
            if job.cancelled():
                del pending[job]
            elif job.done():
                trial = pending.pop(job)
                codes[trial.name] = job.result()
                progress.end(trial.name, codes[trial.name])
        if pending:
            with suppress(NotYet):
                next(iter(pending)).result(timeout=0.2)
            progress.tell()
    return codes


class _Progress:
    """How far a study is, in FLOPs, which is what costs time."""

    def __init__(self, study: Path, work: dict[str, float], waiting: list[str], say: Say) -> None:
        self.study, self.work, self.say = study, work, say
        self.left = set(waiting)
        self.total = self.to_do  # the rest was done in earlier parts
        self.began = self.told = time.monotonic()

    @property
    def to_do(self) -> float:
        return sum(self.work[name] * (1 - self.share(name)) for name in self.left)

    def share(self, name: str) -> float:
        """The share of a run's steps that its log has told of."""
        try:
            lines = list(Run(self.study / "runs" / name).metrics())
        except DamagedError:
            return 0.0
        steps = [line["step"] for line in lines if line["kind"] == "step"]
        plan = [line["max_steps"] for line in lines if line["kind"] == "plan"]
        return steps[-1] / plan[0] if steps and plan else 0.0

    def end(self, name: str, code: int) -> None:
        self.left.discard(name)
        how = {0: "done", 3: "diverged"}.get(
            code, "interrupted" if code >= 128 or code < 0 else f"failed ({code})"
        )
        self.say(f"{name}: {how}; {len(self.left)} runs to go")

    def tell(self) -> None:
        now = time.monotonic()
        if now - self.told < TOLD_EVERY_S:
            return
        self.told = now
        done = self.total - self.to_do
        if done > 0 and self.left:
            left = (now - self.began) * (self.total / done - 1)
            self.say(
                f"the study: {done / self.total:.0%}, {len(self.left)} runs to go, about {duration(left)} left"
            )


Execute = Callable[[Path, dict[str, Any]], int]


@contextmanager
def _executing(runner: Runner, interrupted: Interrupt) -> Iterator[tuple[Execute, int]]:
    """What executes a job and returns its exit code, and how many it can execute at once."""
    if runner.name == "ray":
        from glasslm.lab.studies import ray_runner

        gpus = int(runner.compute.device == "cuda")
        with ray_runner.connected(runner.address, runner.threads, gpus, interrupted) as (
            on_cluster,
            at_once,
        ):
            yield on_cluster, runner.workers or at_once
        return
    here = cores()
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(runner.slots):
        free.put(here[number % len(here)])

    def execute(study: Path, job: dict[str, Any]) -> int:
        core = free.get()
        try:
            # several threads take what cores there are
            return in_a_process(
                study, job | {"core": core if runner.threads == 1 else None}, interrupted
            )
        finally:
            free.put(core)

    yield execute, runner.slots
