"""glasslm scale: fit a scaling law to a ladder of runs or to a table; plan a compute budget."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from glasslm.cli.flag_groups import REFUSED_IN_STUDIES, JsonFlag, RecipeFlags
from glasslm.cli.study_flags import RunnerFlags
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import DeviceConfig
from glasslm.errors import InputError, require
from glasslm.lab.studies.measures import MeasureName
from glasslm.lab.tables.numbers import parse_number
from glasslm.runs.metrics import to_json_types
from glasslm.text import notify, print_result

if TYPE_CHECKING:
    from glasslm.lab.scaling.analysis import Analysis
    from glasslm.lab.scaling.law import Law

DESCRIPTION = """Fit the loss as a function of model size and tokens: a law with confidence
intervals, a backtest, and a prediction that is checked.

--budget trains a ladder of sizes, planned to fit a time or a compute in FLOPs.
Learning rates are tuned by size, and every run decays to its end. The loss of
a run with four times the largest compute is predicted, and written down, before
that run is trained. The recipe is the preset tiny, or that of --preset, with
flags of `glasslm train`, whose own default is quick.

--fit reads a table (CSV, JSON, JSON lines) of parameters, training tokens or
training FLOPs, and final losses, under any usual names; --columns says which is
which. It needs at least three sizes on three token budgets; five by four is
better. The fit gets a verdict: good, usable, doubtful or worthless, with its
reasons; the exit code of --fit is 1 for the last two.

Examples:
  glasslm scale --budget 40m
  glasslm scale --fit runs.csv
  glasslm scale --fit runs.csv --predict 1e9,2e10
  glasslm scale --plan 1e15
  glasslm scale --fit runs.csv --plan 1e15"""

PLAN_FLAGS = {"--plan", "--measure", "--json"}  # without --budget or --fit
FIT_FLAGS = PLAN_FLAGS | {"--fit", "--columns", "--delta", "--tie", "--law", "--predict", "--out"}


@dataclass(frozen=True, kw_only=True)
class Flags(RecipeFlags):
    """The runs to train, the table to fit, the compute to plan."""

    hidden_fields = REFUSED_IN_STUDIES | {"max_steps"}

    budget: Annotated[str | None, optional_flag("TIME|FLOPS", "none")] = None
    """Train a ladder and its predicted run in this time (30m) or compute (1e14)."""
    fit: Annotated[Path | None, optional_flag("TABLE.csv", "none")] = None
    """Fit the law to the runs of a table instead."""
    columns: Annotated[tuple[str, ...], optional_flag("NAME=COLUMN...", "known names")] = ()
    """Columns of --fit: N, D, C, loss, seed, unique (tokens) or ratio (D/N), as in N=size*1e6."""
    measure: MeasureName = "loss"
    """What a ladder measures and fits: the loss, or the error rate of a task's answers."""
    delta: float = 1e-3
    """Delta of the Huber loss of --fit; inf is least squares."""
    tie: Annotated[
        Literal["alpha=beta", "eta"] | None, optional_flag("alpha=beta|eta", "two exponents")
    ] = None
    """Fit one exponent for size and tokens, and test it. eta is half of it, the exponent of compute
    in L = E + (a M^eta + b M^-eta) C^-eta with M = D/N (Gadre et al. 2024)."""
    law: Annotated[str | None, optional_flag("A,B,E,alpha,beta", "none")] = None
    """Test whether the runs of --fit accept this law."""
    predict: Annotated[tuple[str, ...], optional_flag("N,D...", "none")] = ()
    """Predict the loss of N parameters after D tokens, with its interval: 1e9,2e10."""
    plan: Annotated[float | None, optional_flag("FLOPS", "none")] = None
    """Divide this compute between size and tokens: by 20 tokens per parameter, and by the fit."""
    out: Annotated[Path | None, optional_flag("PATH", "a new one under ./runs")] = None
    """Folder of the study (with --fit: scaling-TABLE, beside it).
    An interrupted study in it continues."""
    json: JsonFlag = False
    runner: RunnerFlags = field(default_factory=RunnerFlags)
    compute: DeviceConfig = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    from glasslm.lab.scaling import fit_report
    from glasslm.lab.scaling.analysis import to_json
    from glasslm.lab.scaling.fixed_law import parse_law
    from glasslm.lab.scaling.plan import plan_compute

    flags = parse(argv)
    _require_mode(flags, argv)
    # Errors in them are told before the work, which may take hours.
    predictions = [_parse_prediction(text) for text in flags.predict]
    law = parse_law(flags.law) if flags.law is not None else None
    require(flags.plan is None or 0 < flags.plan < math.inf, "--plan", flags.plan, "FLOPs above 0")
    facts: dict[str, Any] = {}
    paragraphs: list[str] = []
    analysis: Analysis | None = None
    if flags.budget is not None:
        analysis, page, study = _run_ladder(flags, flags.budget, argv)
        facts["study"] = str(study)
    elif flags.fit is not None:
        analysis, page = _fit_table(flags, flags.fit)
    if analysis:
        facts |= to_json(analysis) | {"report": str(page)}
        paragraphs += [fit_report.summary(analysis)]
        further_facts, further = _further_questions(
            analysis, law, predictions, flags.tie is not None
        )
        facts |= further_facts
        paragraphs += [*further, f"report: {page}"]
    if flags.plan is not None:
        plan = plan_compute(flags.plan, analysis.bootstrap if analysis else None)
        facts["plan"] = {
            name: {"N": choice.N, "D": choice.D, "loss": choice.loss.value if choice.loss else None}
            for name, choice in (("rule", plan.rule), ("fit", plan.fitted))
            if choice is not None
        }
        paragraphs.append(fit_report.format_plan(plan))
    print_result(json.dumps(to_json_types(facts)) if flags.json else "\n\n".join(paragraphs))
    is_bad = analysis is not None and analysis.quality.verdict in ("doubtful", "worthless")
    return 1 if is_bad and flags.fit is not None else 0  # a ladder that was trained is done


