"""glasslm ablate: the effect of each design choice, one change at a time, over several seeds."""

from __future__ import annotations

import json
import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from glasslm.cli.flag_groups import REFUSED_IN_STUDIES, JsonFlag, RecipeFlags
from glasslm.cli.study_flags import RunnerFlags
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import DeviceConfig
from glasslm.config.unused_flags import refuse_unread_settings
from glasslm.errors import InputError, require
from glasslm.lab.studies.ablation_axes import AXES, Match, variants
from glasslm.lab.studies.measures import MeasureName
from glasslm.runs.metrics import to_json_types
from glasslm.text import notify, print_result

if TYPE_CHECKING:
    from glasslm.lab.studies.ablation import VariantResult

DESCRIPTION = f"""Measure the effect of each design choice. A baseline is compared with variants
of it, each with one change, over the same seeds.

The baseline is the preset tiny, or that of --preset, with flags of
`glasslm train`, whose own default is quick. Axes:
{textwrap.fill(", ".join(AXES), 76, initial_indent="  ", subsequent_indent="  ")}
Each axis has default values; your own: --axes depth=2/4/8,activation. Any flag
of the model or optimizer is an axis, too: --axes n_kv_heads=1/2/4,lr=1e-3/3e-4.
A run uses one core. To continue an interrupted study, give the same command with
--out. Verdicts are paired t-tests over the seeds, corrected for the number of
comparisons (Holm). A run that diverges counts as a result.

Examples:
  glasslm ablate --axes depth,activation --seeds 3 --budget 45m
  glasslm ablate --against ../glasslm-0.1 --seeds 5 --max-steps 300
  glasslm ablate --axes 'ops=mine.py' --seeds 5 --max-steps 300
  glasslm ablate --axes norm --match time --text-file book.txt
  glasslm ablate --fit losses.csv    the losses of another program, by seed
  glasslm ablate --axes optimizer --rates 0.3/1/3 --runner ray"""

FIT_FLAGS = {"--fit", "--columns", "--baseline", "--margin", "--measure", "--json"}


@dataclass(frozen=True, kw_only=True)
class Flags(RecipeFlags):
    """The axes of an ablation, and its baseline."""

    hidden_fields = REFUSED_IN_STUDIES
    varies_settings = True

    axes: Annotated[str, tyro.conf.arg(metavar="NAME,NAME")] = "depth,width,heads,activation,norm"
    """Axes to vary, with commas between. NAME=A/B/C gives the values (norm=A/pre|B/post).
    NAME is an axis, or a flag of the model or optimizer with underscores; ops=A.py|B.py compares
    files of --ops with the baseline."""
    seeds: int = 3
    """Seeds of each variant; all variants have the same ones."""
    budget: Annotated[str | None, optional_flag("TIME", "the steps of the baseline")] = None
    """Time for the whole study, such as 45m. It fixes the number of steps."""
    match: Match = "tokens"
    """What is equal in all runs: tokens, FLOPs, time, or parameters (by the width)."""
    rates: Annotated[str, tyro.conf.arg(metavar="X/Y/Z", help_behavior_hint="(default: none)")] = ""
    """Learning rates to try for each variant, as multiples of its own, such as 0.3/1/3.
    They are tried with a seed of their own."""
    against: Annotated[Path | None, optional_flag("CHECKOUT", "none")] = None
    """Compare with another version of glasslm: a checkout, whose `python -m glasslm` trains the
    baseline's runs. Without --axes, nothing else varies."""
    fit: Annotated[Path | None, optional_flag("TABLE", "none")] = None
    """Judge the final losses in a table of another program instead: variant, seed, loss."""
    columns: Annotated[tuple[str, ...], optional_flag("NAME=COLUMN...", "known names")] = ()
    """Columns of --fit: variant, seed or loss, as in loss=final."""
    baseline: Annotated[str | None, optional_flag("NAME", "baseline, or the first")] = None
    """Variant of --fit with which the others are compared."""
    measure: MeasureName = "loss"
    """What is compared: the loss, or the wrong answers of a task (--corpus task:NAME)."""
    margin: Annotated[float | None, optional_flag("NATS", "none")] = None
    """Largest difference that counts as equal (TOST)."""
    out: Annotated[Path | None, optional_flag("PATH", "a new one under ./runs")] = None
    """Folder of the study. An interrupted study in it continues."""
    json: JsonFlag = False
    runner: RunnerFlags = field(default_factory=RunnerFlags)
    compute: DeviceConfig = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import given_fields, require_read
    from glasslm.lab.studies import ablation, ablation_report
    from glasslm.lab.studies.study_plan import read_plan
    from glasslm.runs import run_folder

    flags = parse(argv)
    if flags.fit is not None:
        require(flags.measure == "loss", "--measure", flags.measure, "loss with --fit")
        require_read("--fit", argv, FIT_FLAGS)
        return _judge_table(flags, flags.fit)
    for name in ("columns", "baseline"):
        if getattr(flags, name):
            raise InputError(f"--{name} is for --fit TABLE: give both")
    require(flags.seeds >= 1, "--seeds", flags.seeds, "at least 1")
    study = run_folder.study_folder(flags.out, "ablation", flags.preset)
    axes = tuple(flags.axes.split(","))
    if flags.against and not any(word.partition("=")[0] == "--axes" for word in argv):
        axes = ()
    if read_plan(study) is None:  # a new study
        _refuse_unused_flags(flags, axes, given_fields(argv))
    spec = ablation.AblationSpec(
        axes,
        flags.seeds,
        flags.match,
        flags.margin,
        _parse_rates(flags.rates),
        flags.budget,
        None if flags.against is None else str(flags.against),
        flags.measure,
    )
    runner = flags.runner.make_runner(flags.compute)
    plan = ablation.plan(flags.config, spec, runner, study, notify)
    notify(f"study: {study} ({run_folder.continuation_hint(study)})")
    results = ablation.run(plan, study, runner, shlex.join(["glasslm", "ablate", *argv]), notify)
    notify("writing the report")
    page = ablation_report.write(study, plan, results)
    text = ablation_report.summary(plan, results)
    if flags.json:
        notify(text)
        facts = {
            "study": str(study),
            "report": str(page),
            "variants": [_variant_facts(result, flags.measure) for result in results],
            "findings": ablation_report.findings(plan, results),
        }
        print(json.dumps(to_json_types(facts)))
    else:
        print_result(f"{text}\n\nreport: {page}\nstudy: {study}")
    return (
        1 if any(trial.status == "failed" for result in results for trial in result.trials) else 0
    )


