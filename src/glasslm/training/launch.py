"""A new run, or an old one that goes on, made ready for the loop and seen to its end.

Text is found and tokenised, the number of steps is fixed, the folder is locked and created, the plan is told; then
training.py runs, whatever happens gets a last line in metrics.jsonl, and the report is written.
"""

from __future__ import annotations

import dataclasses
import datetime
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.config.conversion import to_dict, with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data import shards
from glasslm.data.shards import Dataset
from glasslm.data.sources import corpora
from glasslm.data.sources.files import Source
from glasslm.engines import memory_estimate
from glasslm.engines.choice import as_recorded, choose, ranks, thread_count
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.errors import DamagedError, DivergedError, GlasslmError, InputError
from glasslm.model import flops
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, provenance, run_folder
from glasslm.runs.checkpoint import Progress
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import Line, Log
from glasslm.runs.record import text_name
from glasslm.runs.run_folder import Run
from glasslm.text import Say, tell
from glasslm.training import display, step_timer, trackers
from glasslm.training.fine_tuning import Base
from glasslm.training.loop import Loop, hashes
from glasslm.training.memory import enough_memory, warn_of_shortage


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is that of the last line of metrics.jsonl."""

    run_dir: Path
    status: str
    signal: int | None  # that interrupted it
    best: Line | None  # the eval line of the best validation loss
    sample: Line | None  # the last one
    elapsed_s: float

    @property
    def exit_code(self) -> int:
        """What a process that did nothing else ends with."""
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
    say: Say = tell,
) -> Outcome:
    """Train a new model; `say` takes what is worth a line before the display begins, and after its end.

    `preset` and `command` (what the user wrote) are only recorded. A `dataset` stands for the text that the config
    names, which is not looked for then. The run is interrupted after the step `stop_at`, as Ctrl-C would do it.
    `track` names trackers: wandb, tensorboard, or both with a comma.
    """
    started = time.perf_counter()
    followers = trackers.named(track)
    config = config.resolved()
    if run_dir is not None:
        run_folder.require_new(run_dir)
    base = Base(config.train.init_from) if config.train.init_from else None
    if base:
        base.require_fit(config)
    elif config.model.lora_rank:
        raise InputError(
            "adapters stand beside trained weights: give --init-from RUN, or use `glasslm finetune RUN`"
        )
    source = None if dataset else corpora.find(config.data, say)
    if source:
        dataset = shards.prepare(config.data, source, say, base.run.tokenizer if base else None)
    assert dataset is not None
    text = source.name if source else text_name(config.data)
    shards.require_room(dataset, config.model.block_size, config.train.batch_size)
    if not config.data.chosen:  # which of the two defaults it was is remembered
        config = with_flags(config, {"corpus": text})
    run_dir = run_dir or run_folder.RUNS / run_folder.default_name(text, preset)
    compute, why = _choose(config, dataset.tokenizer.vocab_size, compute)
    warn_of_shortage(config, dataset.tokenizer.vocab_size, compute, say)
    with enough_memory(config, compute.engine):
        engine, config, expected_s = _prepare(config, compute, dataset, base, started, why)
    with files.lock(run_dir):
        record = {"preset": preset, "command": command} | _record(config, compute, dataset, engine)
        if base:
            old = base.run.record["data"]["sha256"]
            record["base"] = {
                "run": str(base.run.path.resolve()),
                "step": base.held.step,
                "data_sha256": old,
            }
        run_folder.create(run_dir, record, dataset.tokenizer.to_json())
        if base and config.model.lora_rank:
            checkpoint.save_base(run_dir, base.weights())
        plan = {
            "preset": preset,
            "corpus": text,
            "run_dir": str(run_dir),
            "seconds": expected_s,
            "why": why,
        }
        say(display.plan_text(plan | _plan(config, compute, dataset, engine)))
        first = [
            {"kind": "plan", "step": 0, "max_steps": config.train.max_steps},
            *_fallback(source),
        ]
        return _to_the_end(
            Run(run_dir), engine, dataset, first, None, base, started, say, followers, stop_at
        )


def resume(run_dir: Path, compute: ComputeConfig, say: Say = tell, *, track: str = "") -> Outcome:
    """Go on from the latest checkpoint that is whole. Raises InputError when the run is finished."""
    started = time.perf_counter()
    followers = trackers.named(track)
    run = Run(run_dir)
    with files.lock(run_dir):
        latest = checkpoint.load(run_dir, "latest", say)
        history = run.history
        ended = history.status in ("finished", "stopped")
        # where its last checkpoint is lost, it is made again
        if ended and latest.step == max(history.eval_steps, default=0):
            raise InputError(
                f"{run_dir} is {history.status} at step {latest.step}: there is nothing left to do. Train a new run "
                "with more --max-steps, or use this one by `glasslm generate`"
            )
        compute, notes = as_recorded(compute, run.record)
        for note in notes:
            say(f"note: {note}")
        compute, _ = _choose(run.config, run.tokenizer.vocab_size, compute)
        dataset = shards.of_run(run.config.data, run.record["data"], run.tokenizer, say)
        checkpoint.check(latest, **hashes(run, dataset))
        with enough_memory(run.config, compute.engine):
            engine = make_engine(run.config, run.tokenizer.vocab_size, compute, training=True)
            engine.load(latest.state(), latest.progress.updates, latest.progress.loss_scale)
        say(f"resuming {run_dir} at step {latest.step:,} of {run.config.train.max_steps:,}")
        first = [{"kind": "resume", "step": latest.step, "from": f"checkpoints/{latest.step:06d}"}]
        base = _base_again(run, say)
        return _to_the_end(
            run, engine, dataset, first, latest.progress, base, started, say, followers
        )


def _base_again(run: Run, say: Say) -> Base | None:
    """The run that this one started from, to see what is forgotten; None, and a word why, where it is gone."""
    if "base" not in run.record:
        return None
    known = run.record["base"]
    try:
        base = Base(known["run"])
        if base.run.record["data"]["sha256"] != known["data_sha256"]:
            raise DamagedError(f"{base.run.path} holds another run by now")
        return base
    except GlasslmError as error:
        say(f"note: what is forgotten is not measured any more: {error}")
        return None


def _choose(
    config: RunConfig, vocab_size: int, compute: ComputeConfig
) -> tuple[ComputeConfig, list[str]]:
    """`compute` with nothing automatic left but compiling, and what there is to say about it."""
    parameters = parameter_table(config.model, vocab_size).total
    automatic = compute.engine == "auto"
    compute, reason = choose(compute, parameters, training=True)
    compute = dataclasses.replace(compute, threads=thread_count(compute.threads))
    return compute, [
        f"the {compute.engine} engine computes, because {reason}"
    ] if automatic and reason else []


def _prepare(
    config: RunConfig,
    compute: ComputeConfig,
    dataset: Dataset,
    base: Base | None,
    started: float,
    why: list[str],
) -> tuple[Engine, RunConfig, float]:
    """The engine with its first weights, the config with its number of steps, and how long all will take (seconds)."""
    vocab_size = dataset.tokenizer.vocab_size
    rows, seed = parameter_table(config.model, vocab_size), config.train.seed

    def first_weights() -> Iterator[tuple[str, Any]]:
        return base.first_weights(config) if base else initial_weights(rows, seed)

    def measured(compute: ComputeConfig) -> tuple[Engine, RunConfig, float]:
        engine = make_engine(config, vocab_size, compute, training=True)
        engine.load(first_weights())
        speed = step_timer.measure(config, engine, dataset)
        engine.load(first_weights())  # measuring changed them
        spent = time.perf_counter() - started
        fixed = step_timer.with_steps(config, dataset, speed, spent)
        return engine, fixed, spent + step_timer.run_seconds(fixed, dataset, speed)

    engine, fixed, expected_s = measured(compute)
    if step_timer.compiling_pays(compute, expected_s):
        why.append("compiled first, because the run is long enough to repay it")
        del engine  # there may be no room for two
        engine, fixed, expected_s = measured(dataclasses.replace(compute, compile="on"))
    return engine, fixed, expected_s


def _to_the_end(
    run: Run,
    engine: Engine,
    dataset: Dataset,
    first: Sequence[Line],
    progress: Progress | None,
    base: Base | None,
    started: float,
    say: Say,
    followers: tuple[str, ...],
    stop_at: int | None = None,
) -> Outcome:
    """The loop inside its log and display, from its first lines to the last one whatever happens."""
    old_text = base.old_text(say) if base else None
    log = Log(run.path / "metrics.jsonl", progress.metrics_bytes if progress else 0)
    with (
        trackers.tracked(followers, run, progress, say) as interrupted,
        log,
        display.Display(
            run.config.train.max_steps, run.path.name, past=list(run.metrics())
        ) as shown,
    ):
        loop = Loop(run, engine, dataset, log, shown, progress, old_text)
        for line in first:
            loop.log(line)
        status = "failed"
        try:
            with enough_memory(run.config, engine.name):
                status = loop.run(loop.step if interrupted.is_set() else stop_at)
        except DivergedError as error:
            status = "diverged"
            loop.warn("diverged", str(error))
        finally:
            best_step, best_loss = loop.best or (None, None)
            end = {
                "kind": "end",
                "step": loop.step,
                "status": status,
                "best_step": best_step,
                "best_loss": best_loss,
            }
            loop.log(end)
    elapsed = time.perf_counter() - started
    lines = list(run.metrics())
    samples = [line for line in lines if line["kind"] == "sample"]
    sample = samples[-1] if samples else None
    return Outcome(
        run.path,
        status,
        loop.signal or interrupted.received,
        best_eval(lines, run.history),
        sample,
        elapsed,
    )


def _fallback(source: Source | None) -> list[Line]:
    """The warning that the text is not the one which was meant."""
    if source is None or not source.fallback:
        return []
    message = f"Shakespeare could not be downloaded: this is the corpus '{source.name}' instead"
    return [{"kind": "warning", "step": 0, "code": "fallback", "message": message}]


def _record(
    config: RunConfig, compute: ComputeConfig, dataset: Dataset, engine: Engine
) -> dict[str, Any]:
    """run.json but for its format and what only the caller knows."""
    tokenizer = dataset.tokenizer
    versions = provenance.versions()
    return {
        "glasslm": versions["glasslm"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": config.train.seed,
        "config": to_dict(config),
        "engine": engine.name,
        "device": engine.device,
        "precision": engine.precision,
        "compiled": engine.compiled,
        "threads": compute.threads,
        "processes": ranks(),
        "parallel": compute.parallel,
        "deterministic": compute.deterministic,
        "parameters": parameter_table(config.model, tokenizer.vocab_size).counts(),
        "flops_per_token": flops.flops_per_token(config.model, tokenizer.vocab_size),
        "data": dataset.facts,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
        },
        "versions": versions,
        "machine": provenance.machine(),
        "git": provenance.git(),
    }


def _plan(
    config: RunConfig, compute: ComputeConfig, dataset: Dataset, engine: Engine
) -> dict[str, Any]:
    """What display.plan_text tells before the first step, but for what only the caller knows."""
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
        "processes": ranks() if ranks() > 1 else None,
    }
