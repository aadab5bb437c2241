"""The sweep driver: trains all runs of a study.

Finished runs are skipped, interrupted ones are resumed, and a failed one does not end the study. A
study is a folder with an ordinary run for each trial under runs/ and the output of each process
under logs/. The state of a study is the state of its runs; nothing else is stored. `run_all` trains
several runs at once, each in a process of its own; `run_in_turn` trains one after another in this
process.
"""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from glasslm.config.conversion import to_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.resources import available_cores
from glasslm.errors import DamagedError, InputError
from glasslm.lab.studies.study_plan import require_recorded_compute
from glasslm.lab.studies.trial_process import run_in_subprocess
from glasslm.model import flops
from glasslm.runs.metrics import ENDED_STATUSES, step_lines
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, format_duration, plural
from glasslm.training.evaluation_windows import windows_of
from glasslm.training.interruption import SignalEvent, catch_signals, pass_on_signal

RunnerName = Literal["local", "ray"]
PROGRESS_INTERVAL_S = 20.0  # between two messages about the whole study


class Trial(NamedTuple):
    """One run of a study."""

    name: str  # of its folder
    config: RunConfig
    checkout: str = ""  # of another version of glasslm, which trains the run


@dataclass(frozen=True)
class Runner:
    """Where the runs of a study are trained, and how many at once."""

    compute: ComputeConfig  # of each run
    name: RunnerName = "local"
    address: str | None = None  # of a Ray cluster
    workers: int = 0  # runs at once; 0: one for each core
    final_tokens: int | None = None  # of each run's final measurement; None: the whole split

    @property
    def threads(self) -> int:
        """The threads of each run: one, unless --threads asks for more."""
        return self.compute.threads or 1

    @property
    def slots(self) -> int:
        """The runs at once on this machine; for a cluster, the number that a plan assumes."""
        if self.compute.device not in ("auto", "cpu"):
            return self.workers or 1  # runs share a GPU only if --workers asks for it
        return self.workers or max(1, len(available_cores()) // self.threads)

    def with_all_cores(self, compute: ComputeConfig) -> Runner:
        """A local runner that trains one run at a time with all cores."""
        threads = max(len(available_cores()), self.threads)
        return Runner(
            dataclasses.replace(compute, threads=threads),
            workers=1,
            final_tokens=self.final_tokens,
        )


TRY_AGAIN = "Remove the cause and give the same command again: it tries them again"


class TrialOutcome(NamedTuple):
    """The end of a trial."""

    status: str  # finished, stopped or diverged; failed if there is no result
    run: Run
    error: str = ""  # the reason of a failure


def run_all(
    study: Path,
    trials: Sequence[Trial],
    runner: Runner,
    vocab_size: int,
    notify: Notify,
    command: str = "",
) -> dict[str, TrialOutcome]:
    """Train all trials that have not ended yet, several at once.

    Returns the outcome of each trial by its name. `vocab_size` is needed for the FLOPs of each
    trial, from which the time left is estimated. A signal interrupts all runs, which save a
    checkpoint; then the signal ends the program. Raises InputError if a run in the folder has other
    settings than its trial.
    """
    waiting = _list_waiting(study, trials, runner.compute, notify)
    work = {trial.name: run_flops(trial.config, vocab_size) for trial in trials}
    # The longest run comes first: otherwise it may end up alone on one core.
    waiting.sort(key=lambda trial: -work[trial.name])
    with catch_signals() as interrupted, _open_executor(runner, interrupted) as (execute, slots):
        progress = _Progress(study, work, [trial.name for trial in waiting], notify)
        with ThreadPoolExecutor(slots) as pool:
            jobs = {
                pool.submit(execute, study, _make_job(study, trial, runner, command)): trial
                for trial in waiting
            }
            codes = _collect_exit_codes(jobs, progress, interrupted)
    if interrupted.received:
        pass_on_signal(interrupted.received)
    return {trial.name: _read_outcome(study, trial, codes.get(trial.name)) for trial in trials}


def run_in_turn(
    study: Path,
    trials: Sequence[Trial],
    compute: ComputeConfig,
    notify: Notify,
    command: str = "",
) -> dict[str, TrialOutcome]:
    """Train all trials that have not ended yet, one after another in this process.

    The report of each run is written as well. Returns the outcome of each trial by its name. Each
    run uses all threads of `compute`. After a signal the current run saves a checkpoint; then
    SIGINT raises KeyboardInterrupt, and another signal ends the program. Raises InputError if a run
    in the folder has other settings than its trial.
    """
    from glasslm.lab.studies.worker import train_or_resume
    from glasslm.report import run_report

    codes = {}
    waiting = _list_waiting(study, trials, compute, notify)
    for number, trial in enumerate(waiting, 1):
        notify(f"{number} of {len(waiting)}: {trial.name}")
        path = _run_dir(study, trial)
        outcome = train_or_resume(path, trial.config, compute, trial.name, command, _ignore)
        run_report.write_after_training(outcome, _ignore)
        if outcome.status == "interrupted":
            pass_on_signal(outcome.signal)
        codes[trial.name] = outcome.exit_code
    return {trial.name: _read_outcome(study, trial, codes.get(trial.name)) for trial in trials}


def _ignore(message: str) -> None:
    """A Notify that shows nothing: a study of many runs shows only its own messages."""


def read_outcomes(study: Path, trials: Sequence[Trial]) -> dict[str, TrialOutcome]:
    """The outcomes of trials by name, without training; one that has not ended has failed."""
    return {trial.name: _read_outcome(study, trial, None) for trial in trials}


def require_results(outcomes: dict[str, TrialOutcome], cure: str = TRY_AGAIN) -> None:
    """Raise InputError if any trial failed: what follows depends on the result of each."""
    errors = {name: end.error for name, end in outcomes.items() if end.status == "failed"}
    if errors:
        name, error = next(iter(errors.items()))
        raise InputError(
            f"{len(errors)} of {len(outcomes)} runs failed, and all of them are needed ({name}: "
            f"{error}). {cure}"
        )


def run_flops(config: RunConfig, vocab_size: int) -> float:
    """The FLOPs of a whole run."""
    tokens = config.total_tokens
    return tokens * flops.flops_per_token(config.model, vocab_size)


def _list_waiting(
    study: Path, trials: Sequence[Trial], compute: ComputeConfig, notify: Notify
) -> list[Trial]:
    """The trials that have not ended yet. Raises InputError if two trials have the same name."""
    if len({trial.name for trial in trials}) < len(trials):
        raise InputError("two trials have the same name")
    waiting = [trial for trial in trials if not _has_ended(study, trial, compute)]
    if len(waiting) < len(trials):
        notify(f"{len(trials) - len(waiting)} of {len(trials)} runs are finished already")
    return waiting


def _has_ended(study: Path, trial: Trial, compute: ComputeConfig) -> bool:
    """Whether the run of a trial needs no more training.

    Raises InputError if it has other settings, or another engine, device or precision.
    """
    path = _run_dir(study, trial)
    if not (path / "run.json").exists():
        return False
    run, train = Run(path), trial.config.train
    if train.epochs is not None or train.max_time is not None:
        # The number of steps was fixed when the run began.
        train = dataclasses.replace(train, max_steps=run.config.train.max_steps)
    expected = dataclasses.replace(trial.config, train=train).resolve()
    # A run of another version is judged when its outcome is read.
    if not trial.checkout and run.config != expected:
        raise InputError(
            f"{path} was trained with other settings: give the same flags, or choose another "
            "folder for this study"
        )
    if not trial.checkout:
        require_recorded_compute(compute, run.record, path)
    return run.history.status in ENDED_STATUSES


def _read_outcome(study: Path, trial: Trial, code: int | None) -> TrialOutcome:
    """The outcome of a trial from its run folder; the error is the last line of its log."""
    run = Run(_run_dir(study, trial))
    try:
        status = run.history.status
    except DamagedError as error:
        return TrialOutcome("failed", run, str(error))
    if status in ENDED_STATUSES:
        if trial.checkout and (reason := _different_settings(run, trial)):
            return TrialOutcome("failed", run, reason)
        return TrialOutcome(str(status), run)
    log = study / "logs" / f"{trial.name}.log"
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    last_line = output.strip().rpartition("\n")[2]
    return TrialOutcome("failed", run, f"exit code {code}: {last_line or 'no output'}")


def _different_settings(run: Run, trial: Trial) -> str:
    """The settings that another version reads otherwise, so that runs cannot be paired; or \"\"."""
    try:
        recorded, expected = to_dict(run.config), to_dict(trial.config)
    except InputError as error:
        return f"{trial.checkout} has other settings: {error}"
    names = [
        name
        for part, values in expected.items()
        for name in values
        if recorded[part][name] != values[name]
    ]
    return f"{trial.checkout} trains with another {', '.join(names)}" if names else ""


def _run_dir(study: Path, trial: Trial) -> Path:
    return study / "runs" / trial.name


def _make_job(study: Path, trial: Trial, runner: Runner, command: str) -> dict[str, Any]:
    """The job of a trial, as worker.py reads it."""
    compute = dataclasses.replace(runner.compute, threads=runner.threads)
    return {
        "run_dir": str(_run_dir(study, trial).absolute()),
        "config": to_dict(trial.config),
        "compute": to_dict(compute),
        "preset": trial.name,
        "command": command,
        "core": None,
        "checkout": trial.checkout,
        "final_windows": windows_of(runner.final_tokens, trial.config),
    }


def _collect_exit_codes(
    jobs: dict[Future[int], Trial], progress: _Progress, interrupted: SignalEvent
) -> dict[str, int]:
    """Wait for all jobs and return their exit codes by name.

    A signal cancels the jobs that have not started.
    """
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
                progress.end_run(trial.name, codes[trial.name])
        if pending:
            with suppress(FutureTimeoutError):
                next(iter(pending)).result(timeout=0.2)
            progress.report()
    return codes


class _Progress:
    """The progress of a study in FLOPs, which determine its time."""

    def __init__(
        self, study: Path, work: dict[str, float], waiting: list[str], notify: Notify
    ) -> None:
        self.study, self.work, self.notify = study, work, notify
        self.left = set(waiting)
        self.total = self.remaining  # without what earlier parts of the study did
        self.began = self.reported = time.monotonic()

    @property
    def remaining(self) -> float:
        """The FLOPs that are still to be done."""
        return sum(self.work[name] * (1 - self.done_share(name)) for name in self.left)

    def done_share(self, name: str) -> float:
        """The share of a run's steps that its metrics file contains."""
        try:
            lines = list(Run(self.study / "runs" / name).metrics())
        except DamagedError:
            return 0.0
        steps = [line["step"] for line in step_lines(lines)]
        plan = [line["max_steps"] for line in lines if line["kind"] == "plan"]
        return steps[-1] / plan[0] if steps and plan else 0.0

    def end_run(self, name: str, code: int) -> None:
        """Report that a run has ended with this exit code."""
        self.left.discard(name)
        ending = {0: "done", 3: "diverged"}.get(
            code, "interrupted" if code >= 128 or code < 0 else f"failed ({code})"
        )
        self.notify(f"{name}: {ending}; {plural(len(self.left), 'run')} to go")

    def report(self) -> None:
        """Report the progress of the study, at most every PROGRESS_INTERVAL_S."""
        now = time.monotonic()
        if now - self.reported < PROGRESS_INTERVAL_S:
            return
        self.reported = now
        done = self.total - self.remaining
        if done > 0 and self.left:
            left_s = (now - self.began) * (self.total / done - 1)
            self.notify(
                f"the study: {done / self.total:.0%}, {plural(len(self.left), 'run')} to go, about "
                f"{format_duration(left_s)} left"
            )


Execute = Callable[[Path, dict[str, Any]], int]


@contextmanager
def _open_executor(runner: Runner, interrupted: SignalEvent) -> Iterator[tuple[Execute, int]]:
    """A function that executes a job and returns its exit code, and how many jobs fit at once."""
    if runner.name == "ray":
        from glasslm.lab.studies import ray_runner

        gpus = int(runner.compute.device == "cuda")
        with ray_runner.connect_to_ray(runner.address, runner.threads, gpus, interrupted) as (
            execute_on_cluster,
            capacity,
        ):
            yield execute_on_cluster, runner.workers or capacity
        return
    cores = available_cores()
    free_cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(runner.slots):
        free_cores.put(cores[number % len(cores)])

    def execute(study: Path, job: dict[str, Any]) -> int:
        core = free_cores.get()
        try:
            # A run with several threads is not bound to one core.
            return run_in_subprocess(
                study, job | {"core": core if runner.threads == 1 else None}, interrupted
            )
        finally:
            free_cores.put(core)

    yield execute, runner.slots
