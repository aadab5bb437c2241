"""glasslm ablate: what each choice of a model is worth, one thing changed at a time, over several seeds."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

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
from glasslm.lab.studies.axes import AXES, Match
from glasslm.lab.studies.sweep import RunnerName
from glasslm.runs.metrics import plain
from glasslm.text import quoted, tell

DESCRIPTION = f"""What each choice is worth: a baseline, and variants of it with one thing changed, over paired seeds.

The baseline is a preset with the flags of `glasslm train`. Axes: {", ".join(AXES)}; each with a course's values, or
with yours: --axes depth=2/4/8,activation. One core a run; a study that was interrupted goes on with the same command
and --out. Verdicts: paired t over the seeds, Holm over all comparisons; a run that diverged is a result.

Examples:
  glasslm ablate --axes depth,activation --seeds 3 --budget 45m
  glasslm ablate --axes norm --match time --text-file book.txt
  glasslm ablate --axes optimizer --rates 0.3/1/3 --runner ray"""


@dataclass(frozen=True)
class Flags:
    """What varies, and around which baseline."""

    axes: str = "depth,width,heads,activation,norm"
    """What is varied, by name, with commas between; NAME=A/B/C for values of your own (norm=A/pre|B/post)."""
    seeds: int = 3
    """Runs of each variant, with the same seeds for all."""
    budget: str | None = None
    """Time for the whole study, such as 45m: the number of steps is fixed to fit."""
    match: Match = "tokens"
    """What is equal for all: tokens, FLOPs, time, or parameters (by the width)."""
    rates: str = ""
    """Learning rates to try for each variant, as multiples of its own, such as 0.3/1/3, on a seed of their own."""
    margin: float | None = None
    """Nats that would be too little to matter: what is within is called the same (TOST)."""
    runner: RunnerName = "local"
    """local: processes on this machine, one core each; ray: the cores of a cluster (pip install 'glasslm[ray]')."""
    address: str | None = None
    """Of the Ray cluster (default: one on this machine)."""
    workers: int = 0
    """Runs at once (0: one for each core)."""
    out: Path | None = None
    """The study's folder (default: a new one under ./runs); an interrupted study there goes on."""
    json: bool = False
    """Print one JSON object at the end."""
    preset: str = "tiny"
    """The baseline: a named model with its recipe."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: Annotated[DeviceConfig, tyro.conf.arg(name="")] = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    from glasslm.lab.studies import ablation, ablation_report
    from glasslm.lab.studies.sweep import Runner
    from glasslm.runs import run_folder

    flags = parse(argv)
    require(flags.seeds >= 1, "seeds", flags.seeds, "at least 1")
    require(flags.workers >= 0, "workers", flags.workers, "0 (one for each core) or more")
    study = run_folder.study_folder(flags.out, "ablation", flags.preset)
    asked = ablation.Asked(
        tuple(flags.axes.split(",")),
        flags.seeds,
        flags.match,
        flags.margin,
        _rates(flags.rates),
        flags.budget,
    )
    runner = Runner(
        ComputeConfig(**vars(flags.compute)), flags.runner, flags.address, flags.workers
    )
    base = RunConfig(flags.model, flags.data, flags.optimizer, flags.train)
    made = ablation.plan(base, asked, runner, study, tell)
    tell(f"the study is in {study}: the same command with --out {quoted(study)} goes on with it")
    results = ablation.run(made, study, runner, shlex.join(["glasslm", "ablate", *argv]), tell)
    page = ablation_report.write(study, made, results)
    text = ablation_report.text(made, results)
    if flags.json:
        tell(text)
        facts = [
            {"variant": one.name, "axis": one.axis, "value": one.value, "parameters": one.parameters,
             "losses": one.losses, "delta": one.comparison.delta if one.comparison else None,
             "p_holm": one.verdict.p_holm if one.verdict else None,
             "verdict": one.verdict.words if one.verdict else "the baseline"}
            for one in results
        ]  # fmt: skip
        found = {"study": str(study), "report": str(page), "variants": facts}
        print(json.dumps(plain(found | {"findings": ablation_report.findings(made, results)})))
    else:
        print(f"{text}\n\nreport: {page}\nstudy: {study}")
    return 1 if any(row.status == "failed" for one in results for row in one.rows) else 0


def parse(argv: list[str]) -> Flags:
    """The flags over the preset that they name."""
    from glasslm.cli.parsing import over_preset

    return over_preset(Flags, argv, "glasslm ablate", DESCRIPTION)


def _rates(text: str) -> tuple[float, ...]:
    if not text:
        return ()
    try:
        rates = tuple(sorted(float(word) for word in text.split("/")))
    except ValueError:
        raise InputError(
            f"--rates {text}: expected multiples of the rate such as 0.3/1/3"
        ) from None
    require(len(rates) >= 3 and rates[0] > 0, "rates", text, "three multiples at least, above 0")
    return rates
