"""glasslm check: hand-written gradients against central differences, and the engines compared."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import numpy as np
import tyro

from glasslm import files
from glasslm.cli.flag_groups import RUN_HELP, JsonFlag, RunOpsFlag
from glasslm.config.config_fields import optional_flag
from glasslm.errors import InputError, require
from glasslm.runs.metrics import to_json_types
from glasslm.text import notify, print_escaped

if TYPE_CHECKING:
    from glasslm.engines.operations import OperationsFile
    from glasslm.lab.checks.attention_paths import PathResult
    from glasslm.lab.checks.finite_differences import CheckResult
    from glasslm.lab.checks.loss_parity import StepLosses
    from glasslm.lab.checks.parity import Parity, ParityPrecision

DESCRIPTION = """Compare every hand-written gradient with central differences and, if PyTorch is
installed, with autograd.

Without RUN: each operation, the whole model with each option, and random
combinations of options; every element of every weight, in float64. Every kind of
position with every kind of attention, in all paths that compute it. Then the two
engines in float64 and in float32: gradients, optimizer steps, logits with and
without a cache, and the losses while both learn a text. About four minutes on
two cores.

With --ops: the operations of a Python file, models that use them, and the two
engines; seconds.

With RUN: a trained model on its validation text, a few elements of each weight,
and the two engines; seconds for the preset tiny, up to two minutes for the
largest.

