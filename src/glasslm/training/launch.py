"""Start a new run or resume one: everything around the training loop.

The text is opened and tokenized, the number of steps is fixed, the run folder is locked and
created, the plan is shown; then loop.py trains. The last line of metrics.jsonl says how the run
ended. Callers write the report.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration
from glasslm.data.dataset import Dataset, Split
from glasslm.engines.choice import compute_from_record
from glasslm.engines.factory import make_engine
from glasslm.engines.operations import admit_operations
from glasslm.engines.protocol import Engine
from glasslm.engines.resources import count_ranks
from glasslm.errors import DamagedError, DivergedError, InputError
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.blas import warn_of_slow_kernel
from glasslm.runs.checkpoint import TrainingPosition
from glasslm.runs.metrics import COMPLETED_STATUSES, Line, MetricsLog, Status
from glasslm.runs.protection import require_unaltered_log
from glasslm.runs.record import ComputeRecord, build_record, text_name
from glasslm.runs.recorded_operations import admit_run_operations
from glasslm.runs.run_folder import Run
from glasslm.runs.run_lock import lock_run
from glasslm.text import Notify, notify
from glasslm.training import trackers
from glasslm.training.display import Display
from glasslm.training.engine_preparation import choose_compute, prepare_engine
from glasslm.training.fine_tuning import BaseRun
from glasslm.training.loop import Loop
from glasslm.training.memory import explain_out_of_memory
from glasslm.training.outcome import Outcome, make_outcome
from glasslm.training.plan import format_plan, make_plan
from glasslm.training.preference.opening import with_pairs_hash
from glasslm.training.preparation import Preparation
from glasslm.training.run_inputs import RunInputs, open_run_inputs, with_absolute_paths
from glasslm.training.step_timer import RunLength
from glasslm.training.time_limit import TimeLimit


@dataclass(frozen=True)
class RunSetup:
    """A run, and what its loop trains with."""

    run: Run
    engine: Engine  # with the weights of `position`, or the first ones
    dataset: Dataset
    display: Display
    old_text: Split | None  # of the base run, to measure forgetting
    position: TrainingPosition | None = None  # of the checkpoint that a resumed run continues from
    limit: TimeLimit | None = None


def train(
    config: RunConfig,
    compute: ComputeConfig,
    run_dir: Path | None = None,
    *,
    preset: str = "tiny",
    command: str = "",
    dataset: Dataset | None = None,
    stop_at: int | None = None,
    track: str = "",
    final_windows: int | Literal["auto"] | None = "auto",
    notify: Notify = notify,
) -> Outcome:
    """Train a new model.

    `preset` and `command` (what the user wrote) are only recorded. With `dataset`, the text that
    the config names is not opened. The run is interrupted after step `stop_at`, as by Ctrl-C.
    `track` names trackers: wandb, tensorboard, or both with a comma. `final_windows` is the number
    of validation windows of the final measurement (None: the whole split). `notify` receives the
    messages before and after the display.
    """
    preparation = Preparation(time.perf_counter(), config.train)
    tracker_names = trackers.parse_trackers(track)
    config = with_absolute_paths(config.resolve())
    if run_dir is not None:
        run_folder.require_new(run_dir)
    config = with_pairs_hash(admit_operations(config))
    inputs = open_run_inputs(config, notify, dataset)
    inputs = inputs.with_old_text(config.model.block_size, notify)
    preparation.end_stage("reading the text")
    config = inputs.complete(config)
    corpus = inputs.source.name if inputs.source else text_name(config.data)
    if not config.data.has_source:  # run.json names the corpus that was the default
        config = with_flags(config, {"corpus": corpus})
    run_dir = run_dir or run_folder.RUNS / run_folder.default_name(corpus, preset)
    engine, compute, length, reasons = prepare_engine(
        config, compute, inputs, preparation, final_windows, notify
    )
    expected_s = preparation.spent_s + length.seconds
    limit = _start_limit(length, preparation.started)
    display = Display(length.config.train.max_steps, run_dir.name)  # no run without its display
    with lock_run(run_dir):
        run = _create_run(run_dir, length, compute, inputs, engine, preset=preset, command=command)
        plan = make_plan(run, inputs.dataset, engine, compute, expected_s, corpus, reasons)
        notify(format_plan(plan))
        plan_line: Line = {"kind": "plan", "step": 0, "max_steps": plan.max_steps}
        with _delete_if_interrupted(run_dir):
            return _run_loop(
                RunSetup(run, engine, inputs.dataset, display, inputs.old_text, limit=limit),
                first_lines=[plan_line, *inputs.warnings],
                started=preparation.started,
                notify=notify,
                tracker_names=tracker_names,
                stop_at=stop_at,
            )


@contextmanager
def _delete_if_interrupted(run_dir: Path) -> Iterator[None]:
    """Delete a new run that is interrupted before its loop, which saves and returns instead."""
    try:
        yield
    except KeyboardInterrupt:
        if not checkpoint.list_steps(run_dir):
            run_folder.delete_run(run_dir)
        raise


def resume(
    run_dir: Path,
    compute: ComputeConfig,
    notify: Notify = notify,
    *,
    track: str = "",
    ops: str = "",
) -> Outcome:
    """Continue a run from its latest valid checkpoint. Raises InputError for a finished run.

    `ops` is the file of operations that the run was trained with, or "recorded".
    """
    started = time.perf_counter()
    tracker_names = trackers.parse_trackers(track)
    run = Run(run_dir)
    if ops and not run.config.operations.ops:
        raise InputError(f"{run_dir} was trained without --ops: leave it out")
    admit_run_operations(run, ops, notify)
    with lock_run(run_dir):
        notify("reading the checkpoint and the text")
        latest = checkpoint.load(run_dir, "latest", notify)
        checkpoint.require_identity(latest, run.identity)
        history = run.history
        has_ended = history.status in COMPLETED_STATUSES
        if has_ended:  # otherwise the log is cut to the checkpoint, which MetricsLog compares
            require_unaltered_log(run, [latest])
        # a lost last checkpoint is made again
        if has_ended and latest.step == max(history.eval_steps, default=0):
            flag = "--max-time" if history.status == "time" else "--max-steps"
            raise InputError(
                f"{run_dir} ended at step {latest.step} (status '{history.status}'): there is "
                f"nothing left to do. Train a new run with more {flag}, or use this one with "
                "`glasslm generate`"
            )
        compute, notes = compute_from_record(compute, run.record)
        for note in notes:
            notify(f"note: {note}")
        compute, _ = choose_compute(run.config, run.tokenizer.vocab_size, compute)
        warn_of_slow_kernel(compute, notify)
        dataset = run.dataset(notify)
        notify(f"starting the {compute.engine} engine")
        with explain_out_of_memory(run.config, compute.engine):
            engine = make_engine(run.config, run.tokenizer.vocab_size, compute, training=True)
            engine.load(latest.state(), latest.position.updates, latest.position.loss_scale)
        notify(f"resuming {run_dir} at step {latest.step:,} of {run.config.train.max_steps:,}")
        resume_line: Line = {
            "kind": "resume",
            "step": latest.step,
            "from": f"checkpoints/{latest.step:06d}",
        }
        display = Display(run.config.train.max_steps, run_dir.name)
        checkpoint.remove_after(run_dir, latest.step)
        return _run_loop(
            RunSetup(run, engine, dataset, display, _reopen_old_text(run, notify), latest.position),
            first_lines=[resume_line],
            started=started,
            notify=notify,
            tracker_names=tracker_names,
        )


def _reopen_old_text(run: Run, notify: Notify) -> Split | None:
    """The text of the run that fine-tuning started from; None, with a note, where it is gone."""
    source = run.record.get("base")
    if source is None:
        return None
    try:
        base = BaseRun(source["run"])
        if base.run.record["data"]["sha256"] != source["data_sha256"]:
            raise DamagedError(f"{base.run.path} now holds another run")
        return base.old_text(run.config.model.block_size, notify)
    except (DamagedError, InputError) as error:
        notify(f"note: forgetting of the old text is no longer measured: {error}")
        return None


def _start_limit(length: RunLength, started: float) -> TimeLimit | None:
    """The limit of a run whose length was fixed by --max-time."""
    train = length.config.train
    if train.max_time is None or train.epochs is not None:
        return None
    return TimeLimit(length.timer, started, parse_duration(train.max_time))


def _create_run(
    run_dir: Path,
    length: RunLength,
    compute: ComputeConfig,
    inputs: RunInputs,
    engine: Engine,
    *,
    preset: str,
    command: str,
) -> Run:
    """Create the run folder with run.json and the tokenizer.

    base/ has the frozen weights under adapters, or the first weights of preference tuning.
    """
    dataset, base = inputs.dataset, inputs.base
    computed_by: ComputeRecord = {
        "engine": engine.name,
        "device": engine.device,
        "precision": engine.precision,
        "compiled": engine.compiled,
        "threads": compute.threads,
        "processes": count_ranks(),
        "parallel": compute.parallel,
        "deterministic": compute.deterministic,
    }
    config = length.config
    record = build_record(
        config, dataset.tokenizer, dataset.facts, computed_by, preset=preset, command=command
    )
    if length.final_windows is not None:
        record["final_windows"] = length.final_windows
    if base:
        record["base"] = base.source
        settings = base.run.record["tokenizer"].get("transformers")
        if settings := inputs.chat.settings if inputs.chat else settings:
            record["tokenizer"]["transformers"] = settings
    run_folder.create_run(run_dir, record, dataset.tokenizer.to_json())
    if base and (config.model.lora_rank or config.preference.is_active):
        checkpoint.save_base(run_dir, base.weights_for(dataset.tokenizer, config.train.seed))
    return Run(run_dir)


def _run_loop(
    setup: RunSetup,
    *,
    first_lines: Sequence[Line],
    started: float,
    notify: Notify,
    tracker_names: tuple[str, ...],
    stop_at: int | None = None,
) -> Outcome:
    """Run the loop inside its log, display and trackers; the log always ends with an `end` line."""
    run, engine, position = setup.run, setup.engine, setup.position
    log = MetricsLog(run.path / "metrics.jsonl", *(position.metrics_position if position else ()))
    setup.display.show_earlier(run.metrics())
    with (
        trackers.track_run(tracker_names, run, position, notify) as interrupt,
        log,
        setup.display,
    ):
        loop = Loop(
            run, engine, setup.dataset, log, setup.display, position, setup.old_text, setup.limit
        )
        for line in first_lines:
            loop.log(line)
        status: Status = "failed"
        try:
            with explain_out_of_memory(run.config, engine.name):
                status = loop.run(loop.step if interrupt.is_set() else stop_at)
        except DivergedError as error:
            status = "diverged"
            loop.warn("diverged", str(error))
        finally:
            best_step, best_loss = loop.best or (None, None)
            loop.log(
                {
                    "kind": "end",
                    "step": loop.step,
                    "status": status,
                    "best_step": best_step,
                    "best_loss": best_loss,
                }
            )
    elapsed_s = time.perf_counter() - started
    signal_number = loop.signal or interrupt.received
    return make_outcome(run, status, signal_number, elapsed_s, loop.limit.samples_s())
