"""A new run, or an old one that goes on, made ready for the loop and seen to its end.

Text is found and tokenised, the number of steps is fixed, the folder is locked and created, the plan is told; then
training.py runs, whatever happens gets a last line in metrics.jsonl, and the report is written.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glasslm import checkpoint, corpora, display, estimate, files, provenance, runs, tokens
from glasslm.checkpoint import Progress
from glasslm.config import ComputeConfig, RunConfig, seconds, to_dict, with_flags
from glasslm.engines import Batch, Engine, make_engine, thread_count
from glasslm.errors import DivergedError, ExhaustedError, InputError
from glasslm.metrics import Line, Log
from glasslm.parameters import count, initial_weights, table
from glasslm.tokens import Dataset
from glasslm.training import Loop, evaluation_windows, make_order

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is that of the last line of metrics.jsonl."""

    run_dir: Path
    status: str
    signal: int | None  # that interrupted it
    best: Line | None  # the eval line of the best validation loss
    sample: str | None
    elapsed_s: float


def train(
    config: RunConfig,
    compute: ComputeConfig,
    run_dir: Path | None = None,
    *,
    preset: str = "tiny",
    say: Say | None = None,
) -> Outcome:
    """Train a new model; `say` takes what is worth a line before the display begins (default: standard error)."""
    started = time.perf_counter()
    say = say or _say
    config = config.resolved()
    if run_dir is not None:
        runs.require_new(run_dir)
    source = corpora.find(config.data, say)
    dataset = tokens.prepare(config.data, source, say)
    tokens.require_room(dataset, config.model.block_size, config.train.batch_size)
    run_dir = run_dir or runs.RUNS / runs.default_name(source.name, preset)
    vocab_size = dataset.tokenizer.vocab_size
    engine = make_engine(config, vocab_size, compute)
    seed = config.train.seed
    rows = table(config.model, vocab_size)
    engine.load(initial_weights(rows, seed))
    per_step = seconds_per_step(config, engine, dataset)
    engine.load(initial_weights(rows, seed))
    config = with_steps(config, dataset, per_step, time.perf_counter() - started)
    if config.data.corpus is None and not config.data.text_file:  # which of the two defaults it was is remembered
        config = with_flags(config, {"corpus": source.name})
    with files.lock(run_dir):
        runs.create(
            run_dir,
            {"preset": preset} | _record(config, compute, dataset, engine, vocab_size),
            dataset.tokenizer.to_json(),
        )
        plan = _plan(config, compute, dataset, engine, per_step, started) | {
            "preset": preset, "corpus": source.name, "run_dir": str(run_dir),
        }  # fmt: skip
        say(display.plan_text(plan))
        hashes = _hashes(runs.config_sha256(to_dict(config)), dataset)
        return _to_the_end(run_dir, config, engine, dataset, hashes, None, started)


def resume(run_dir: Path, compute: ComputeConfig, say: Say | None = None) -> Outcome:
    """Go on from the latest checkpoint that is whole. Raises InputError when the run is finished."""
    started = time.perf_counter()
    say = say or _say
    run = runs.Run(run_dir)
    with files.lock(run_dir):
        latest = checkpoint.load(run_dir, "latest", say)
        history = run.history
        ended = history.status in ("finished", "stopped")
        if ended and latest.step == max(history.eval_steps):  # else its last checkpoint is lost, and made again
            raise InputError(
                f"{run_dir} is {history.status} at step {latest.step}: there is nothing left to do. Train a new run "
                "with more --max-steps, or use this one by `glasslm generate`"
            )
        if compute.precision == "auto":
            compute = dataclasses.replace(compute, precision=run.record["precision"])
        dataset = tokens.reopen(run.record["data"]["sha256"])
        if dataset is None:
            dataset = tokens.prepare(run.config.data, corpora.find(run.config.data, say), say, run.tokenizer)
        hashes = _hashes(run.config_sha256, dataset)
        checkpoint.check(latest, **hashes)
        engine = make_engine(run.config, run.tokenizer.vocab_size, compute)
        engine.load(latest.state(), latest.progress.updates)
        say(f"resuming {run_dir} at step {latest.step:,} of {run.config.train.max_steps:,}")
        return _to_the_end(run_dir, run.config, engine, dataset, hashes, latest.progress, started)


