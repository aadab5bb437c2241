"""The statistics of an ablation for a table of losses that another program trained.

A row is a run, with its variant, seed and final loss; or a row is a seed, with a column for each
variant. Seeds that two variants share are paired.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glasslm.errors import InputError
from glasslm.lab.statistics import Comparison, Verdict, compare_losses, judge_family
from glasslm.lab.studies.losses_by_column import (
    DIVERGED,
    EXPECTED,
    LOSS_NAMES,
    PROGRESS_NAMES,
    Losses,
    add_loss,
    has_seed_columns,
    read_loss,
    read_seed_columns,
    read_wide,
)
from glasslm.lab.tables import columns
from glasslm.lab.tables.columns import Column, find_columns
from glasslm.lab.tables.long_tables import require_one_split
from glasslm.lab.tables.numbers import is_missing
from glasslm.lab.tables.rows import Row, Table, read_table
from glasslm.text import align_columns, plural

VARIANT_NAMES = (
    "variant", "name", "model", "config", "configuration", "method", "group", "experiment",
    "condition", "setting", "run", "run_name", "recipe", "optimizer", "architecture",
)  # fmt: skip
SEED_NAMES = ("seed", "random_seed", "run_seed", "repeat", "replicate", "trial")
BASELINE_NAMES = ("baseline", "base", "control", "default", "reference")
SEED_IN_NAME = "seed in the name"
_SEED_IN_NAME = re.compile(  # "layers4" has no seed: a bare s follows a separator
    r"(?P<name>.*?)(?:[-_. /]*seed|[-_. /]+s)[-_= ]?(?P<seed>\d+)", re.I
)
ROLES = ("variant", "seed", "loss")  # that --columns can name


@dataclass(frozen=True)
class JudgedVariant:
    """A variant beside the baseline."""

    name: str
    losses: list[float | None]
    comparison: Comparison | None  # None for the baseline
    verdict: Verdict | None
    paired: bool = False


@dataclass(frozen=True)
class LossStudy:
    """The verdicts on a table of losses; the baseline is the first variant."""

    variants: list[JudgedVariant]
    messages: list[str]  # what was read, and what was left out

    def text(self) -> str:
        """A table of variants with their verdicts."""
        rows = [("variant", "runs", "mean loss", "difference, 95% interval", "verdict")]
        for variant in self.variants:
            finite = [loss for loss in variant.losses if loss is not None]
            diverged = len(variant.losses) - len(finite)
            mean = f"none: {diverged} diverged"  # a mean of the others would hide it
            if not diverged:
                mean = f"{math.fsum(finite) / len(finite):.4f}"
            c, interval = variant.comparison, ""
            if c and c.delta is not None:
                interval = f"{c.delta:+.4f}"
                if c.ci_low is not None and c.ci_high is not None:
                    interval += f" ({c.ci_low:+.4f} to {c.ci_high:+.4f})"
            words = variant.verdict.words if variant.verdict else "the baseline"
            rows.append((variant.name, str(len(variant.losses)), mean, interval, words))
        return "\n".join(align_columns(rows))


def judge_table(
    path: Path,
    mapping: Sequence[str] = (),
    baseline: str | None = None,
    margin: float | None = None,
) -> LossStudy:
    """The verdicts on the losses of a table.

    `baseline` is a variant; by default one with such a name, or the first. `margin` is the largest
    difference that counts as equal. Raises InputError for a table that cannot be read so.
    """
    table = read_table(path)
    losses, first, unit = _read_losses(table, mapping)
    names = list(losses)
    if baseline is None:
        baseline = next((n for n in names if n.strip().lower() in BASELINE_NAMES), names[0])
    if baseline not in losses:
        raise InputError(f"--baseline {baseline}: {path} has the variants {', '.join(names[:20])}")
    if len(names) < 2:
        raise InputError(f"{path} has one variant, {names[0]}: expected a baseline and others")
    others = [name for name in names if name != baseline]
    messages = [f"{first}; baseline: {baseline}"]
    comparisons, paired = [], []
    for name in others:
        a, b, is_paired = _pair(losses[name], losses[baseline])
        if is_paired and len(a) < max(len(losses[name]), len(losses[baseline])):
            messages.append(
                f"{name}: {plural(len(a), 'seed')} in common with the baseline are compared, of "
                f"{len(losses[name])} and {len(losses[baseline])}"
            )
        if not is_paired:
            messages.append(
                f"{name} and the baseline have fewer than two seeds in common: Welch's test, not "
                "pairs"
            )
        comparisons.append(
            compare_losses(a, b, margin, family=len(others), paired=is_paired, unit=unit)
        )
        paired.append(is_paired)
    base = JudgedVariant(baseline, list(losses[baseline].values()), None, None)
    judged = [
        JudgedVariant(name, list(losses[name].values()), comparison, verdict, is_paired)
        for name, comparison, verdict, is_paired in zip(
            others, comparisons, judge_family(comparisons), paired
        )
    ]
    return LossStudy([base, *judged], messages)


def _pair(
    variant: dict[str, float | None], baseline: dict[str, float | None]
) -> tuple[list[float | None], list[float | None], bool]:
    """The losses of common seeds in one order, or all losses where none or one is common."""
    common = [seed for seed in variant if seed in baseline]
    if len(common) >= 2 or (len(common) == 1 == len(variant) == len(baseline)):
        return [variant[seed] for seed in common], [baseline[seed] for seed in common], True
    return list(variant.values()), list(baseline.values()), False


def _read_losses(table: Table, mapping: Sequence[str]) -> tuple[Losses, str, str]:
    """The losses by variant and seed, a sentence on what was read, and the unit of a difference."""
    difference_unit, left_out = "nats", ""
    require_one_split(table)
    named = columns.parse_mapping(mapping, ROLES, table)
    loss, seed = (
        named.get(role) or next(iter(find_columns(table, names)), None)
        for role, names in (("loss", LOSS_NAMES), ("seed", SEED_NAMES))
    )
    variant = named.get("variant") or _choose_variant(table)
    if loss is None and variant and has_seed_columns(table, variant):
        losses = read_seed_columns(table, variant)
        first = f"{table.format}: variants from {variant}, a column for each seed"
        return losses, f"{first}; {_count(losses)}", difference_unit
    if variant and loss and seed is None and "variant" not in named:
        table, seed = _split_names(table, variant)
    if variant is None and loss and seed:
        table, variant = _join_factors(table, loss, seed)
    if variant and loss:
        loss, unit = columns.to_loss(loss)
        if not unit.endswith(columns.NATS):
            difference_unit = unit
        _require_no_errors(table, loss)
        if seed is None:
            _require_one_step(table, variant)
        losses, left_out = _read_rows(table, variant, seed, loss)
        first = f"{table.format}: variants from {variant}, losses from {loss} taken as {unit}"
    else:
        if seed is None:
            _require_one_step(table)
        losses, others, unit = read_wide(table, seed)
        if not unit.endswith(columns.NATS):
            difference_unit = unit
        first = f"{table.format}: a column for each variant, losses taken as {unit}"
        if others:
            first += f", without {', '.join(others)}, no losses by their names or numbers"
    first += f", seeds from {seed}" if seed else ", seeds by the order of the rows"
    return losses, f"{first}{left_out}; {_count(losses)}", difference_unit


def _count(losses: Losses) -> str:
    return f"{sum(map(len, losses.values())):,} losses of {plural(len(losses), 'variant')}"


def _choose_variant(table: Table) -> Column | None:
    """The column of variants: the first whose names repeat, as they do over seeds."""
    candidates = find_columns(table, VARIANT_NAMES)

    def repeats(column: Column) -> bool:
        names = [row.cells.get(column.name) for row in table.rows]
        return len(set(map(str, names))) < len(names)

    return next(filter(repeats, candidates), candidates[0] if candidates else None)


def _split_names(table: Table, variant: Column) -> tuple[Table, Column | None]:
    """The table with seeds of their own where all names have one, as "base-s1" has."""
    matches = [_SEED_IN_NAME.fullmatch(str(row.cells.get(variant.name))) for row in table.rows]
    if not all(matches):
        return table, None
    rows = [
        Row(row.line, {**row.cells, variant.name: match["name"], SEED_IN_NAME: match["seed"]})
        for row, match in zip(table.rows, matches)
        if match
    ]
    return table._replace(rows=rows), Column(SEED_IN_NAME)


def _join_factors(table: Table, loss: Column, seed: Column) -> tuple[Table, Column | None]:
    """The table with a column of variants, made of the settings whose values repeat."""
    factors = [
        name
        for name in table.names
        if name not in (loss.name, seed.name)
        and columns.normalize_name(name) not in columns.STATUS_NAMES
        and 1 < len({str(row.cells.get(name)) for row in table.rows}) <= len(table.rows) / 2
    ]
    if not factors:
        return table, None
    joined = " and ".join(factors)
    rows = [
        Row(row.line, {**row.cells, joined: " ".join(f"{f}={row.cells.get(f)}" for f in factors)})
        for row in table.rows
    ]
    return table._replace(rows=rows), Column(joined)


def _require_one_step(table: Table, variant: Column | None = None) -> None:
    """Raise InputError where the rows of a variant are at several steps: they are no seeds."""
    for column in find_columns(table, PROGRESS_NAMES):
        steps: dict[str, str] = {}
        for row in table.rows:
            name = str(row.cells.get(variant.name)).strip() if variant else ""
            step = str(row.cells.get(column.name)).strip()
            if is_missing(row.cells.get(column.name)):
                continue
            if steps.setdefault(name, step) != step:
                raise InputError(
                    f"{table.path} has several values of `{column.name}`, as the steps of one run "
                    "have, and no seeds: expected one final loss for each run and a column seed. "
                    "Two logs are compared by glasslm diagnose --curve A.log --against B.log"
                )


def _require_no_errors(table: Table, loss: Column) -> None:
    """Raise InputError for means with their errors: they are no losses of single runs."""
    with_error = [row for row in table.rows if "±" in str(row.cells.get(loss.name))]
    if with_error:
        raise InputError(
            f"line {with_error[0].line} of {table.path}: '{with_error[0].cells[loss.name]}' is a "
            "mean with its error: expected the loss of each run, a row for each seed"
        )


def _read_rows(
    table: Table, variant: Column, seed: Column | None, loss: Column
) -> tuple[Losses, str]:
    """The losses of the rows, and which runs are left out because they have no final loss."""
    losses: Losses = {}
    left_out = ""
    places: Counter[str] = Counter()  # of the rows of each variant
    for row in table.rows:
        name = str(row.cells.get(variant.name, "")).strip()
        failure = columns.find_failure(row, loss)
        if failure and failure[1] not in DIVERGED:
            left_out += f"; line {row.line} left out: its {failure[0]} is '{failure[1]}'"
            value = None
        else:
            value = read_loss(row, loss, table)
        place = str(places[name])
        places[name] += 1  # also of a row without a value: the next ones keep their partners
        if name and value is not None:
            key = str(row.cells.get(seed.name, "")).strip() if seed else place
            add_loss(
                losses.setdefault(name, {}), name, key, value, f"line {row.line} of {table.path}"
            )
    if not losses:
        raise columns.unreadable(table.path, table, EXPECTED)
    return losses, left_out
