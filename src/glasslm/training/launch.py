"""Start a new run or resume one: everything around the training loop.

The text is opened and tokenized, the number of steps is fixed, the run folder is locked and
created, the plan is shown; then loop.py trains. The last line of metrics.jsonl says how the run
ended. Callers write the report.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.dataset import Dataset, prepare_dataset, require_enough_tokens
from glasslm.data.sources import corpora
from glasslm.data.sources.files import Source
from glasslm.engines import memory_estimate
from glasslm.engines.choice import choose_engine, compute_from_record, count_ranks, thread_count
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.errors import DamagedError, DivergedError, GlasslmError, InputError
from glasslm.model import flops
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint import Progress
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import (
    COMPLETED_STATUSES,
    EvalLine,
    Line,
    MetricsLog,
    SampleLine,
    Status,
    sample_lines,
)
from glasslm.runs.record import ComputeRecord, build_record, text_name
from glasslm.runs.run_folder import Run
from glasslm.runs.run_lock import lock_run
from glasslm.text import Notify, notify
from glasslm.training import display, step_timer, trackers
from glasslm.training.fine_tuning import Base
from glasslm.training.loop import Loop
from glasslm.training.memory import explain_out_of_memory, warn_of_shortage


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is that of the last line of metrics.jsonl."""

    run_dir: Path
    status: Status
    signal: int | None  # the signal that interrupted the run
    best: EvalLine | None  # the evaluation with the best validation loss
    sample: SampleLine | None  # the last sample
    elapsed_s: float  # seconds

    @property
    def exit_code(self) -> int:
        """The exit code of a process that only trained."""
        return {"diverged": 3, "interrupted": 128 + (self.signal or signal.SIGINT)}.get(
            self.status, 0
        )


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
    notify: Notify = notify,
) -> Outcome:
    """Train a new model.

    `preset` and `command` (what the user wrote) are only recorded. With `dataset`, the text that
    the config names is not opened. The run is interrupted after step `stop_at`, as by Ctrl-C.
    `track` names trackers: wandb, tensorboard, or both with a comma. `notify` receives the messages
    before and after the display.
    """
    started = time.perf_counter()
    tracker_names = trackers.parse_trackers(track)
    config = config.resolve()
    if run_dir is not None:
        run_folder.require_new(run_dir)
    base = Base(config.train.init_from) if config.train.init_from else None
    if base:
        base.require_fit(config)
    elif config.model.lora_rank:
        raise InputError(
            "LoRA adapters need trained weights to adapt: give --init-from RUN, or use "
            "`glasslm finetune RUN`"
        )
    source = None if dataset else corpora.find_source(config.data, notify)
    if source:
        dataset = prepare_dataset(config.data, source, notify, base.run.tokenizer if base else None)
    assert dataset is not None
    corpus = source.name if source else text_name(config.data)
    require_enough_tokens(dataset, config.model.block_size, config.train.batch_size)
    if not config.data.has_source:  # run.json names the corpus that was the default
        config = with_flags(config, {"corpus": corpus})
    run_dir = run_dir or run_folder.RUNS / run_folder.default_name(corpus, preset)
    compute, why = _choose_compute(config, dataset.tokenizer.vocab_size, compute)
    warn_of_shortage(config, dataset.tokenizer.vocab_size, compute, notify)
    with explain_out_of_memory(config, compute.engine):
        engine, config, expected_s = _prepare_engine(config, compute, dataset, base, started, why)
    with lock_run(run_dir):
        _create_run(run_dir, config, compute, dataset, engine, base, preset, command)
        plan = _plan(config, compute, dataset, engine)
        plan |= {"preset": preset, "corpus": corpus, "run_dir": str(run_dir)}
        plan |= {"seconds": expected_s, "why": why}
        notify(display.plan_text(plan))
        plan_line: Line = {"kind": "plan", "step": 0, "max_steps": config.train.max_steps}
        first_lines = [plan_line, *_fallback_warning(source)]
        return _run_loop(
            Run(run_dir), engine, dataset, first_lines, None, base, started, notify, tracker_names,
            stop_at,
        )  # fmt: skip


