"""glasslm check: every hand-written gradient against central differences."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from glasslm.metrics import plain

DESCRIPTION = """Compare every hand-written gradient with central finite differences, in float64.

Without RUN: each op, the whole model with each switch, and random combinations of switches, every element of every
weight; about a minute. With RUN: a trained model's weights on its validation text, a few elements of each weight; some
seconds for the preset tiny, a minute or two for the largest one.

Examples:
  glasslm check
  glasslm check runs/shakespeare-tiny-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    """Random models, or a trained one."""

    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RUN]")] = None
    """A run's folder, or its name under ./runs, to check its trained weights (default: random ones)."""
    combinations: int = 50
    """Random combinations of switches."""
    seed: int = 0
    """Seed of weights, inputs and combinations."""
    json: bool = False
    """Print one JSON object at the end."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab import check, differences

    flags = parse(Flags, argv, "glasslm check", DESCRIPTION)

    def sections() -> Iterator[tuple[str, Iterator[differences.Finding]]]:
        if flags.run is not None:
            yield "the trained model", check.check_run(flags.run, flags.seed)
        else:
            yield "operations", check.check_ops(flags.seed)
            yield "the whole model", check.check_models(flags.combinations, flags.seed)

    out = sys.stderr if flags.json else sys.stdout
    findings, begin = [], time.perf_counter()
    print(f"hand-written gradients against central differences (h {differences.H:g}, float64)", file=out)
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
    wrong = [finding.case for finding in findings if not finding.passed]
    elements = sum(finding.elements for finding in findings)
    summary = (
        f"{len(findings)} cases, {elements:,} elements, {time.perf_counter() - begin:.0f} s: "
        + (f"{len(wrong)} wrong" if wrong else f"all within {differences.TOLERANCE:g}")
    )  # fmt: skip
    print(f"\n{summary}", file=out)
    if flags.json:
        worst = float(np.max([finding.error for finding in findings]))  # NaN if one of them is
        facts = {"passed": not wrong, "cases": len(findings), "elements": elements, "largest_error": worst}
        print(json.dumps(plain(facts | {"tolerance": differences.TOLERANCE, "wrong": wrong})))
    return 1 if wrong else 0
