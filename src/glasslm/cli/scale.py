"""glasslm scale: a scaling law of a ladder of runs or of anybody's table; what to train with a given compute."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from glasslm.config.schema import (
    ComputeConfig,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.errors import InputError, require
from glasslm.lab.studies.sweep import RunnerName
from glasslm.runs.metrics import plain
from glasslm.text import quoted, tell

if TYPE_CHECKING:
    from glasslm.lab.scaling.fit_report import Analysis

DESCRIPTION = """How loss depends on size and tokens: a law with intervals, a backtest, a prediction that is checked.

--budget trains a ladder of sizes at several computes, planned to fit a time (or FLOPs, as a plain number): learning
rates are tuned by size, every run decays to its end, and a run of four times the largest compute is predicted in
writing before it is trained. The recipe is a preset with the flags of `glasslm train`. --fit takes a CSV file with the
columns N (parameters), D (training tokens) or C (training FLOPs), and loss: three sizes on three token budgets at
least; five by four is a design.

Examples:
  glasslm scale --budget 40m
  glasslm scale --fit runs.csv
  glasslm scale --plan 1e15
  glasslm scale --fit runs.csv --plan 1e15"""


@dataclass(frozen=True)
class Flags:
    """What to train, what to fit, what to plan."""

    budget: Annotated[str | None, tyro.conf.arg(metavar="TIME|FLOPS")] = None
    """Train a ladder, and the run that it predicts, in this time (30m) or with this compute (1e14)."""
    fit: Annotated[Path | None, tyro.conf.arg(metavar="TABLE.csv")] = None
    """Fit the law to runs of your own instead."""
    plan: Annotated[float | None, tyro.conf.arg(metavar="FLOPS")] = None
    """A compute to divide between size and tokens: by 20 tokens a parameter, and by the fit, if there is one."""
    runner: RunnerName = "local"
    """local: processes on this machine, one core each; ray: the cores of a cluster (pip install 'glasslm[ray]')."""
    address: str | None = None
    """Of the Ray cluster (default: one on this machine)."""
    workers: int = 0
    """Runs at once (0: one for each core)."""
    out: Path | None = None
    """The study's folder (default: a new one under ./runs, or scaling beside the table); one there goes on."""
    json: bool = False
    """Print one JSON object at the end."""
    preset: str = "tiny"
    """The recipe: a named model, whose width is varied."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: Annotated[DeviceConfig, tyro.conf.arg(name="")] = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    from glasslm.lab.scaling import fit_report
    from glasslm.lab.scaling.plan import plan

    flags = parse(argv)
    require(flags.workers >= 0, "workers", flags.workers, "0 (one for each core) or more")
    if flags.budget is not None and flags.fit is not None:
        raise InputError("both --budget and --fit were given: choose one of them")
    facts: dict[str, Any] = {}
    said = []
    found: Analysis | None = None
    if flags.budget is not None:
        found, page, study = _ladder(flags, flags.budget, argv)
        facts["study"] = str(study)
    elif flags.fit is not None:
        found, page = _table(flags, flags.fit)
    elif flags.plan is None:
        raise InputError(
            "nothing to do: give --budget TIME, --fit TABLE.csv, --plan FLOPS, or two of them"
        )
    if found:
        facts |= fit_report.as_json(found) | {"report": str(page)}
        said += [fit_report.text(found), f"report: {page}"]
    if flags.plan is not None:
        made = plan(flags.plan, found.boot if found else None)
        facts["plan"] = {
            name: {"N": choice.N, "D": choice.D, "loss": choice.loss.value if choice.loss else None}
            for name, choice in (("rule", made.rule), ("fit", made.fitted))
            if choice is not None
        }
        said.append(fit_report.plan_text(made))
    print(json.dumps(plain(facts)) if flags.json else "\n\n".join(said))
    return 0


def parse(argv: list[str]) -> Flags:
    """The flags over the preset that they name."""
    from glasslm.cli.parsing import over_preset

    return over_preset(Flags, argv, "glasslm scale", DESCRIPTION)


def _table(flags: Flags, path: Path) -> tuple[Analysis, Path]:
    from glasslm.lab.scaling import fit_report
    from glasslm.lab.scaling.table import read

    runs, lost = read(path)
    for line in lost:
        tell(f"note: {line}")
    found = fit_report.analyse(runs)
    return found, fit_report.write(
        flags.out or path.parent / "scaling", found, f"Scaling law of {path.name}"
    )


def _ladder(flags: Flags, budget: str, argv: list[str]) -> tuple[Analysis, Path, Path]:
    from glasslm.lab.studies import scaling_report, scaling_study
    from glasslm.lab.studies.sweep import Runner
    from glasslm.runs import run_folder

    folder = run_folder.study_folder(flags.out, "scaling", flags.preset)
    tell(f"the study is in {folder}: the same command with --out {quoted(folder)} goes on with it")
    base = RunConfig(flags.model, flags.data, flags.optimizer, flags.train)
    runner = Runner(
        ComputeConfig(**vars(flags.compute)), flags.runner, flags.address, flags.workers
    )
    study = scaling_study.study(
        base, budget, runner, folder, tell, shlex.join(["glasslm", "scale", *argv])
    )
    return study.found, scaling_report.write(folder, study), folder