def _refuse_unused_flags(flags: Flags, axes: tuple[str, ...], given: set[str]) -> None:
    """Refuse, or name in a note, a flag that would change nothing in any run of the study."""
    if flags.budget is not None and "max_steps" in given:  # as in a script with and without it
        notify("note: --max-steps has no effect: --budget fixes the steps of the runs")
    configs = [flags.config]
    if flags.against is None:  # whose `glasslm train` may refuse what the baseline does not read
        configs += [variant.config for variant in variants(axes, flags.config)]
    refuse_unread_settings(given, configs)


def _variant_facts(result: VariantResult, measure: MeasureName) -> dict[str, Any]:
    """What --json prints of a variant."""
    return {
        "variant": result.name,
        "axis": result.axis,
        "value": result.value,
        "parameters": result.parameters,
        "losses": [trial.final_loss for trial in result.trials],
        **({"wrong_answers": result.losses} if measure == "accuracy" else {}),
        "delta": result.comparison.delta if result.comparison else None,
        "p_holm": result.verdict.p_holm if result.verdict else None,
        "verdict": result.verdict.words if result.verdict else "the baseline",
    }


def _judge_table(flags: Flags, path: Path) -> int:
    """Judge the losses of another program."""
    from glasslm.lab.studies.losses_table import judge_table

    study = judge_table(path, flags.columns, flags.baseline, flags.margin)
    for message in study.messages:
        notify(message)
    if flags.json:
        rows = [
            {
                "variant": variant.name,
                "losses": variant.losses,
                "paired": variant.paired,
                "delta": variant.comparison.delta if variant.comparison else None,
                "ci_low": variant.comparison.ci_low if variant.comparison else None,
                "ci_high": variant.comparison.ci_high if variant.comparison else None,
                "p": variant.comparison.p if variant.comparison else None,
                "p_holm": variant.verdict.p_holm if variant.verdict else None,
                "kind": variant.verdict.kind if variant.verdict else "baseline",
                "verdict": variant.verdict.words if variant.verdict else "the baseline",
            }
            for variant in study.variants
        ]
        print(json.dumps(to_json_types({"variants": rows, "read": study.messages})))
    else:
        print_result(study.text())
    return 0


def parse(argv: list[str]) -> Flags:
    """The flags, over the preset that they name."""
    from glasslm.cli.parsing import parse_over_preset

    return parse_over_preset(Flags, argv, "glasslm ablate", DESCRIPTION)


def _parse_rates(text: str) -> tuple[float, ...]:
    """The multiples of --rates, in ascending order."""
    if not text:
        return ()
    try:
        rates = tuple(sorted(float(word) for word in text.split("/")))
    except ValueError:
        raise InputError(
            f"--rates is '{text}': expected multiples of the learning rate, such as 0.3/1/3"
        ) from None
    require(len(rates) >= 3 and rates[0] > 0, "--rates", text, "at least three multiples above 0")
    return rates
