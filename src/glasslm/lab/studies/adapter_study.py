"""What the rank of adapters, or the choice of the matrices that get them, is worth: one fine-tuned run for each.

A study is a folder: runs/ with an ordinary run for each variant, adapters.csv, adapters.png and report.md. A study that
was interrupted goes on where it stopped: finished runs are not trained again.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from glasslm import files
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.errors import InputError
from glasslm.model.parameters import parameter_table
from glasslm.report import figures, run_report
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.history import best_eval
from glasslm.runs.run_folder import Run
from glasslm.text import Say, quoted, size, tell
from glasslm.training import launch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["rank", "targets"]

RANKS = (2, 4, 8, 16, 32, 64)
TARGETS = ("q,v", "q,k,v,o", "q,k,v,o,gate,up,down")


class Point(NamedTuple):
    """One variant of a study, one seed."""

    variant: str
    rank: int
    targets: str
    trained: int  # parameters
    val_loss: float  # nats per token of the new text, at the best step
    bpb: float  # bits per byte of the new text
    old_bpb_before: float | None  # of the old text; None where that is gone
    old_bpb_after: float | None
    checkpoint_bytes: int  # of the adapters alone
    status: str  # how the run ended: finished, stopped or diverged


def study(
    kind: str,
    config: RunConfig,
    compute: ComputeConfig,
    folder: Path | None,
    command: str,
    say: Say = tell,
) -> str:
    """Train and compare the variants of `config`; the last lines for people. Raises InputError for an unknown kind."""
    variants = _variants(kind, config)
    folder = run_folder.study_folder(folder, "adapters", kind, "--run-dir")
    say(
        f"the study is in {folder}: the same command with --run-dir {quoted(folder)} goes on with it"
    )
    for number, (name, variant) in enumerate(variants.items(), 1):
        path = folder / "runs" / name
        say(f"{number} of {len(variants)}: {name}")
        if not (path / "run.json").exists():
            outcome = launch.train(variant, compute, path, preset=name, command=command, say=_quiet)
        else:
            _require_same(Run(path), variant)
            if Run(path).history.status in ("finished", "stopped", "diverged"):
                continue
            outcome = launch.resume(path, compute, say=_quiet)
        run_report.write_after_training(outcome, _quiet)
        if outcome.status == "interrupted":
            if outcome.signal == signal.SIGTERM:
                signal.raise_signal(signal.SIGTERM)  # now that all is saved, it ends the program
            raise KeyboardInterrupt
    points = [point(name, Run(folder / "runs" / name)) for name in variants]
    text = report(kind, points)
    files.write_atomic(folder / "adapters.csv", _csv(points).encode())
    figure = draw_adapters(kind, whole(points) or points, pareto(points), figures.ON_WHITE)
    files.write_atomic(folder / "adapters.png", figures.png(figure))
    files.write_atomic(folder / "report.md", text.encode())
    return f"{text}\nstudy: {folder}"


def _variants(kind: str, config: RunConfig) -> dict[str, RunConfig]:
    def with_model(**changes: Any) -> RunConfig:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

    if not config.model.lora_rank:
        raise InputError("--study compares adapters: leave out --full")
    if kind == "rank":
        return {f"rank-{rank}": with_model(lora_rank=rank) for rank in RANKS}
    if kind == "targets":
        known = [
            ",".join(t for t in targets.split(",") if t != "gate" or config.model.gated)
            for targets in TARGETS
        ]
        return {
            f"targets-{targets.replace(',', '')}": with_model(lora_targets=targets)
            for targets in known
        }
    raise InputError(f"--study is '{kind}': expected rank or targets")


def _require_same(run: Run, variant: RunConfig) -> None:
    """Raises InputError where a run that the study finds was made with other settings than it has now."""
    then, train = run.config, variant.train
    if (
        train.epochs is not None or train.max_time is not None
    ):  # the number of steps was fixed when the run began
        train = dataclasses.replace(train, max_steps=then.train.max_steps)
    if then != dataclasses.replace(variant, train=train).resolved():
        raise InputError(
            f"{run.path} was trained with other flags: give those of this study, or another --run-dir"
        )


def point(name: str, run: Run) -> Point:
    """What came of one run."""
    lines = list(run.metrics())
    old = {
        line["step"]: line["bpb"]
        for line in lines
        if line["kind"] == "eval" and line["split"] == "old"
    }
    best = best_eval(lines, run.history)
    assert best is not None
    model = run.config.model
    held = checkpoint.load(run.path)
    return Point(
        name,
        model.lora_rank,
        model.lora_targets,
        parameter_table(model, run.tokenizer.vocab_size).trained,
        best["loss"],
        best["bpb"],
        old.get(0),
        old.get(best["step"]),
        (held.path / "model.safetensors").stat().st_size,
        run.history.status or "failed",
    )


def whole(points: list[Point]) -> list[Point]:
    """Those whose runs came to their end: the loss of one that diverged is that of its beginning."""
    return [one for one in points if one.status in ("finished", "stopped")]


def pareto(points: list[Point]) -> list[Point]:
    """Those that none with fewer trained parameters equals, from few parameters to many."""
    best: list[Point] = []
    for one in sorted(whole(points), key=lambda point: (point.trained, point.val_loss)):
        if not best or one.val_loss < best[-1].val_loss:
            best.append(one)
    return best


def report(kind: str, points: list[Point]) -> str:
    """The study as Markdown."""
    front = {one.variant for one in pareto(points)}
    head = "| variant | trained parameters | checkpoint | new text, bits/byte | old text, bits/byte, before -> after | |"
    rows = [
        f"| {one.variant} | {one.trained:,} | {size(one.checkpoint_bytes)} | {one.bpb:.3f} | {_forgotten(one)} | "
        f"{'on the Pareto front' if one.variant in front else '' if one in whole(points) else one.status} |"
        for one in points
    ]
    note = "One seed each: differences of a hundredth mean nothing."
    return "\n".join(
        [f"# Adapters by {kind}", "", head, "|---|---|---|---|---|---|", *rows, "", note]
    )


def _forgotten(one: Point) -> str:
    if one.old_bpb_before is None or one.old_bpb_after is None:
        return "not measured"
    return f"{one.old_bpb_before:.3f} -> {one.old_bpb_after:.3f}"


def _csv(points: list[Point]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows(points)
    return text.getvalue()


def _quiet(message: str) -> None:
    """Of many runs only the study's own lines are shown."""


