"""glasslm check: every hand-written gradient against central differences, and engine against engine."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import numpy as np
import tyro

from glasslm import files
from glasslm.errors import InputError, require
from glasslm.runs.metrics import plain
from glasslm.text import tell

if TYPE_CHECKING:
    from glasslm.lab.checks.finite_differences import Finding
    from glasslm.lab.checks.overlay import Point
    from glasslm.lab.checks.parity import Exactness, Parity

DESCRIPTION = """Compare every hand-written gradient with central differences and, with PyTorch, with those of autograd.

Without RUN: each op, the whole model with each switch, and random combinations of switches, every element of every
weight, in float64. Then engine against engine, in float64 and in float32: gradients, optimizer steps, logits with and
without a cache, and the losses of both while they learn a text. About two minutes.

With RUN: a trained model on its validation text, a few elements of each weight, and engine against engine; some seconds
for the preset tiny, a minute or two for the largest one.

Examples:
  glasslm check
  glasslm check --figure parity.png
  glasslm check runs/shakespeare-tiny-20260314-153000"""

IN_WORDS: dict[Exactness, str] = {"fp64": "float64", "fp32": "float32"}
TOLD_EVERY = 20  # steps of the two losses


@dataclass(frozen=True)
class Flags:
    """Random models, or a trained one."""

    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RUN]")] = None
    """A run's folder, or its name under ./runs, to check its trained weights (default: random ones)."""
    combinations: int = 50
    """Random combinations of switches."""
    seed: int = 0
    """Seed of weights, inputs and combinations."""
    figure: Path | None = None
    """Draw the losses of both engines, one over the other, into this PNG file."""
    json: bool = False
    """Print one JSON object at the end."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.engines.choice import torch_installed

    flags = parse(Flags, argv, "glasslm check", DESCRIPTION)
    require(flags.seed >= 0, "seed", flags.seed, "0 or more")
    if flags.figure is not None:
        _require_figure(flags.figure, flags.run)
    out = sys.stderr if flags.json else sys.stdout
    begin = time.perf_counter()
    summary, facts = _against_differences(flags, out)
    facts["parity"] = None
    if torch_installed():
        further, facts["parity"], wrong = _engine_against_engine(flags, out)
        summary, facts["wrong"] = f"{summary}; {further}", facts["wrong"] + wrong
    else:
        print(
            "\nengine against engine: left out, because PyTorch is not installed (pip install torch)",
            file=out,
        )
    wrong = facts["wrong"]
    verdict = f"{len(wrong)} wrong" if wrong else "all within tolerance"
    print(f"\n{summary}; {time.perf_counter() - begin:.0f} s: {verdict}", file=out)
    if flags.json:
        print(json.dumps(plain({"passed": not wrong} | facts)))
    return 1 if wrong else 0


def _require_figure(figure: Path, run: str | None) -> None:
    """Before minutes of work."""
    from glasslm.engines.choice import torch_installed

    if run is not None:
        raise InputError(
            "--figure draws two new models that learn, not a trained one: leave out RUN"
        )
    if not torch_installed():
        raise InputError("--figure needs PyTorch, which is not installed: pip install torch")
    if figure.suffix.lower() != ".png" or not os.access(figure.parent, os.W_OK):
        raise InputError(
            f"--figure is {figure}: expected a .png file in a folder that is there and can be written"
        )


def _against_differences(flags: Flags, out: TextIO) -> tuple[str, dict[str, Any]]:
    """Print a line for each case; the summary, and the facts for JSON."""
    from glasslm.lab.checks import finite_differences, gradient_check

    def sections() -> Iterator[tuple[str, Iterator[Finding]]]:
        if flags.run is not None:
            yield "the trained model", gradient_check.check_run(flags.run, flags.seed)
        else:
            yield "operations", gradient_check.check_ops(flags.seed)
            yield "the whole model", gradient_check.check_models(flags.combinations, flags.seed)

    findings = []
    print(
        f"hand-written gradients against central differences (h {finite_differences.H:g}, float64)",
        file=out,
    )
    for title, found in sections():
        print(f"\nelements   error  where{'':31}  {title}", file=out)
        for finding in found:
            findings.append(finding)
            verdict = "" if finding.passed else "  WRONG"
            moved = f"  ({finding.redrawn} points moved off a kink)" if finding.redrawn else ""
            print(
                f"{finding.elements:8,} {finding.error:7.1e}  {finding.where:36}  {finding.case}{moved}{verdict}",
                file=out, flush=True,
            )  # fmt: skip
    elements = sum(finding.elements for finding in findings)
    facts = {
        "cases": len(findings),
        "elements": elements,
        "largest_error": float(
            np.max([finding.error for finding in findings])
        ),  # NaN if one of them is
        "tolerance": finite_differences.TOLERANCE,
        "wrong": [finding.case for finding in findings if not finding.passed],
    }
    return f"{len(findings)} cases, {elements:,} elements", facts


def _engine_against_engine(flags: Flags, out: TextIO) -> tuple[str, dict[str, Any], list[str]]:
    """Print a line for each model, and the two losses; the summary, the facts for JSON, and what is wrong."""
    from glasslm.lab.checks import parity

    if flags.run is not None:
        rows = _told(parity.check_run(flags.run, flags.seed), out)
    else:
        rows = _told(parity.check_models("fp64", flags.combinations, flags.seed), out)
        rows += _told(parity.check_models("fp32", seed=flags.seed), out)
    wrong = [
        f"{row.case}, {IN_WORDS[row.precision]} {column}" for row in rows for column in row.wrong
    ]
    facts: dict[str, Any] = {"cases": len(rows), "tolerance": parity.TOLERANCE, "largest_error": {}}
    for precision in IN_WORDS:
        alike = [row for row in rows if row.precision == precision]
        errors = {
            column: float(np.max([getattr(row, column).error for row in alike]))
            for column in parity.COLUMNS
        }
        facts["largest_error"][precision] = errors
        told = ", ".join(f"{column} {error:.1e}" for column, error in errors.items())
        print(f"largest in {IN_WORDS[precision]}: {told}", file=out)
    if flags.run is None:
        facts["curves"], unequal = _curves(flags, out)
        wrong += unequal
    return f"{len(rows)} models engine against engine", facts, wrong


def _told(rows: Iterator[Parity], out: TextIO) -> list[Parity]:
    """The rows, each printed as soon as it is known, with a head where the precision changes."""
    from glasslm.lab.checks import parity

    found: list[Parity] = []
    for row in rows:
        if not found or found[-1].precision != row.precision:
            allowed = f"{IN_WORDS[row.precision]}, at most {parity.TOLERANCE[row.precision]:g}"
            print(
                f"\nengine against engine: NumPy by hand, PyTorch by autograd ({allowed})", file=out
            )
            print(
                f"gradients {parity.STEPS:3} steps   logits  worst gradient{'':22}  model", file=out
            )
        found.append(row)
        errors = " ".join(f"{getattr(row, column).error:9.1e}" for column in parity.COLUMNS)
        details = ", ".join(f"{column} ({getattr(row, column).where})" for column in row.wrong)
        verdict = f"  WRONG: {details}" if details else ""
        print(f"{errors}  {row.gradients.where:36}  {row.case}{verdict}", file=out, flush=True)
    return found


def _curves(flags: Flags, out: TextIO) -> tuple[dict[str, Any], list[str]]:
    """Print the losses of both engines on a text, and draw them; the facts for JSON, and what is wrong."""
    from glasslm.lab.checks import overlay, parity

    dataset, text = overlay.find_text(tell)
    recipe = overlay.recipe(flags.seed)
    train, block_size = recipe.train, recipe.model.block_size
    batches = f"{train.max_steps} steps of {train.batch_size} x {block_size} tokens"
    print(f"\nboth engines learn the text {text}, {batches}", file=out)
    print("step    NumPy  PyTorch  apart in float32  in float64, as a share of the loss", file=out)
    points: list[Point] = []
    wrong: list[str] = []
    for point in overlay.curves(dataset, recipe):
        points.append(point)
        if point.wrong:
            wrong.append(f"the losses of step {point.step}")
        if point.step == 1 or point.step % TOLD_EVERY == 0 or point.wrong:
            by_hand, by_autograd = point.losses["fp32"]
            print(
                f"{point.step:4} {by_hand:8.5f} {by_autograd:8.5f} {point.apart('fp32'):17.1e} "
                f"{point.apart('fp64'):11.1e}{'  WRONG' if point.wrong else ''}",
                file=out, flush=True,
            )  # fmt: skip
    largest = {
        precision: float(np.max([point.apart(precision) for point in points]))
        for precision in IN_WORDS
    }
    told = ", ".join(
        f"{IN_WORDS[p]} {error:.1e} (allowed {parity.TOLERANCE[p]:g})"
        for p, error in largest.items()
    )
    print(f"largest difference: {told}", file=out)
    if flags.figure is not None:
        from glasslm.lab.checks import overlay_figure
        from glasslm.report import figures

        drawn = overlay_figure.overlay(points, parity.TOLERANCE, text, figures.ON_WHITE)
        files.write_atomic(flags.figure, figures.png(drawn))
        print(f"drawn: {flags.figure}", file=out)
    return {"text": text, "steps": len(points), "largest_difference": largest}, wrong
