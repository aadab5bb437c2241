"""glasslm diagnose: what is wrong with a run, a configuration or a loss curve, why, and what to do."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.config.schema import (
    ComputeConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.errors import InputError
from glasslm.report.findings import SEVERITY, Finding, worst
from glasslm.runs.metrics import plain
from glasslm.text import tell

DESCRIPTION = """Say what is wrong, what it means and what to do, one verdict for each signal: ok, watch or bad.

With RUN (finished, interrupted or under way): its weights at several checkpoints, its history, and copies of its first
weights that learn one batch by heart and try all learning rates. Without RUN: the same of a configuration, before it is
trained; the flags are those of `glasslm train`. Nothing is written but a page with figures, and the run is only read.
Some twenty seconds for the preset tiny. The exit code is 1 if something is bad.

Examples:
  glasslm diagnose shakespeare-tiny-20260314-153000
  glasslm diagnose --preset nanogpt --lr 3e-3 --text-file book.txt
  glasslm diagnose RUN --replay 1200       the batch of a spike, row by row
  glasslm diagnose --curve log.csv         anybody's loss curve
  glasslm diagnose --cookbook              what keeps training stable, shown by leaving it out"""

OUT = Path("diagnosis")


@dataclass(frozen=True)
class Flags:
    """A run, or all that can be said about one."""

    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RUN]")] = None
    """A run's folder, or its name under ./runs (default: the configuration that the flags describe)."""
    replay: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None
    """Go back to this step of RUN and show its batch, row by row."""
    curve: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A loss curve instead, as CSV, JSON lines or a log."""
    cookbook: bool = False
    """Train small models with and without each trick of stability instead."""
    out: Path | None = None
    """Folder for the page and its figures (default: diagnosis, inside RUN if there is one)."""
    json: bool = False
    """Print one JSON object at the end: verdict, findings, page."""
    preset: str = "tiny"
    """A named model with its recipe, where there is no RUN."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    @property
    def config(self) -> RunConfig:
        return RunConfig(self.model, self.data, self.optimizer, self.train)


def main(argv: list[str]) -> int:
    from glasslm.runs import run_folder

    flags = parse(argv)
    if flags.curve is not None:
        return _curve(flags.curve, flags.out or OUT, flags.json)
    if flags.cookbook:
        return _cookbook(flags)
    run_dir = run_folder.find(flags.run) if flags.run is not None else None
    if flags.replay is not None and run_dir is not None:
        return _replay(run_dir, flags.replay, flags)
    return _diagnose(run_dir, flags)


def parse(argv: list[str]) -> Flags:
    """The flags over what the run, or the preset, says."""
    from glasslm.cli import parsing
    from glasslm.runs import run_folder

    run = argv[0] if argv and not argv[0].startswith("-") else None
    if run is not None:
        name, config = "tiny", run_folder.Run(run_folder.find(run)).config
    elif base := parsing.value_of("--init-from", argv, default=""):
        name, config = "tiny", parsing.recipe_of(base, argv)
    else:
        name, config = parsing.preset_of(argv)
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    flags = parsing.parse(
        Flags, argv, "glasslm diagnose", DESCRIPTION, default=Flags(run=run, preset=name, **parts)
    )
    if flags.run != run:
        raise InputError("RUN comes first: glasslm diagnose RUN")
    _refuse_unread(flags, argv)
    if run is not None and (flags.config != config or flags.preset != name):
        raise InputError(
            "RUN says how it was trained: leave out the flags of model, data, optimizer and training"
        )
    return flags


def _refuse_unread(flags: Flags, argv: list[str]) -> None:
    """A curve and the cookbook read few of the flags: the others would be dropped in silence."""
    if flags.replay is not None and flags.run is None:
        raise InputError(
            "--replay goes back to a step of a run: glasslm diagnose RUN --replay STEP"
        )
    if flags.curve is None and not flags.cookbook:
        return
    mode, parts = (
        ("--curve", ()) if flags.curve is not None else ("--cookbook", (DataConfig, ComputeConfig))
    )
    read = {mode, "--out", "--json"}
    read |= {
        "--" + each.name.replace("_", "-") for part in parts for each in dataclasses.fields(part)
    }
    given = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    unread = [flag for flag in given if flag.replace("--no-", "--") not in read]
    if flags.run is not None or unread:
        what = unread[0] if unread else "RUN"
        raise InputError(
            f"{mode} stands for itself and would not read {what}: leave one of them out"
        )


def _diagnose(run_dir: Path | None, flags: Flags) -> int:
    from glasslm.lab.diagnosis import diagnose

    if run_dir is not None:
        subject = diagnose.of_run(run_dir, flags.compute, tell)
    else:
        subject = diagnose.of_config(flags.config, flags.compute, tell)
    made = diagnose.diagnose(subject, tell)
    page = made.write(flags.out or (run_dir / OUT if run_dir is not None else OUT))
    return _finish(made.text(), made.findings, page, flags.json)


def _curve(file: Path, out: Path, as_json: bool) -> int:
    """Anybody's loss curve."""
    from glasslm.lab.diagnosis import curves
    from glasslm.lab.diagnosis.diagnose import Diagnosis
    from glasslm.report.page import Picture

    curve = curves.read(file)
    made = Diagnosis(f"Diagnosis of the curve {curve.name}", curves.findings(curve))
    made.pictures.append(
        Picture("curve", "The curve, and what stands out", lambda p: curves.draw(curve, p))
    )
    return _finish(made.text(), made.findings, made.write(out), as_json)


def _replay(run_dir: Path, step: int, flags: Flags) -> int:
    """One step of a run, brought back."""
    from glasslm.lab.diagnosis import replay
    from glasslm.report import page

    found = replay.replay(run_dir, step, flags.compute, tell)
    title, lead = (
        f"Step {step:,} of {run_dir.name}",
        f"replayed from the checkpoint of step {found.resumed_from:,}",
    )
    written = page.write(
        flags.out or run_dir / OUT, f"replay-{step}", title, lead, replay.sections(found)
    )
    return _finish(replay.text(found), found.findings, written, flags.json)


def _cookbook(flags: Flags) -> int:
    """The tricks that keep training stable, each shown by leaving it out."""
    from glasslm.lab.diagnosis import cookbook

    out = flags.out or OUT
    cooked = cookbook.cook(flags.data, flags.compute, out, tell)
    where = sys.stderr if flags.json else sys.stdout
    print(f"{cookbook.text(cooked)}\npage: {out / 'cookbook.html'}", file=where, flush=True)
    if flags.json:
        print(json.dumps(plain(dict(cookbook.facts(cooked)))))
    return 0


def _finish(text: str, findings: Sequence[Finding], page: Path, as_json: bool) -> int:
    """Print what was found; the exit code."""
    verdict = worst(findings)
    print(f"{text}\npage: {page}", file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        facts = {
            "verdict": verdict,
            "findings": [dataclasses.asdict(one) for one in findings],
            "page": str(page),
        }
        print(json.dumps(plain(facts)))
    return 1 if SEVERITY[verdict] == SEVERITY["bad"] else 0