def _require_mode(flags: Flags, argv: list[str]) -> None:
    """Raise InputError for flags that do not go together, or that would be ignored."""
    from glasslm.cli.parsing import given_fields, require_read

    given = given_fields(argv)
    if "max_steps" in given:
        raise InputError(
            "--max-steps does not work here, where each size has the steps that its share of "
            "--budget allows: leave it out"
        )
    if flags.budget is not None and flags.fit is not None:
        raise InputError("both --budget and --fit were given: choose one of them")
    if flags.measure != "loss" and flags.budget is None:
        raise InputError("--measure is for a ladder: give --budget as well, or leave it out")
    if flags.fit is None:
        for name in ("columns", "law", "tie", "delta"):
            if name in given:
                raise InputError(f"--{name} is for --fit TABLE: give both")
        if flags.predict and flags.budget is None:
            raise InputError("--predict needs a fit: give --fit TABLE or --budget as well")
    if flags.budget is None and flags.fit is None and flags.plan is None:
        raise InputError(
            "nothing to do: give --budget TIME, --fit TABLE.csv, --plan FLOPS, or two of them"
        )
    if flags.budget is None:
        mode, read_flags = ("--plan", PLAN_FLAGS) if flags.fit is None else ("--fit", FIT_FLAGS)
        require_read(mode, argv, read_flags)


def _further_questions(
    analysis: Analysis, law: Law | None, predictions: Sequence[tuple[float, float]], is_tied: bool
) -> tuple[dict[str, Any], list[str]]:
    """The answers to --law, --tie and --predict: for JSON, and as paragraphs."""
    from glasslm.lab.scaling import fit_report, fixed_law
    from glasslm.lab.scaling.plan import extrapolation_warning

    facts: dict[str, Any] = {}
    paragraphs = []
    if is_tied:
        tie = fixed_law.compare_tie(analysis.runs)
        facts["tie"] = {"accepted": tie.accepted, "p": tie.p}
        paragraphs.append(tie.sentence)
    if law is not None:
        test = fixed_law.compare_law(law, analysis.runs)
        facts["law"] = {"accepted": test.accepted, "p": test.p, "mean_error": test.mean_error}
        paragraphs.append(test.sentence)
    for N, D in predictions:
        predicted = analysis.bootstrap.prediction(N, D)
        facts.setdefault("predict", []).append({"N": N, "D": D, "loss": vars(predicted)})
        warning = extrapolation_warning(6 * N * D, analysis.bootstrap.fit.largest_C)
        paragraphs.append(
            f"N = {N:.4g}, D = {D:.4g}: a loss of {fit_report.format_interval(predicted, '.4f')} "
            f"(95%, one run).{' ' + warning if warning else ''}"
        )
    return facts, paragraphs


def _parse_prediction(text: str) -> tuple[float, float]:
    """N and D of a --predict. Raises InputError unless they are two numbers above 0."""
    try:
        N, D = (parse_number(part) for part in text.split(","))
    except ValueError:
        N = D = None
    if N is None or D is None or not (0 < N < math.inf and 0 < D < math.inf):
        raise InputError(f"--predict {text}: expected N,D above 0, as in 1e9,2e10 or 1B,20B")
    return N, D


def parse(argv: list[str]) -> Flags:
    """The flags, over the preset that they name."""
    from glasslm.cli.parsing import parse_over_preset

    return parse_over_preset(Flags, argv, "glasslm scale", DESCRIPTION)


def _fit_table(flags: Flags, path: Path) -> tuple[Analysis, Path]:
    """Fit the runs of a table and write the report. Returns the analysis and the page."""
    from glasslm.lab.scaling import fit_report
    from glasslm.lab.scaling.analysis import analyse_runs
    from glasslm.lab.scaling.table import read_runs

    table = read_runs(path, flags.columns)
    for message in table.messages:
        notify(message)
    analysis = analyse_runs(table.runs, flags.delta, flags.tie is not None, notify)
    measured = f"validation loss, {table.loss_unit}"
    analysis = replace(analysis, columns=table.columns, measured=measured)
    # A folder for each table: another one beside it keeps its results.
    folder = flags.out or path.parent / f"scaling-{path.name.replace('.', '-')}"
    return analysis, fit_report.write(folder, analysis, f"Scaling law of {path.name}")


def _run_ladder(flags: Flags, budget: str, argv: list[str]) -> tuple[Analysis, Path, Path]:
    """Train the ladder. Returns the analysis, the page, and the folder of the study."""
    from glasslm.lab.studies import scaling_report, scaling_study
    from glasslm.runs import run_folder

    folder = run_folder.study_folder(flags.out, "scaling", flags.preset)
    notify(f"study: {folder} ({run_folder.continuation_hint(folder)})")
    command = shlex.join(["glasslm", "scale", *argv])
    runner = flags.runner.make_runner(flags.compute)
    study = scaling_study.run_study(
        flags.config, budget, runner, folder, notify, command, measure=flags.measure
    )
    notify("writing the report")
    return study.analysis, scaling_report.write(folder, study), folder
