"""An adapter study: a fine-tuned run for each rank, or for each choice of matrices.

A study is a folder: runs/ with an ordinary run for each variant, adapters.csv, adapters.png and
report.md. An interrupted study is resumed where it stopped: finished runs are not trained again.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from glasslm import files
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.errors import InputError
from glasslm.lab.studies import sweep
from glasslm.lab.studies.study_plan import require_equal_length, resolve_compute
from glasslm.lab.studies.sweep import Trial
from glasslm.model.parameters import parameter_table
from glasslm.report import figures
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import COMPLETED_STATUSES, eval_lines
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, as_float, format_bytes, notify
from glasslm.training.run_inputs import open_run_inputs, with_absolute_paths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["rank", "targets"]

RANKS = (2, 4, 8, 16, 32, 64)
TARGETS = ("q,v", "q,k,v,o", "q,k,v,o,gate,up,down")


class Point(NamedTuple):
    """The result of one variant, from one seed: a row of adapters.csv."""

    variant: str
    rank: int
    targets: str
    trained: int  # parameters
    val_loss: float  # nats per token of the new text, at the best step
    bpb: float  # bits per byte of the new text
    old_bpb_before: float | None  # of the old text; None if that text is missing
    old_bpb_after: float | None
    checkpoint_bytes: int  # of the adapters alone
    status: str  # how the run ended: finished, stopped or diverged


def run_study(
    kind: str,
    config: RunConfig,
    compute: ComputeConfig,
    folder: Path | None,
    command: str,
    notify: Notify = notify,
) -> str:
    """Train and compare the variants of `config`; returns the text for the terminal.

    All runs use the engine, device and precision that the largest variant gets. Raises InputError
    for an unknown kind, for runs that would differ in length, and if the folder has runs with other
    settings, or of another engine, device or precision.
    """
    require_equal_length(config.train)
    # A run records the config as its inputs complete it, and a study that continues compares them.
    config = with_absolute_paths(config.resolve())
    inputs = open_run_inputs(config, notify)
    trials = [
        Trial(name, variant)
        for name, variant in _list_variants(kind, inputs.complete(config)).items()
    ]
    # The last variant has the most parameters.
    largest, V = trials[-1].config, inputs.dataset.tokenizer.vocab_size
    compute = resolve_compute(compute, largest, V, threads=0)
    folder = run_folder.study_folder(folder, "adapters", kind, "--run-dir")
    notify(f"study: {folder} ({run_folder.continuation_hint(folder, '--run-dir')})")
    outcomes = sweep.run_in_turn(folder, trials, compute, notify, command)
    points = [read_point(name, outcome.run) for name, outcome in outcomes.items()]
    report = format_report(kind, points)
    files.write_atomic(folder / "adapters.csv", _to_csv(points).encode())
    front = pareto_front(points)
    figure = draw_adapters(kind, select_completed(points) or points, front, figures.PRINT_PALETTE)
    files.write_atomic(folder / "adapters.png", figures.png(figure))
    files.write_atomic(folder / "report.md", report.encode())
    return f"{report}\nstudy: {folder}"


def _list_variants(kind: str, config: RunConfig) -> dict[str, RunConfig]:
    """The configurations of a study by the names of their runs."""

    def with_adapter(**changes: Any) -> RunConfig:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

    if not config.model.lora_rank:
        raise InputError("--study compares adapters: leave out --full")
    if kind == "rank":
        return {f"rank-{rank}": with_adapter(lora_rank=rank) for rank in RANKS}
    if kind == "targets":
        existing = [
            ",".join(t for t in targets.split(",") if t != "gate" or config.model.is_gated)
            for targets in TARGETS
        ]
        return {
            f"targets-{targets.replace(',', '')}": with_adapter(lora_targets=targets)
            for targets in existing
        }
    raise InputError(f"--study is '{kind}': expected rank or targets")


def read_point(name: str, run: Run) -> Point:
    """The result of one run from its folder."""
    lines = list(run.metrics())
    old_bpb = {line["step"]: line["bpb"] for line in eval_lines(lines, split="old")}
    best = best_eval(lines, run.history)
    assert best is not None
    assert best["loss"] is not None
    model = run.config.model
    latest = checkpoint.load(run.path)
    return Point(
        variant=name,
        rank=model.lora_rank,
        targets=model.lora_targets,
        trained=parameter_table(model, run.tokenizer.vocab_size).trained,
        val_loss=best["loss"],
        bpb=as_float(best["bpb"]),
        old_bpb_before=old_bpb.get(0),
        old_bpb_after=old_bpb.get(best["step"]),
        checkpoint_bytes=(latest.path / "model.safetensors").stat().st_size,
        status=run.history.status or "failed",
    )


def select_completed(points: list[Point]) -> list[Point]:
    """The points of completed runs. The best loss of a diverged run is from its first steps."""
    return [point for point in points if point.status in COMPLETED_STATUSES]


def pareto_front(points: list[Point]) -> list[Point]:
    """The points with a lower loss than all smaller completed ones, the smallest first."""
    front: list[Point] = []
    for point in sorted(
        select_completed(points), key=lambda point: (point.trained, point.val_loss)
    ):
        if not front or point.val_loss < front[-1].val_loss:
            front.append(point)
    return front


def format_report(kind: str, points: list[Point]) -> str:
    """The report as Markdown."""
    front = {point.variant for point in pareto_front(points)}
    header = (
        "| variant | trained parameters | checkpoint | new text, bits/byte | "
        "old text, bits/byte, before -> after | |"
    )

    def remark(point: Point) -> str:
        if point.variant in front:
            return "on the Pareto front"
        return "" if point in select_completed(points) else point.status

    rows = [
        f"| {point.variant} | {point.trained:,} | {format_bytes(point.checkpoint_bytes)} | "
        f"{point.bpb:.3f} | {_format_old_bpb(point)} | {remark(point)} |"
        for point in points
    ]
    note = (
        "Each variant was trained with one seed: a difference of 0.01 bits per byte may be chance."
    )
    return "\n".join(
        [f"# Adapters by {kind}", "", header, "|---|---|---|---|---|---|", *rows, "", note]
    )


def _format_old_bpb(point: Point) -> str:
    if point.old_bpb_before is None or point.old_bpb_after is None:
        return "not measured"
    return f"{point.old_bpb_before:.3f} -> {point.old_bpb_after:.3f}"


def _to_csv(points: list[Point]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows(points)
    return text.getvalue()


def draw_adapters(
    kind: str, points: Sequence[Point], front: Sequence[Point], colours: figures.Palette
) -> Figure:
    """A figure over the trained parameters: the loss of the new text, bits per byte of the old."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    new_axes, old_axes = figure.subplots(1, 2)
    trained = [point.trained for point in points]
    names = [str(point.rank) if kind == "rank" else point.targets for point in points]

    figures.style_axes(new_axes, "New text", "validation loss, nats per token", colours)
    new_axes.plot(
        trained,
        [point.val_loss for point in points],
        "o",
        color=colours.validation,
        label="each run, one seed",
    )
    new_axes.step(
        [point.trained for point in front],
        [point.val_loss for point in front],
        where="post",
        color=colours.faint,
        linewidth=1.2,
        label="Pareto front",
    )
    for point, name in zip(points, names):
        new_axes.annotate(
            name,
            (point.trained, point.val_loss),
            xytext=(5, 5),
            textcoords="offset points",
            color=colours.ink,
        )

    figures.style_axes(old_axes, "Old text", "bits per byte", colours)
    after = figures.as_array([point.old_bpb_after for point in points])
    old_axes.plot(trained, after, "s", color=colours.train, label="after fine-tuning")
    if points[0].old_bpb_before is not None:
        old_axes.axhline(
            points[0].old_bpb_before, color=colours.faint, linestyle="--", label="before"
        )
    for axes in (new_axes, old_axes):
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(
            "trained parameters" + (", labelled by rank" if kind == "rank" else ""),
            color=colours.ink,
        )
        figures.add_legend(axes, colours)
    return figure
