"""Replays one step of a run, and shows its batch row by row and its gradient layer by layer.

Resuming is exact, so a step can be repeated: a copy of the run resumes from the newest checkpoint
before it, skips and rolls back the same steps, and stops before the step.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig
from glasslm.engines.choice import compute_from_record
from glasslm.engines.factory import make_engine
from glasslm.engines.inspection import GRADIENT_PREFIX, backward_names
from glasslm.engines.protocol import NO_TARGET, Batch, Engine
from glasslm.errors import DamagedError, InputError, explain_system_errors
from glasslm.model.parameters import parameter_table
from glasslm.report.findings import HEADER, Finding
from glasslm.report.page import Section
from glasslm.runs import checkpoint
from glasslm.runs.metrics import MetricsLog, StepLine, step_lines
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, format_duration, format_number, plural, to_one_line
from glasslm.training.display import Display
from glasslm.training.loop import Loop
from glasslm.training.loop_state import LoopState

REFERENCE_BATCHES = 4  # before the step; their gradients are the usual ones
# Robust standard deviations (1.4826 x the median distance) above the median of the rows
MAX_ROW_DEVIATIONS = 6.0
MAX_GRADIENT_RATIO = 4.0  # of a layer's gradient norm to its usual one
EXCERPT_CHARS = 60  # of the text of a row
MESSAGE_INTERVAL_S = 5


@dataclass(frozen=True)
class BatchRow:
    """One row of the batch: its loss and its text."""

    index: int
    start: int  # index of its first token in the training tokens
    loss: float  # nats per token, with the weights before the step
    text: str


@dataclass(frozen=True)
class ReplayedStep:
    """A step of a run, computed again."""

    step: int
    resumed_from: int
    loss: float
    grad_norm: float
    logged: StepLine | None  # the run's own line of this step, if there is one
    rows: list[BatchRow]  # by loss, the highest first
    # By layer: the gradient norm of this batch, and the median over the batches before it
    layers: dict[str, tuple[float, float]]
    findings: list[Finding]


def replay_step(run_dir: Path, step: int, compute: ComputeConfig, notify: Notify) -> ReplayedStep:
    """Compute `step` (from 1) of a run again, in a temporary folder.

    The run is only read, and may be in progress. Fields of `compute` that are "auto" are as in the
    run. Raises InputError for a step that the run has not reached, and DamagedError if there is no
    complete checkpoint before it.
    """
    run = Run(run_dir)
    if run.config.preference.is_active:
        raise InputError(
            f"--replay {step}: {run_dir} learned preferences, and a replay shows windows of a "
            "text. Its measures are in metrics.jsonl, under `preference`"
        )
    last = run.length
    if not 1 <= step <= last:
        raise InputError(
            f"--replay {step}: this run has "
            + (f"the steps 1 to {last}" if last else "no step yet")
        )
    saved, state = _load_checkpoint_before(run, step)
    dataset = run.dataset(notify)
    checkpoint.require_identity(saved, run.identity)
    compute, notes = compute_from_record(compute, run.record)
    for note in notes:
        notify(f"note: {note}")
    with tempfile.TemporaryDirectory(
        prefix="glasslm-replay-", ignore_cleanup_errors=True
    ) as folder:
        copy = _copy_resumable_files(run, saved, Path(folder))
        engine = make_engine(run.config, run.tokenizer.vocab_size, compute, training=True)
        engine.load(state, saved.position.updates, saved.position.loss_scale)
        with MetricsLog(copy.path / "metrics.jsonl") as log:
            loop = Loop(
                copy,
                engine,
                dataset,
                log,
                Display(stream=io.StringIO(), live=False),
                saved.position,
            )
            _train_until(loop, step - 1, notify)
            return _inspect_step(run, loop, saved.step)


def _load_checkpoint_before(
    run: Run, step: int
) -> tuple[checkpoint.Checkpoint, list[tuple[str, NDArray[Any]]]]:
    """The newest complete checkpoint before `step`, and its arrays.

    The arrays are read at once, because the run may remove the file.
    """
    earlier_steps = [saved for saved in checkpoint.list_steps(run.path) if saved < step]
    for earlier in reversed(earlier_steps):
        try:
            saved = checkpoint.load(run.path, earlier)
            return saved, list(saved.state())
        except (DamagedError, InputError):
            continue
    raise DamagedError(
        f"{run.path} has no complete checkpoint before step {step}: run `glasslm verify`"
    )


def _copy_resumable_files(run: Run, saved: checkpoint.Checkpoint, folder: Path) -> Run:
    """Copy the files that resuming and rolling back read, and return the copy.

    Only a rollback reads weights: those of the last planned checkpoint, which the run keeps for
    this purpose.
    """
    for name in ("run.json", "tokenizer.json"):
        shutil.copy(run.path / name, folder / name)
    if run.config.train.on_spike != "rollback":
        return Run(folder)
    rollback_step = LoopState.from_json(saved.position.loop).rollback_step
    if rollback_step is None:
        rollback_step = saved.step
    places = [Path(checkpoint.FOLDER, f"{rollback_step:06d}")]
    places += [Path(checkpoint.BASE)] if (run.path / checkpoint.BASE).is_dir() else []
    with explain_system_errors(
        run.path / places[0],
        lambda why: DamagedError(
            f"{run.path / places[0]}, to which a spike would go back, cannot be copied ({why}): "
            "if the run is in progress, try again"
        ),
    ):
        for place in places:  # of files alone: copytree would put all errors into one text
            (folder / place).mkdir(parents=True)
            for file in (run.path / place).iterdir():
                shutil.copy(file, folder / place)
    return Run(folder)


def _train_until(loop: Loop, step: int, notify: Notify) -> None:
    """Train until `step` batches are consumed, with a message of the progress every few seconds."""
    first, began = loop.step, time.monotonic()
    last_message = began
    # A rollback needs the checkpoints, which an evaluation may cause: then every action of a step
    # is repeated.
    rolls_back = loop.config.train.on_spike == "rollback"
    notify(f"from the checkpoint of step {first}: {plural(step - first, 'step')} to repeat")
    while loop.step < step:
        if rolls_back:
            loop.do_step()
        else:  # without rollback nothing but the step itself changes the weights
            loop.judge_step(*loop.advance())
        now = time.monotonic()
        if now - last_message > MESSAGE_INTERVAL_S:
            last_message = now
            left = (now - began) / (loop.step - first) * (step - loop.step)
            notify(f"step {loop.step} of {step}, about {format_duration(left)} left")


def _inspect_step(run: Run, loop: Loop, resumed_from: int) -> ReplayedStep:
    """Measure the next step of the loop, train it, and compare it with the logged one."""
    batch = loop.batch(loop.step)
    n_targets = np.count_nonzero(batch.targets != NO_TARGET, axis=1)
    nats = loop.engine.losses(batch.tokens, batch.targets).sum(1) / n_targets
    starts = loop.sampler.window_starts(loop.step, batch.rows)
    texts = [run.tokenizer.decode(row) for row in batch.tokens]
    rows = [
        BatchRow(*items)
        for items in zip(batch.rows.tolist(), starts.tolist(), nats.tolist(), texts)
    ]
    rows.sort(key=lambda row: -row.loss)
    norms = _layer_gradient_norms(loop.engine, batch, run)
    reference = [
        _layer_gradient_norms(loop.engine, loop.batch(earlier), run)
        for earlier in range(max(0, loop.step - REFERENCE_BATCHES), loop.step)
    ]
    layers = {
        name: (norm, float(np.median([other[name] for other in reference])) if reference else norm)
        for name, norm in norms.items()
    }
    _, losses, update, _ = loop.advance()
    logged = [line for line in step_lines(run.metrics()) if line["step"] == loop.step]
    loss, line = losses.cross_entropy, logged[-1] if logged else None
    findings = [_judge_replayed_loss(loss, line), _judge_rows(rows), _judge_layers(layers)]
    return ReplayedStep(loop.step, resumed_from, loss, update.norm, line, rows, layers, findings)


def _layer_gradient_norms(engine: Engine, batch: Batch, run: Run) -> dict[str, float]:
    """The gradient norms of the embedding, each block, the last norm and the head.

    Dropout is off.
    """
    table = parameter_table(run.config.model, run.tokenizer.vocab_size)
    names = [
        name
        for name in backward_names(run.config.model, table)
        if name.removeprefix(GRADIENT_PREFIX) in table
    ]
    sums: dict[str, Any] = {}
    n_targets = max(1, int(np.count_nonzero(batch.targets != NO_TARGET)))
    for part in batch.split(engine.micro_batch_size):
        # `inspect` takes the mean over the targets of the part.
        share = np.count_nonzero(part.targets != NO_TARGET) / n_targets
        for name, gradient in engine.inspect(part, names).items():
            sums[name] = sums.get(name, 0) + share * gradient.astype(np.float64)
    squares: dict[str, float] = {}
    for name, gradient in sums.items():
        words = name.removeprefix(GRADIENT_PREFIX).split(".")
        layer = ".".join(words[:2]) if words[0] == "blocks" else words[0]
        squares[layer] = squares.get(layer, 0.0) + float(np.vdot(gradient, gradient))
    return {layer: square**0.5 for layer, square in reversed(squares.items())}


def _judge_replayed_loss(loss: float, logged: StepLine | None) -> Finding:
    if logged is None:
        return Finding(
            "replay",
            "ok",
            "the run logged no line for this step",
            "the replayed loss cannot be compared",
        )
    if loss == logged["loss"] or (logged["loss"] is None and not math.isfinite(loss)):
        return Finding(
            "replay",
            "ok",
            f"loss {format_number(loss, '.6f')}, as logged, to the bit",
            "the replay is exact",
        )
    evidence = f"loss {format_number(loss, '.6f')}, logged {format_number(logged['loss'], '.6f')}"
    meaning = (
        "another machine, engine or number of threads computed the run: the replay is only close "
        "to that step"
    )
    advice = "for an exact replay use the machine, engine and number of threads of the run"
    return Finding("replay", "watch", evidence, meaning, advice)


def _judge_rows(rows: Sequence[BatchRow]) -> Finding:
    losses = np.array([row.loss for row in rows])
    finite = losses[np.isfinite(losses)]
    middle = float(np.median(finite)) if len(finite) else np.nan
    spread = 1.4826 * float(np.median(np.abs(finite - middle))) if len(finite) else np.nan
    outside = [
        row
        for row in rows
        if not row.loss <= middle + max(MAX_ROW_DEVIATIONS * spread, 0.05 * middle)
    ]
    if not outside:
        evidence = (
            f"all {len(rows)} rows lie between {losses.min():.3f} and {losses.max():.3f} nats, "
            f"median {middle:.3f}"
        )
        return Finding(
            "rows",
            "ok",
            evidence,
            "no row has an unusual loss: if the step spiked, look at the weights or the rate",
        )
    numbers = ", ".join(f"{row.index} ({row.loss:.3f})" for row in outside[:5])
    meaning = "these texts differ from the others: damaged, in another language, or repetitive"
    advice = "look at the text below; clean the corpus, or train with --on-spike skip"
    return Finding(
        "rows",
        "bad",
        f"{len(outside)} of {len(rows)} rows lie far above the median of {middle:.3f}: {numbers}",
        meaning,
        advice,
    )


def _judge_layers(layers: dict[str, tuple[float, float]]) -> Finding:
    ratios = {name: norm / usual for name, (norm, usual) in layers.items() if usual > 0}
    if not ratios:
        return Finding(
            "gradients",
            "watch",
            "the batches before this step have no gradient",
            "this step cannot be compared",
            "",
        )
    name = max(ratios, key=ratios.__getitem__)
    evidence = f"largest in {name}: {ratios[name]:.2g} times that of the batches before"
    if ratios[name] <= MAX_GRADIENT_RATIO:
        return Finding("gradients", "ok", evidence, "the gradients have an ordinary size")
    return Finding(
        "gradients",
        "bad",
        evidence,
        "one batch changes the weights much",
        "lower --grad-clip, or train with --on-spike skip",
    )


def format_replay(replayed: ReplayedStep) -> str:
    """The replayed step as text for a terminal."""
    loss, norm = format_number(replayed.loss, ".4f"), format_number(replayed.grad_norm, ".4g")
    lines = [
        f"step {replayed.step}, replayed from step {replayed.resumed_from}: loss {loss}, norm "
        f"{norm}"
    ]
    for finding in replayed.findings:
        lines.append(
            f"  {finding.verdict:<6} {finding.signal:<10} {finding.evidence}: {finding.meaning}"
        )
        if finding.advice:
            lines.append(f"  {'':<17} {finding.advice}")
    lines += ["", "   row       loss  at token  text"]
    for row in replayed.rows[:10]:
        lines.append(
            f"  {row.index:>4}  {row.loss:9.4f}  {row.start:>8,}  "
            f"{to_one_line(row.text)[:EXCERPT_CHARS]}"
        )
    lines += ["", "  gradient norm       this batch   usual"]
    lines += [
        f"  {name:<18}  {norm:10.4g}  {usual:6.4g}"
        for name, (norm, usual) in replayed.layers.items()
    ]
    return "\n".join(lines)


def build_sections(replayed: ReplayedStep) -> list[Section]:
    """The sections of the page of a replayed step."""
    rows = [
        (str(row.index), f"{row.start:,}", f"{row.loss:.4f}", row.text) for row in replayed.rows
    ]
    layers = [
        (name, f"{norm:.4g}", f"{usual:.4g}") for name, (norm, usual) in replayed.layers.items()
    ]
    return [
        Section("Verdicts", (), HEADER, [finding.row for finding in replayed.findings]),
        Section(
            "The texts of the batch, the highest loss first",
            ("Losses are in nats per token, with the weights before the step.",),
            ("row", "first token", "loss", "text"),
            rows,
        ),
        Section(
            "Gradient norms",
            ("Without dropout. The usual norm is the median over the batches before.",),
            ("layer", "this batch", "usual"),
            layers,
        ),
    ]
