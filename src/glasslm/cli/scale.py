"""glasslm scale: a scaling law fitted to a table of runs, and what to train with a given compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.errors import InputError
from glasslm.metrics import plain
from glasslm.wording import tell

DESCRIPTION = """A scaling law fitted to anybody's runs, with intervals and a backtest; what to train with a compute.

The table is a CSV file with the columns N (parameters), D (training tokens) or C (training FLOPs), and loss. At least
three sizes on three token budgets each; five by four is a design.

Examples:
  glasslm scale --fit runs.csv
  glasslm scale --plan 1e15
  glasslm scale --fit runs.csv --plan 1e15"""


@dataclass(frozen=True)
class Flags:
    """What to fit, what to plan."""

    fit: Annotated[Path | None, tyro.conf.arg(metavar="TABLE.csv")] = None
    """Runs to fit the law to."""
    plan: Annotated[float | None, tyro.conf.arg(metavar="FLOPS")] = None
    """A compute to divide between size and tokens: by 20 tokens a parameter, and by the fit, if there is one."""
    out: Path | None = None
    """Folder for fit.json, the figures and the report (default: scaling, beside the table)."""
    json: bool = False
    """Print one JSON object at the end."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.scaling import fitted
    from glasslm.lab.scaling.plan import plan
    from glasslm.lab.scaling.table import read

    flags = parse(Flags, argv, "glasslm scale", DESCRIPTION)
    if flags.fit is None and flags.plan is None:
        raise InputError("nothing to do: give --fit TABLE.csv, --plan FLOPS, or both")
    found = None
    facts: dict[str, object] = {}
    said = []
    if flags.fit is not None:
        runs, lost = read(flags.fit)
        for line in lost:
            tell(f"note: {line}")
        found = fitted.analyse(runs)
        page = fitted.write(flags.out or flags.fit.parent / "scaling", found, f"Scaling law of {flags.fit.name}")
        facts |= fitted.as_json(found) | {"report": str(page)}
        said += [fitted.text(found), f"report: {page}"]
    if flags.plan is not None:
        made = plan(flags.plan, found.boot if found else None)
        facts["plan"] = {
            name: {"N": choice.N, "D": choice.D, "loss": choice.loss.value if choice.loss else None}
            for name, choice in (("rule", made.rule), ("fit", made.fitted))
            if choice is not None
        }
        said.append(fitted.plan_text(made))
    print(json.dumps(plain(facts)) if flags.json else "\n\n".join(said))
    return 0
