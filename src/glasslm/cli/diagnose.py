"""glasslm diagnose: faults of a run, a configuration or a loss curve, and what to do about them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.cli.flag_groups import RUN_HELP, JsonFlag, RecipeFlags
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import ComputeConfig, DataConfig, OperationsConfig
from glasslm.errors import InputError
from glasslm.report.findings import SEVERITY, Finding, worst_verdict
from glasslm.runs.metrics import to_json_types
from glasslm.text import notify, print_escaped

DESCRIPTION = """Report faults, their meaning and what to do: one verdict for each signal, ok,
watch or bad. The exit code is 1 if a signal is bad.

With RUN (finished, interrupted or still training) it examines the weights of
several checkpoints and the history. It also trains copies of the first weights:
on one batch, to overfit it, and on a range of learning rates. Without RUN it
examines a configuration before training, given by the flags of `glasslm train`.
The run is only read; the result is a page with figures. The preset tiny takes
about 20 seconds.

Examples:
  glasslm diagnose shakespeare-quick-20260314-153000
  glasslm diagnose --preset nanogpt --lr 3e-3 --text-file book.txt
  glasslm diagnose RUN --replay 1200    the batch of a spike, row by row
  glasslm diagnose --curve log.csv      a loss curve of any program
  glasslm diagnose --curve A1 A2 --against B1 B2    two kinds of runs, by their seeds
  glasslm diagnose --cookbook           training with and without each technique"""

OUT = Path("diagnosis")


@dataclass(frozen=True, kw_only=True)
class Flags(RecipeFlags):
    """A run, or the settings of one."""

    run: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(
            metavar="[RUN]",
            help=RUN_HELP,
            help_behavior_hint="(default: the configuration of the flags)",
        ),
    ] = None
    replay: Annotated[int | None, optional_flag("STEP", "none")] = None
    """Replay this step of RUN and show its batch, row by row."""
    curve: Annotated[tuple[Path, ...], optional_flag("FILE...", "none")] = ()
    """Diagnose a loss curve instead: CSV, JSON, TensorBoard events or the log of any program.
    Two files are compared."""
    against: Annotated[tuple[Path, ...], optional_flag("FILE...", "none")] = ()
    """Compare the curves of --curve, of several seeds, with these."""
    columns: Annotated[tuple[str, ...], optional_flag("NAME=COLUMN...", "known names")] = ()
    """Columns of --curve: step, loss, val_loss, grad_norm or lr, as in loss=total."""
    cookbook: bool = False
    """Train small models with and without each technique that stabilizes training instead."""
    out: Annotated[
        Path | None,
        optional_flag("PATH", "diagnosis, in the folder of RUN if given; of curves diagnosis-FILE"),
    ] = None
    """Folder of the page and its figures."""
    json: JsonFlag = False
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    from glasslm.runs.protection import open_run
    from glasslm.runs.recorded_operations import admit_run_operations

    flags = parse(argv)
    if len(flags.curve) == 1 and not flags.against:
        return _diagnose_curve(flags, flags.curve[0])
    if flags.curve:
        return _compare_curves(flags)
    if flags.cookbook:
        return _run_cookbook(flags)
    if flags.run is None:
        return _diagnose(None, flags)
    run = open_run(flags.run, with_log=True)
    admit_run_operations(run, flags.operations.ops)
    if flags.replay is not None:
        return _replay_step(run.path, flags.replay, flags)
    return _diagnose(run.path, flags)


def parse(argv: list[str]) -> Flags:
    """The flags, over the settings of the run or of the preset."""
    from glasslm.cli import parsing
    from glasslm.runs.protection import open_run

    run = argv[0] if argv and not argv[0].startswith("-") else None
    if run is not None:
        name, config = "tiny", open_run(run).config
    elif base := parsing.flag_value("--init-from", argv, default=""):
        name, config = "tiny", parsing.fine_tuning_recipe(base, argv)
    else:
        recipe = parsing.choose_recipe(argv)
        name, config = recipe.preset, parsing.recipe_config(recipe, argv)
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    parts["operations"] = OperationsConfig()
    flags = parsing.parse(
        Flags, argv, "glasslm diagnose", DESCRIPTION, default=Flags(run=run, preset=name, **parts)
    )
    if flags.run != run:
        raise InputError("RUN comes first, as in glasslm diagnose RUN")
    _refuse_unread(flags, argv)
    own_settings = dataclasses.replace(flags.config, operations=config.operations)
    has_new_operations = bool(flags.operations.ops) and not config.operations.ops
    if run is not None and (own_settings != config or flags.preset != name or has_new_operations):
        raise InputError(
            "RUN has its own settings: leave out the flags of model, data, optimizer and training"
        )
    return flags


def _refuse_unread(flags: Flags, argv: list[str]) -> None:
    """Raise InputError for a flag that --replay, --curve or --cookbook would ignore."""
    from glasslm.cli.parsing import require_read

    if flags.replay is not None and flags.run is None:
        raise InputError("--replay needs a run: glasslm diagnose RUN --replay STEP")
    for name in ("columns", "against"):
        if getattr(flags, name) and not flags.curve:
            raise InputError(f"--{name} is for --curve FILE: give both")
    if not flags.curve and not flags.cookbook:
        return
    mode, parts = ("--curve", ()) if flags.curve else ("--cookbook", (DataConfig, ComputeConfig))
    read_flags = {mode, "--out", "--json"} | (
        {"--columns", "--against"} if mode == "--curve" else set()
    )
    read_flags |= {
        "--" + config_field.name.replace("_", "-")
        for part in parts
        for config_field in dataclasses.fields(part)
    }
    require_read(mode, argv, read_flags)
    if flags.run is not None:
        raise InputError(f"{mode} does not read RUN: leave one of them out")


def _diagnose(run_dir: Path | None, flags: Flags) -> int:
    from glasslm.lab.diagnosis import diagnose, diagnosis_input

    if run_dir is not None:
        target = diagnosis_input.input_from_run(run_dir, flags.compute, notify)
    else:
        target = diagnosis_input.input_from_config(flags.config, flags.compute, notify)
    diagnosis = diagnose.diagnose(target, notify)
    notify("drawing the figures and writing the page")
    page = diagnosis.write(flags.out or (run_dir / OUT if run_dir is not None else OUT))
    return _print_findings(diagnosis.text(), diagnosis.findings, page, flags.json)


def _diagnose_curve(flags: Flags, file: Path) -> int:
    from glasslm.lab.diagnosis import curves
    from glasslm.lab.diagnosis.curve_figure import draw_curve
    from glasslm.lab.diagnosis.curve_files import read_curve
    from glasslm.lab.diagnosis.diagnose import Diagnosis
    from glasslm.report.page import Picture

    curve = read_curve(file, flags.columns)
    for message in curve.messages:
        notify(message)
    diagnosis = Diagnosis(f"Diagnosis of the curve {curve.name}", curves.judge_curve(curve))
    diagnosis.pictures.append(
        Picture("curve", "The curve and its anomalies", lambda p: draw_curve(curve, p))
    )
    # A folder for each file: another curve beside it keeps its page.
    page = diagnosis.write(flags.out or Path(f"{OUT}-{curve.name.replace('.', '-')}"))
    facts = curves.curve_facts(curve) | {"read": list(curve.messages)}
    return _print_findings(diagnosis.text(), diagnosis.findings, page, flags.json, facts)


def _compare_curves(flags: Flags) -> int:
    from glasslm.lab.diagnosis.curve_comparison import compare_curves, draw_comparison
    from glasslm.lab.diagnosis.curve_files import read_curve
    from glasslm.report import page
    from glasslm.report.page import Picture, Section

    first, second = flags.curve, flags.against
    if not second:
        if len(first) > 2:
            raise InputError(
                f"{len(first)} curves were given: two are compared, or several seeds of two kinds, "
                "as --curve A1 A2 --against B1 B2"
            )
        first, second = first[:1], first[1:]
    sides = [[read_curve(file, flags.columns) for file in side] for side in (first, second)]
    for curve in (*sides[0], *sides[1]):
        for message in curve.messages:
            notify(f"{curve.name}: {message}")
    comparison = compare_curves(*sides)
    sentences = comparison.sentences()
    picture = Picture("curves", "The curves", lambda colours: draw_comparison(comparison, colours))
    names = "-".join(curve.name.replace(".", "-") for curve in (sides[0][0], sides[1][0]))
    path = page.write(
        flags.out or Path(f"{OUT}-{names}"[:120]),
        "comparison",
        "Comparison of curves",
        sentences[0],
        [Section("Result", sentences[1:], pictures=(picture,))],
    )
    text = "\n".join([*sentences, f"page: {path}"])
    print_escaped(text, sys.stderr if flags.json else sys.stdout)
    if flags.json:
        print(json.dumps(to_json_types({**comparison.facts, "page": str(path)})))
    return 0


def _replay_step(run_dir: Path, step: int, flags: Flags) -> int:
    from glasslm.lab.diagnosis import replay
    from glasslm.report import page

    step_replay = replay.replay_step(run_dir, step, flags.compute, notify)
    title = f"Step {step:,} of {run_dir.name}"
    lead = f"replayed from the checkpoint of step {step_replay.resumed_from:,}"
    path = page.write(
        flags.out or run_dir / OUT,
        f"replay-{step}",
        title,
        lead,
        replay.build_sections(step_replay),
    )
    return _print_findings(
        replay.format_replay(step_replay), step_replay.findings, path, flags.json
    )


def _run_cookbook(flags: Flags) -> int:
    from glasslm.lab.diagnosis import cookbook

    out_dir = flags.out or OUT
    results = cookbook.run_cookbook(flags.data, flags.compute, out_dir, notify)
    text = f"{cookbook.format_text(results)}\npage: {out_dir / 'cookbook.html'}"
    print_escaped(text, sys.stderr if flags.json else sys.stdout)
    if flags.json:
        print(json.dumps(to_json_types(dict(cookbook.json_facts(results)))))
    return 0


def _print_findings(
    text: str,
    findings: Sequence[Finding],
    page: Path,
    as_json: bool,
    further: Mapping[str, object] | None = None,
) -> int:
    """Print the findings, and `further` facts as JSON. Returns the exit code."""
    verdict = worst_verdict(findings)
    print_escaped(f"{text}\npage: {page}", sys.stderr if as_json else sys.stdout)
    if as_json:
        facts = {
            "verdict": verdict,
            "findings": [finding.facts for finding in findings],
            "page": str(page),
            **(further or {}),
        }
        print(json.dumps(to_json_types(facts)))
    return 1 if SEVERITY[verdict] == SEVERITY["bad"] else 0