def resume(
    run_dir: Path, compute: ComputeConfig, notify: Notify = notify, *, track: str = ""
) -> Outcome:
    """Continue a run from its latest valid checkpoint. Raises InputError for a finished run."""
    started = time.perf_counter()
    tracker_names = trackers.parse_trackers(track)
    run = Run(run_dir)
    with lock_run(run_dir):
        latest = checkpoint.load(run_dir, "latest", notify)
        history = run.history
        has_ended = history.status in COMPLETED_STATUSES
        # a lost last checkpoint is made again
        if has_ended and latest.step == max(history.eval_steps, default=0):
            raise InputError(
                f"{run_dir} is {history.status} at step {latest.step}: there is nothing left to "
                "do. Train a new run with more --max-steps, or use this one with `glasslm generate`"
            )
        compute, notes = compute_from_record(compute, run.record)
        for note in notes:
            notify(f"note: {note}")
        compute, _ = _choose_compute(run.config, run.tokenizer.vocab_size, compute)
        dataset = run.dataset(notify)
        checkpoint.require_identity(latest, run.identity)
        with explain_out_of_memory(run.config, compute.engine):
            engine = make_engine(run.config, run.tokenizer.vocab_size, compute, training=True)
            engine.load(latest.state(), latest.progress.updates, latest.progress.loss_scale)
        notify(f"resuming {run_dir} at step {latest.step:,} of {run.config.train.max_steps:,}")
        resume_line: Line = {
            "kind": "resume",
            "step": latest.step,
            "from": f"checkpoints/{latest.step:06d}",
        }
        base = _reopen_base(run, notify)
        return _run_loop(
            run, engine, dataset, [resume_line], latest.progress, base, started, notify,
            tracker_names,
        )  # fmt: skip


def _reopen_base(run: Run, notify: Notify) -> Base | None:
    """The run that fine-tuning started from; None, with a note, where it is gone."""
    source = run.record.get("base")
    if source is None:
        return None
    try:
        base = Base(source["run"])
        if base.run.record["data"]["sha256"] != source["data_sha256"]:
            raise DamagedError(f"{base.run.path} now holds another run")
        return base
    except GlasslmError as error:
        notify(f"note: forgetting of the old text is no longer measured: {error}")
        return None


def _choose_compute(
    config: RunConfig, vocab_size: int, compute: ComputeConfig
) -> tuple[ComputeConfig, list[str]]:
    """`compute` with engine, device, precision and threads chosen, and the reasons to show."""
    parameters = parameter_table(config.model, vocab_size).total
    is_automatic = compute.engine == "auto"
    compute, reason = choose_engine(compute, parameters, training=True)
    compute = dataclasses.replace(compute, threads=thread_count(compute.threads))
    reasons = [f"engine: {compute.engine} ({reason})"] if is_automatic and reason else []
    return compute, reasons


def _prepare_engine(
    config: RunConfig,
    compute: ComputeConfig,
    dataset: Dataset,
    base: Base | None,
    started: float,
    why: list[str],
) -> tuple[Engine, RunConfig, float]:
    """The engine with its first weights, the config with its step count, the expected seconds."""
    vocab_size = dataset.tokenizer.vocab_size
    table, seed = parameter_table(config.model, vocab_size), config.train.seed

    def first_weights() -> Iterator[tuple[str, Any]]:
        return base.first_weights(config) if base else initial_weights(table, seed)

    def make_and_time(compute: ComputeConfig) -> tuple[Engine, RunConfig, float]:
        engine = make_engine(config, vocab_size, compute, training=True)
        engine.load(first_weights())
        timer = step_timer.time_steps(config, engine, dataset)
        engine.load(first_weights())  # timing has changed them
        elapsed = time.perf_counter() - started
        timed_config = step_timer.with_steps(config, dataset, timer, elapsed)
        run_s = step_timer.run_seconds(timed_config, dataset, timer)
        return engine, timed_config, elapsed + run_s

    engine, timed_config, expected_s = make_and_time(compute)
    if step_timer.should_compile(compute, expected_s):
        why.append("compiled: the run is long enough to repay the compilation")
        del engine  # memory may not hold two
        engine, timed_config, expected_s = make_and_time(dataclasses.replace(compute, compile="on"))
    return engine, timed_config, expected_s