Examples:
  glasslm check
  glasslm check --figure parity.png
  glasslm check --ops own.py    operations of your own, in seconds
  glasslm check runs/shakespeare-quick-20260314-153000"""

PRECISION_NAMES: dict[ParityPrecision, str] = {"fp64": "float64", "fp32": "float32"}
LOSS_INTERVAL = 20  # steps between two printed losses


@dataclass(frozen=True)
class Flags:
    """The models to check: random ones, or a trained one."""

    run: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(
            metavar="[RUN]", help=RUN_HELP, help_behavior_hint="(default: random models)"
        ),
    ] = None
    combinations: int = 50
    """Random combinations of options."""
    seed: int = 0
    """Seed of weights, inputs and combinations."""
    ops: RunOpsFlag = ""
    figure: Annotated[Path | None, optional_flag("FILE.png", "none")] = None
    """Draw the losses of both engines into a PNG file."""
    json: JsonFlag = False


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import given_fields, parse
    from glasslm.engines.operations import describe_operations, read_operations
    from glasslm.engines.resources import is_torch_installed

    flags = parse(Flags, argv, "glasslm check", DESCRIPTION)
    require(flags.seed >= 0, "--seed", flags.seed, "0 or more")
    require(flags.combinations >= 0, "--combinations", flags.combinations, "0 or more")
    if "combinations" in given_fields(argv) and (flags.run is not None or flags.ops):
        raise InputError("--combinations is for random models: leave it out with RUN and --ops")
    if flags.figure is not None:
        _require_figure(flags.figure, flags.run, flags.ops)
    out = sys.stderr if flags.json else sys.stdout
    begin = time.perf_counter()
    operations = None
    if flags.ops and flags.run is None:
        operations = read_operations(flags.ops)
        if _has_only_optimizers(operations) and not is_torch_installed():
            raise InputError(
                f"{flags.ops} has only optimizers, which have no gradient: expected PyTorch, to "
                "compare their steps with (pip install torch)"
            )
        print(f"operations: {describe_operations(operations)}", file=out)
    summary, facts = _check_gradients(flags, operations, out)
    if flags.run is None and operations is None:
        path_summary, facts["attention"], wrong = _check_attention(flags.seed, out)
        summary, facts["wrong"] = f"{summary}; {path_summary}", facts["wrong"] + wrong
    facts["parity"] = None
    if is_torch_installed():
        parity_summary, facts["parity"], wrong = _compare_engines(flags, operations, out)
        summary, facts["wrong"] = f"{summary}; {parity_summary}", facts["wrong"] + wrong
    else:
        print(
            "\nengines not compared: PyTorch is not installed (pip install torch)",
            file=out,
        )
    wrong = facts["wrong"]
    verdict = f"{len(wrong)} wrong" if wrong else "all within tolerance"
    print(f"\n{summary}; {time.perf_counter() - begin:.0f} s: {verdict}", file=out)
    if flags.json:
        print(json.dumps(to_json_types({"passed": not wrong} | facts)))
    return 1 if wrong else 0


def _require_figure(figure: Path, run: str | None, ops: str) -> None:
    """Raise InputError for a --figure that cannot be drawn, before minutes of checks."""
    from glasslm.cli.parsing import require_png
    from glasslm.engines.resources import is_torch_installed

    if run is not None or ops:
        raise InputError("--figure draws the losses of two new models: leave out RUN and --ops")
    if not is_torch_installed():
        raise InputError("--figure needs PyTorch, which is not installed: pip install torch")
    require_png("--figure", figure)


def _check_gradients(
    flags: Flags, operations: OperationsFile | None, out: TextIO
) -> tuple[str, dict[str, Any]]:
    """Print one line for each case. Returns the summary and the facts for JSON."""
    from glasslm.lab.checks import finite_differences, gradient_check

    if operations is not None and _has_only_optimizers(operations):
        print("no gradients to check: optimizers have none", file=out)
        facts = {"cases": 0, "elements": 0, "largest_error": 0.0, "wrong": []}
        return "no gradients", facts | {"tolerance": finite_differences.TOLERANCE}

    def sections() -> Iterator[tuple[str, Iterator[CheckResult]]]:
        if flags.run is not None:
            yield "the trained model", gradient_check.check_run(flags.run, flags.seed, flags.ops)
        elif operations is not None:
            yield "operations", gradient_check.check_file_operations(operations, flags.seed)
            yield "the whole model", gradient_check.check_file_models(operations, flags.seed)
        else:
            yield "operations", gradient_check.check_ops(flags.seed)
            yield "the whole model", gradient_check.check_models(flags.combinations, flags.seed)

    findings = []
    notify("checking hand-written gradients: the first lines take some seconds")
    print(
        "hand-written gradients against central differences "
        f"(h {finite_differences.STEP_SIZE:g}, float64)",
        file=out,
    )
    for title, results in sections():
        notify(f"checking {title}")
        print(f"\nelements   error  where{'':31}  {title}", file=out)
        for finding in results:
            findings.append(finding)
            verdict = "" if finding.passed else "  WRONG"
            moved = f"  ({finding.redrawn} points moved off a kink)" if finding.redrawn else ""
            print(
                f"{finding.elements:8,} {finding.error:7.1e}  {finding.where:36}  "
                f"{finding.case}{moved}{verdict}",
                file=out, flush=True,
            )  # fmt: skip
    elements = sum(finding.elements for finding in findings)
    facts = {
        "cases": len(findings),
        "elements": elements,
        "largest_error": float(
            np.max([finding.error for finding in findings])
        ),  # np.max, unlike max, is NaN if an error is
        "tolerance": finite_differences.TOLERANCE,
        "wrong": [finding.case for finding in findings if not finding.passed],
    }
    return f"{len(findings)} cases, {elements:,} elements", facts


def _has_only_optimizers(operations: OperationsFile) -> bool:
    """Whether no operation of a file has a gradient."""
    from glasslm.lab.checks.file_cases import OPTIMIZERS

    return operations.functions.keys() <= OPTIMIZERS.keys()


def _check_attention(seed: int, out: TextIO) -> tuple[str, dict[str, Any], list[str]]:
    """Print one line for each model. Returns summary, JSON facts and faults."""
    from glasslm.lab.checks import attention_paths, parity

    print(
        "\nattention: plain, by tiles, fused and with a cache against NumPy's plain attention "
        f"(float64, at most {parity.TOLERANCE['fp64']:g})\npaths   error  where{'':44}  model",
        file=out,
    )
    notify("checking attention: every position and mask, in every path")
    results: list[PathResult] = []
    for result in attention_paths.check_attention_paths(seed):
        results.append(result)
        fault = f": {result.missing_effect} has no effect" if result.missing_effect else ""
        verdict = "" if result.passed else f"  WRONG{fault}"
        print(
            f"{result.paths:5} {result.error:7.1e}  {result.where:49}  {result.case}{verdict}",
            file=out, flush=True,
        )  # fmt: skip
    facts = {
        "cases": len(results),
        "largest_error": float(np.max([result.error for result in results])),
        "tolerance": parity.TOLERANCE["fp64"],
    }
    wrong = [f"attention: {result.case}" for result in results if not result.passed]
    return f"{len(results)} models path against path", facts, wrong


def _compare_engines(
    flags: Flags, operations: OperationsFile | None, out: TextIO
) -> tuple[str, dict[str, Any], list[str]]:
    """Print one line for each model, and the losses. Returns summary, JSON facts and faults."""
    from glasslm.lab.checks import parity

    notify("starting PyTorch, to compare the engines")
    if flags.run is not None:
        rows = _print_parity(parity.check_run(flags.run, flags.seed, flags.ops), out)
    elif operations is not None:
        rows = _print_parity(parity.check_file_models(operations, "fp64", flags.seed), out)
        rows += _print_parity(parity.check_file_models(operations, "fp32", flags.seed), out)
    else:
        rows = _print_parity(parity.check_models("fp64", flags.combinations, flags.seed), out)
        rows += _print_parity(parity.check_models("fp32", seed=flags.seed), out)
    wrong = [
        f"{row.case}, {PRECISION_NAMES[row.precision]} {column}"
        for row in rows
        for column in row.failed_columns
    ]
    facts: dict[str, Any] = {"cases": len(rows), "tolerance": parity.TOLERANCE, "largest_error": {}}
    for precision in PRECISION_NAMES:
        same_precision = [row for row in rows if row.precision == precision]
        errors = {
            column: float(np.max([getattr(row, column).error for row in same_precision]))
            for column in parity.COLUMNS
        }
        facts["largest_error"][precision] = errors
        maxima = ", ".join(f"{column} {error:.1e}" for column, error in errors.items())
        print(f"largest in {PRECISION_NAMES[precision]}: {maxima}", file=out)
    if flags.run is None and operations is None:
        facts["curves"], wrong_steps = _compare_losses(flags, out)
        wrong += wrong_steps
    return f"{len(rows)} models engine against engine", facts, wrong


def _print_parity(rows: Iterator[Parity], out: TextIO) -> list[Parity]:
    """Print each row when it is ready, with a header for each precision. Returns the rows."""
    from glasslm.lab.checks import parity

    printed: list[Parity] = []
    for row in rows:
        if not printed or printed[-1].precision != row.precision:
            allowed = (
                f"{PRECISION_NAMES[row.precision]}, at most {parity.TOLERANCE[row.precision]:g}"
            )
            print(
                f"\nengine against engine: NumPy by hand, PyTorch by autograd ({allowed})", file=out
            )
            print(
                f"gradients {parity.STEPS:3} steps   logits  worst gradient{'':22}  model", file=out
            )
        printed.append(row)
        errors = " ".join(f"{getattr(row, column).error:9.1e}" for column in parity.COLUMNS)
        details = ", ".join(
            f"{column} ({getattr(row, column).where})" for column in row.failed_columns
        )
        verdict = f"  WRONG: {details}" if details else ""
        print(f"{errors}  {row.gradients.where:36}  {row.case}{verdict}", file=out, flush=True)
    return printed


def _compare_losses(flags: Flags, out: TextIO) -> tuple[dict[str, Any], list[str]]:
    """Print, and draw, the losses of both engines on a text. Returns facts for JSON, and faults."""
    from glasslm.lab.checks import loss_parity, parity

    dataset, text = loss_parity.load_text(notify)
    recipe = loss_parity.loss_parity_config(flags.seed)
    train, block_size = recipe.train, recipe.model.block_size
    batches = f"{train.max_steps} steps of {train.batch_size} x {block_size} tokens"
    print(f"\nboth engines learn the text {text}, {batches}", file=out)
    print("step    NumPy  PyTorch  apart in float32  in float64, as a share of the loss", file=out)
    notify(f"training both engines in float32 and in float64, {batches}")
    points: list[StepLosses] = []
    wrong: list[str] = []
    for point in loss_parity.train_both(dataset, recipe):
        points.append(point)
        if point.exceeds_tolerance:
            wrong.append(f"the losses of step {point.step}")
        if point.step == 1 or point.step % LOSS_INTERVAL == 0 or point.exceeds_tolerance:
            by_hand, by_autograd = point.losses["fp32"]
            print(
                f"{point.step:4} {by_hand:8.5f} {by_autograd:8.5f} "
                f"{point.relative_difference('fp32'):17.1e} "
                f"{point.relative_difference('fp64'):11.1e}"
                f"{'  WRONG' if point.exceeds_tolerance else ''}",
                file=out, flush=True,
            )  # fmt: skip
    largest = {
        precision: float(np.max([point.relative_difference(precision) for point in points]))
        for precision in PRECISION_NAMES
    }
    maxima = ", ".join(
        f"{PRECISION_NAMES[p]} {error:.1e} (allowed {parity.TOLERANCE[p]:g})"
        for p, error in largest.items()
    )
    print(f"largest difference: {maxima}", file=out)
    if flags.figure is not None:
        from glasslm.lab.checks import loss_parity_figure
        from glasslm.report import figures

        figure = loss_parity_figure.draw_loss_parity(
            points, parity.TOLERANCE, text, figures.PRINT_PALETTE
        )
        files.write_atomic(flags.figure, figures.png(figure))
        print_escaped(f"drawn: {flags.figure}", out)
    return {"text": text, "steps": len(points), "largest_difference": largest}, wrong