def _to_the_end(
    run_dir: Path,
    config: RunConfig,
    engine: Engine,
    dataset: Dataset,
    hashes: dict[str, str],
    progress: Progress | None,
    started: float,
) -> Outcome:
    """The loop inside its log and display, and the last line whatever happens."""
    log = Log(run_dir / "metrics.jsonl", progress.metrics_bytes if progress else 0)
    past = list(runs.Run(run_dir).metrics())
    sample = [line["text"] for line in past if line["kind"] == "sample"][-1:]
    with log, display.Display(config.train.max_steps, run_dir.name, past) as shown:

        def write(line: Line) -> None:
            log.write(line)
            shown.show(line)
            if line["kind"] == "sample":
                sample[:] = [line["text"]]

        loop = Loop(config, engine, dataset, run_dir, hashes, write, lambda: log.bytes, shown.tick, progress)
        if progress:
            write({"kind": "resume", "step": progress.step, "from": f"checkpoints/{progress.step:06d}"})
        else:
            write({"kind": "plan", "step": 0, "max_steps": config.train.max_steps})
        status = "failed"
        try:
            status = loop.run()
        except DivergedError as error:
            status = "diverged"
            write({"kind": "warning", "step": loop.step, "code": "nonfinite", "message": str(error)})
        except MemoryError:
            raise ExhaustedError(
                f"out of memory with micro-batches of {config.train.micro_batch_size} x {config.model.block_size}: "
                "lower --micro-batch-size, --block-size or --threads"
            ) from None
        finally:
            best_step, best_loss = loop.best or (None, None)
            write({"kind": "end", "step": loop.step, "status": status, "best_step": best_step, "best_loss": best_loss})
    best = loop.best_line
    if best is None and loop.best is not None:  # it was before the resume
        best = next(line for line in reversed(past) if line["kind"] == "eval" and line["step"] == loop.best.step)
    elapsed = time.perf_counter() - started
    return Outcome(run_dir, status, loop.signal, best, sample[0] if sample else None, elapsed)


def seconds_per_step(config: RunConfig, engine: Engine, dataset: Dataset) -> float:
    """How long a step takes here, measured on as much of the first one as gives an answer soon. Changes the weights."""
    order = make_order(config, len(dataset.train.tokens))
    rows = np.arange(min(config.train.batch_size, 2 * config.train.micro_batch_size))

    def measure() -> float:
        batch = Batch(*order.batch(dataset.train.tokens, 0, rows), 0, rows)
        begin = time.perf_counter()
        engine.accumulate(batch, 1 / batch.targets.size)
        middle = time.perf_counter()
        engine.update(config.optimizer.lr)
        scale = config.train.batch_size / len(rows)
        return (middle - begin) * scale + time.perf_counter() - middle

    return min(measure() for _ in range(3))  # the first also takes the memory


def with_steps(config: RunConfig, dataset: Dataset, per_step: float, spent: float) -> RunConfig:
    """The config with max_steps fixed, where epochs or max_time were asked for."""
    train = config.train
    if train.epochs is not None:
        steps = make_order(config, len(dataset.train.tokens)).steps_for(train.epochs)
    elif train.max_time is not None:
        evaluation = _evaluation_seconds(config, dataset, per_step)
        each = per_step + evaluation / train.eval_interval
        steps = max(1, int((seconds(train.max_time) - spent - 2 * evaluation) / each))
    else:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(train, max_steps=steps))


def _evaluation_seconds(config: RunConfig, dataset: Dataset, per_step: float) -> float:
    """A forward pass over the validation windows costs a third of as many training windows."""
    windows = evaluation_windows(config, len(dataset.val.tokens)) or len(dataset.val.tokens) / config.model.block_size
    return per_step * windows / config.train.batch_size / 3


def _hashes(config_sha256: str, dataset: Dataset) -> dict[str, str]:
    return {
        "config_sha256": config_sha256,
        "tokenizer_sha256": dataset.tokenizer.sha256,
        "data_sha256": dataset.sha256,
    }


def _record(
    config: RunConfig, compute: ComputeConfig, dataset: Dataset, engine: Engine, vocab_size: int
) -> dict[str, Any]:
    """run.json without its format."""
    tokenizer = dataset.tokenizer
    return {
        "glasslm": provenance.versions()["glasslm"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "seed": config.train.seed,
        "config": to_dict(config),
        "engine": engine.name,
        "device": "cpu",
        "precision": "fp64" if compute.precision == "fp64" else "fp32",
        "parameters": count(table(config.model, vocab_size)),
        "flops_per_token": estimate.flops_per_token(config.model, vocab_size),
        "data": dataset.facts,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "git": provenance.git(),
    }


def _plan(
    config: RunConfig, compute: ComputeConfig, dataset: Dataset, engine: Engine, per_step: float, started: float
) -> dict[str, Any]:
    """What display.plan_text tells before the first step."""
    train, vocab_size = config.train, dataset.tokenizer.vocab_size
    batch_tokens = train.batch_size * config.model.block_size
    total = train.max_steps * batch_tokens
    evaluations = train.max_steps // train.eval_interval + 2
    threads = thread_count(compute.threads)
    spent = time.perf_counter() - started
    return {
        "parameters": count(table(config.model, vocab_size)),
        "vocab_size": vocab_size,
        "train_tokens": len(dataset.train.tokens),
        "val_tokens": len(dataset.val.tokens),
        "batch_tokens": batch_tokens,
        "max_steps": train.max_steps,
        "total_tokens": total,
        "epochs": total / len(dataset.train.tokens),
        "flops": total * estimate.flops_per_token(config.model, vocab_size),
        "memory_bytes": estimate.memory_bytes(config, vocab_size, threads),
        "seconds": spent + train.max_steps * per_step + evaluations * _evaluation_seconds(config, dataset, per_step),
        "engine": engine.name,
        "threads": threads,
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