def _create_run(
    run_dir: Path,
    config: RunConfig,
    compute: ComputeConfig,
    dataset: Dataset,
    engine: Engine,
    base: Base | None,
    preset: str,
    command: str,
) -> None:
    """Create the run folder with run.json, the tokenizer and, with LoRA, the frozen weights."""
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
    record = build_record(
        config, dataset.tokenizer, dataset.facts, computed_by, preset=preset, command=command
    )
    if base:
        record["base"] = base.source
    run_folder.create_run(run_dir, record, dataset.tokenizer.to_json())
    if base and config.model.lora_rank:
        checkpoint.save_base(run_dir, base.weights())


def _run_loop(
    run: Run,
    engine: Engine,
    dataset: Dataset,
    first_lines: Sequence[Line],
    progress: Progress | None,
    base: Base | None,
    started: float,
    notify: Notify,
    tracker_names: tuple[str, ...],
    stop_at: int | None = None,
) -> Outcome:
    """Run the loop inside its log, display and trackers; the log always ends with an `end` line."""
    old_text = base.old_text(notify) if base else None
    log = MetricsLog(run.path / "metrics.jsonl", progress.metrics_bytes if progress else 0)
    past = list(run.metrics())
    with (
        trackers.track_run(tracker_names, run, progress, notify) as interrupted,
        log,
        display.Display(run.config.train.max_steps, run.path.name, past=past) as shown,
    ):
        loop = Loop(run, engine, dataset, log, shown, progress, old_text)
        for line in first_lines:
            loop.log(line)
        status: Status = "failed"
        try:
            with explain_out_of_memory(run.config, engine.name):
                status = loop.run(loop.step if interrupted.is_set() else stop_at)
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
    lines = list(run.metrics())
    return Outcome(
        run_dir=run.path,
        status=status,
        signal=loop.signal or interrupted.received,
        best=best_eval(lines, run.history),
        sample=next(reversed(sample_lines(lines)), None),
        elapsed_s=elapsed_s,
    )


def _fallback_warning(source: Source | None) -> list[Line]:
    """The warning that another corpus took the place of the default one."""
    if source is None or not source.fallback:
        return []
    message = f"Shakespeare could not be downloaded: training on the corpus '{source.name}' instead"
    return [{"kind": "warning", "step": 0, "code": "fallback", "message": message}]


def _plan(
    config: RunConfig, compute: ComputeConfig, dataset: Dataset, engine: Engine
) -> dict[str, Any]:
    """The entries of display.plan_text that follow from config, data and engine."""
    train, vocab_size = config.train, dataset.tokenizer.vocab_size
    batch_tokens = train.batch_size * config.model.block_size
    total = train.max_steps * batch_tokens
    return {
        "parameters": parameter_table(config.model, vocab_size).counts(),
        "vocab_size": vocab_size,
        "train_tokens": len(dataset.train.tokens),
        "val_tokens": len(dataset.val.tokens),
        "batch_tokens": batch_tokens,
        "max_steps": train.max_steps,
        "total_tokens": total,
        "epochs": total / len(dataset.train.tokens),
        "flops": total * flops.flops_per_token(config.model, vocab_size),
        "memory_bytes": memory_estimate.training_bytes(
            config, vocab_size, compute, engine.micro_batch_size
        ),
        "engine": engine.name,
        "device": engine.device,
        "precision": engine.precision,
        "threads": compute.threads if engine.device == "cpu" else None,
        "processes": count_ranks() if count_ranks() > 1 else None,
    }
