"""One step of a run looked into: its batch, row by row, and its gradient, layer by layer.

Resuming is exact, so a step can be brought back: a copy of the run goes on from the newest checkpoint before it, with
all that the guard skipped or rolled back, and stops where the step begins.
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
from glasslm.data import shards
from glasslm.engines.choice import as_recorded
from glasslm.engines.factory import make_engine
from glasslm.engines.inspection import GRADIENT, backward_names
from glasslm.engines.protocol import Batch, Engine
from glasslm.errors import DamagedError, InputError
from glasslm.model.parameters import parameter_table
from glasslm.report.findings import HEADER, Finding
from glasslm.report.page import Section
from glasslm.runs import checkpoint
from glasslm.runs.metrics import Line, Log
from glasslm.runs.run_folder import Run
from glasslm.text import Say, duration, number, one_line
from glasslm.training.display import Display
from glasslm.training.loop import Loop, hashes

BEFORE = 4  # batches before the step, whose gradients are the usual ones
STANDS_OUT = (
    6.0  # robust standard deviations (1.4826 x the median distance) above the median of the rows
)
TIMES = 4.0  # a layer's gradient against its usual one
EXCERPT = 60  # characters of a row


@dataclass(frozen=True)
class Row:
    """A text of the batch."""

    index: int
    start: int  # its first token, in the training tokens
    loss: float  # nats a token, by the weights before the step
    text: str


@dataclass(frozen=True)
class Replay:
    """A step brought back."""

    step: int
    resumed_from: int
    loss: float
    grad_norm: float
    logged: Line | None  # the line that the run wrote of it, if it wrote one
    rows: list[Row]  # the hardest first
    layers: dict[
        str, tuple[float, float]
    ]  # gradient norm in this batch, and the median of those before
    findings: list[Finding]


def replay(run_dir: Path, step: int, compute: ComputeConfig, say: Say) -> Replay:
    """Bring back `step` (from 1) of a run, in a temporary folder. The run itself is only read, and may go on.

    What `compute` leaves open is as the run had it. Raises InputError for a step that the run has not made, and
    DamagedError where no checkpoint before it is whole.
    """
    run = Run(run_dir)
    made = run.length
    if not 1 <= step <= made:
        raise InputError(
            f"--replay {step}: this run has made "
            + (f"the steps 1 to {made}" if made else "no step yet")
        )
    held, state = _before(run, step)
    dataset = shards.of_run(run.config.data, run.record["data"], run.tokenizer, say)
    checkpoint.check(held, **hashes(run, dataset))
    compute, notes = as_recorded(compute, run.record)
    for note in notes:
        say(f"note: {note}")
    with tempfile.TemporaryDirectory(
        prefix="glasslm-replay-", ignore_cleanup_errors=True
    ) as folder:
        copy = _copy(run, held, Path(folder))
        machine = make_engine(run.config, run.tokenizer.vocab_size, compute, training=True)
        machine.load(state, held.progress.updates, held.progress.loss_scale)
        with Log(copy.path / "metrics.jsonl") as log:
            loop = Loop(
                copy,
                machine,
                dataset,
                log,
                Display(stream=io.StringIO(), live=False),
                held.progress,
            )
            _go_to(loop, step - 1, say)
            return _look(run, loop, held.step)


def _before(run: Run, step: int) -> tuple[checkpoint.Checkpoint, list[tuple[str, NDArray[Any]]]]:
    """The newest whole checkpoint from which `step` can be reached, and its arrays, before the run removes it."""
    for at in reversed([at for at in checkpoint.list_steps(run.path) if at < step]):
        try:
            held = checkpoint.load(run.path, at)
            return held, list(held.state())
        except (DamagedError, InputError):
            continue
    raise DamagedError(
        f"{run.path} has no whole checkpoint before step {step}: see `glasslm verify`"
    )


def _copy(run: Run, held: checkpoint.Checkpoint, folder: Path) -> Run:
    """As much of the run as going on from a checkpoint, and rolling back, may read.

    Only a rollback reads weights again: those of the last planned checkpoint, which the run keeps for that.
    """
    for name in ("run.json", "tokenizer.json"):
        shutil.copy(run.path / name, folder / name)
    if run.config.train.on_spike != "rollback":
        return Run(folder)
    safe_at = held.progress.loop.get("safe_at", held.step)
    places = [Path(checkpoint.FOLDER, f"{safe_at:06d}")]
    places += [Path(checkpoint.BASE)] if (run.path / checkpoint.BASE).is_dir() else []
    try:
        for place in places:
            shutil.copytree(run.path / place, folder / place)
    except (OSError, shutil.Error) as error:
        raise DamagedError(
            f"{run.path / places[0]}, to which a spike would go back, cannot be copied ({error}): if the run is under "
            "way, try again"
        ) from error
    return Run(folder)


def _go_to(loop: Loop, step: int, say: Say) -> None:
    """Train on until `step` batches are consumed, and tell now and then how far it is."""
    first, began = loop.step, time.monotonic()
    told = began
    rolls_back = (
        loop.config.train.on_spike == "rollback"
    )  # to a checkpoint, which an evaluation may have caused
    say(f"from the checkpoint of step {first}: {step - first} steps to go again")
    while loop.step < step:
        if rolls_back:
            loop.do_step()
        else:  # nothing else that is due after a step changes the weights
            loop.judge(*loop.advance())
        now = time.monotonic()
        if now - told > 5:
            told = now
            left = (now - began) / (loop.step - first) * (step - loop.step)
            say(f"step {loop.step} of {step}, about {duration(left)} left")


def _look(run: Run, loop: Loop, resumed_from: int) -> Replay:
    batch = _batch(loop, loop.step)
    nats = loop.engine.losses(batch.tokens, batch.targets).mean(1)
    starts = loop.order.starts(loop.step, batch.rows)
    texts = [run.tokenizer.decode(row) for row in batch.tokens]
    rows = [
        Row(*items) for items in zip(batch.rows.tolist(), starts.tolist(), nats.tolist(), texts)
    ]
    rows.sort(key=lambda row: -row.loss)
    norms = _norms(loop.engine, batch, run)
    usual = [
        _norms(loop.engine, _batch(loop, at), run)
        for at in range(max(0, loop.step - BEFORE), loop.step)
    ]
    layers = {
        name: (norm, float(np.median([other[name] for other in usual])) if usual else norm)
        for name, norm in norms.items()
    }
    _, losses, update, _ = loop.advance()
    logged = [
        line for line in run.metrics() if line["kind"] == "step" and line["step"] == loop.step
    ]
    found = [
        _same(losses.cross_entropy, logged[-1] if logged else None),
        _of_rows(rows),
        _of_layers(layers),
    ]
    loss, norm = losses.cross_entropy, update.norm
    return Replay(
        loop.step, resumed_from, loss, norm, logged[-1] if logged else None, rows, layers, found
    )


def _batch(loop: Loop, step: int) -> Batch:
    rows = np.arange(loop.config.train.batch_size)
    return Batch(*loop.order.batch(loop.dataset.train.tokens, step, rows), step, rows)


def _norms(engine: Engine, batch: Batch, run: Run) -> dict[str, float]:
    """The gradient norm of each block, and of what stands before and after them; without dropout."""
    rows = parameter_table(run.config.model, run.tokenizer.vocab_size)
    names = [
        name
        for name in backward_names(run.config.model, rows)
        if name.removeprefix(GRADIENT) in rows
    ]
    sums: dict[str, Any] = {}
    for part in batch.parts(engine.micro_batch_size):
        share = len(part.tokens) / len(batch.tokens)
        for name, gradient in engine.inspect(part, names).items():
            sums[name] = sums.get(name, 0) + share * gradient.astype(np.float64)
    squares: dict[str, float] = {}
    for name, gradient in sums.items():
        words = name.removeprefix(GRADIENT).split(".")
        layer = ".".join(words[:2]) if words[0] == "blocks" else words[0]
        squares[layer] = squares.get(layer, 0.0) + float(np.vdot(gradient, gradient))
    return {layer: square**0.5 for layer, square in reversed(squares.items())}


def _same(loss: float, logged: Line | None) -> Finding:
    if logged is None:
        return Finding(
            "replay",
            "ok",
            "the run logged no line of this step",
            "there is nothing to compare it with",
        )
    if loss == logged["loss"] or (logged["loss"] is None and not math.isfinite(loss)):
        return Finding(
            "replay",
            "ok",
            f"loss {number(loss, '.6f')}, as logged, to the bit",
            "this is the very step",
        )
    seen = f"loss {number(loss, '.6f')}, logged {number(logged['loss'], '.6f')}"
    means = "another machine, engine or number of threads computes now: what follows is close to that step"
    return Finding(
        "replay", "watch", seen, means, "replay where the run was trained to see the very step"
    )


def _of_rows(rows: Sequence[Row]) -> Finding:
    losses = np.array([row.loss for row in rows])
    finite = losses[np.isfinite(losses)]
    middle = float(np.median(finite)) if len(finite) else np.nan
    spread = 1.4826 * float(np.median(np.abs(finite - middle))) if len(finite) else np.nan
    outside = [
        row for row in rows if not row.loss <= middle + max(STANDS_OUT * spread, 0.05 * middle)
    ]
    if not outside:
        seen = f"all {len(rows)} rows lie between {losses.min():.3f} and {losses.max():.3f} nats, median {middle:.3f}"
        return Finding(
            "rows",
            "ok",
            seen,
            "no single text stands out: if the step spiked, look at the weights or the rate",
        )
    numbers = ", ".join(f"{row.index} ({row.loss:.3f})" for row in outside[:5])
    means = "these texts are unlike the others: damaged, foreign, or one thing repeated"
    advice = "look at the text below; clean the corpus, or train with --on-spike skip"
    return Finding(
        "rows",
        "bad",
        f"{len(outside)} of {len(rows)} rows stand out of a median of {middle:.3f}: {numbers}",
        means,
        advice,
    )


def _of_layers(layers: dict[str, tuple[float, float]]) -> Finding:
    times = {name: norm / usual for name, (norm, usual) in layers.items() if usual > 0}
    if not times:
        return Finding(
            "gradients",
            "watch",
            "no gradient at all before this step",
            "nothing can be compared",
            "",
        )
    name = max(times, key=times.__getitem__)
    seen = f"largest in {name}: {times[name]:.2g} times that of the batches before"
    if times[name] <= TIMES:
        return Finding("gradients", "ok", seen, "the batch pulls no harder than others")
    return Finding(
        "gradients",
        "bad",
        seen,
        "one batch moves the weights far",
        "lower --grad-clip, or train with --on-spike skip",
    )


def text(found: Replay) -> str:
    """For the terminal."""
    norm = number(found.grad_norm, ".4g")
    lines = [
        f"step {found.step}, replayed from step {found.resumed_from}: loss {number(found.loss, '.4f')}, norm {norm}"
    ]
    for finding in found.findings:
        lines.append(f"  {finding.verdict:<6} {finding.signal:<10} {finding.seen}: {finding.means}")
        if finding.advice:
            lines.append(f"  {'':<17} {finding.advice}")
    lines += ["", "   row       loss  at token  text"]
    for row in found.rows[:10]:
        lines.append(
            f"  {row.index:>4}  {row.loss:9.4f}  {row.start:>8,}  {one_line(row.text)[:EXCERPT]}"
        )
    lines += ["", "  gradient norm       this batch   usual"]
    lines += [
        f"  {name:<18}  {norm:10.4g}  {usual:6.4g}" for name, (norm, usual) in found.layers.items()
    ]
    return "\n".join(lines)


def sections(found: Replay) -> list[Section]:
    """For the page."""
    rows = [(str(row.index), f"{row.start:,}", f"{row.loss:.4f}", row.text) for row in found.rows]
    layers = [(name, f"{norm:.4g}", f"{usual:.4g}") for name, (norm, usual) in found.layers.items()]
    return [
        Section("Verdicts", (), HEADER, [finding.row for finding in found.findings]),
        Section(
            "The texts of the batch, the hardest first",
            ("Losses are in nats a token, by the weights before the step.",),
            ("row", "first token", "loss", "text"),
            rows,
        ),
        Section(
            "Gradient norms",
            ("Without dropout; the usual one is the median of the batches before.",),
            ("layer", "this batch", "usual"),
            layers,
        ),
    ]
