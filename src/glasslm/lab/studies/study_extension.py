"""The extension of an ablation: a larger budget or more seeds keep all runs and add seeds.

Longer runs would be other runs, because the learning rate ends with the last step. Seeds that are
added when results are known bias a test, so the report tells it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glasslm.config.schema import ComputeConfig
from glasslm.config.units import parse_duration
from glasslm.lab.studies.study_plan import (
    PLAN_FILE,
    load_plan,
    read_plan,
    require_recorded_compute,
    save_plan,
)
from glasslm.text import Notify, plural

# The fields of AblationSpec, in their order in plan.json.
SPEC_FIELDS = ("axes", "seeds", "match", "margin", "rates", "budget", "against", "measure")


def load_or_extend(
    study: Path, flags: Any, compute: ComputeConfig, notify: Notify
) -> dict[str, Any] | None:
    """The content of plan.json, with more seeds if the budget or the seeds are larger than before.

    Raises InputError for a study of other settings, or of another engine, device or precision.
    """
    saved = read_plan(study)
    if saved is None or saved["asked"] == flags:
        return load_plan(study, flags, compute)
    first_seeds = saved.get("seeds", saved["asked"][1][1])
    seeds = _extended_seeds(saved["asked"], flags, first_seeds)
    if seeds is None:
        return load_plan(study, flags, compute)
    require_recorded_compute(compute, saved["compute"], study / PLAN_FILE)
    saved |= {"asked": flags, "seeds": seeds}
    if (study / "ablation_table.csv").exists() and seeds > first_seeds:
        saved["seen_seeds"] = first_seeds
    save_plan(study, flags, saved)
    notify(
        f"the study is extended: {plural(first_seeds, 'seed')} and their runs are kept, with their "
        f"{plural(saved['base']['train']['max_steps'], 'step')}; now {plural(seeds, 'seed')} each"
    )
    return saved


def _extended_seeds(asked: Any, flags: Any, n_seeds: int) -> int | None:
    """The seeds of a study when it is given a larger budget or more seeds; None for another study.

    `n_seeds` is the present number. `asked` and `flags` are [config, AblationSpec as a list], as
    plan.json stores them. The steps of
    all runs stay, so that runs which are finished count: the time of a larger budget becomes seeds.
    """
    if len(asked[1]) != len(flags[1]) or asked[0] != flags[0]:
        return None
    old, new = (dict(zip(SPEC_FIELDS, values)) for values in (asked[1], flags[1]))
    if any(old[name] != new[name] for name in old if name not in ("seeds", "budget")):
        return None
    if (old["budget"] is None) != (new["budget"] is None) or new["seeds"] < old["seeds"]:
        return None
    if new["budget"] is None:
        return max(n_seeds, int(new["seeds"]))
    growth = parse_duration(new["budget"]) / parse_duration(old["budget"])
    n_tuning = len(new["rates"])
    seeds = int(growth * (n_seeds + n_tuning)) - n_tuning
    return max(seeds, n_seeds, int(new["seeds"])) if growth >= 1 else None