def draw_adapters(
    kind: str, points: Sequence[Point], front: Sequence[Point], colours: figures.Palette
) -> Figure:
    """What adapters of each size learnt of the new text, with the Pareto front, and what they forgot of the old."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    learnt, forgotten = figure.subplots(1, 2)
    trained = [one.trained for one in points]
    names = [str(one.rank) if kind == "rank" else one.targets for one in points]

    figures.dress(learnt, "New text", "validation loss, nats per token", colours)
    learnt.plot(
        trained,
        [one.val_loss for one in points],
        "o",
        color=colours.validation,
        label="each run, one seed",
    )
    learnt.step([one.trained for one in front], [one.val_loss for one in front], where="post", color=colours.faint,
                linewidth=1.2, label="Pareto front")  # fmt: skip
    for one, name in zip(points, names):
        learnt.annotate(
            name,
            (one.trained, one.val_loss),
            xytext=(5, 5),
            textcoords="offset points",
            color=colours.ink,
        )

    figures.dress(forgotten, "Old text", "bits per byte", colours)
    after = figures.as_array([one.old_bpb_after for one in points])
    forgotten.plot(trained, after, "s", color=colours.train, label="after fine-tuning")
    if points[0].old_bpb_before is not None:
        forgotten.axhline(
            points[0].old_bpb_before, color=colours.faint, linestyle="--", label="before"
        )
    for axes in (learnt, forgotten):
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(
            "trained parameters" + (", labelled by rank" if kind == "rank" else ""),
            color=colours.ink,
        )
        figures.finish(axes, colours)
    return figure
