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
from statistics import median

from glasslm.errors import InputError
from glasslm.lab.statistics import Comparison, Verdict, compare_losses, judge_family
from glasslm.lab.tables import columns
from glasslm.lab.tables.columns import Column, find_columns
from glasslm.lab.tables.numbers import is_missing, is_number
from glasslm.lab.tables.rows import Row, Table, read_table
from glasslm.text import align_columns, plural

VARIANT_NAMES = (
    "variant", "name", "model", "config", "configuration", "method", "group", "experiment",
    "condition", "setting", "run", "run_name", "recipe", "optimizer", "architecture",
)  # fmt: skip
SEED_NAMES = ("seed", "random_seed", "run_seed", "repeat", "replicate", "trial")
LOSS_NAMES = (
    "final_val_loss", "val_loss", "loss", "eval_loss", "validation_loss", "final_loss", "test_loss",
    "best_val_loss", "val_bpb", "bpb", "train_loss", "val_ppl", "ppl", "perplexity",
)  # fmt: skip
BASELINE_NAMES = ("baseline", "base", "control", "default", "reference")
DIVERGED = {"diverged", "diverges", "div"}  # words for a loss that is not finite
SEED_IN_NAME = "seed in the name"
_SEED_IN_NAME = re.compile(  # "layers4" has no seed: a bare s follows a separator
    r"(?P<name>.*?)(?:[-_. /]*seed|[-_. /]+s)[-_= ]?(?P<seed>\d+)", re.I
)
_SEED_COLUMN = re.compile(r"(?:seed|s|run|trial)?[-_ ]?\d+", re.I)
_INDEX_NAME = re.compile(r"|index|unnamed_\d+")  # the normalized name of the index of pandas
_COUNTER_NAMES = {"row", "run", "step"}
ROLES = ("variant", "seed", "loss")  # that --columns can name
EXPECTED = (
    "variant, seed and loss, a row for each run; or seed and a column of losses for each variant"
)

Losses = dict[str, dict[str, float | None]]  # by variant, then by seed; None: not finite


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
    difference_unit = "nats"
    named = columns.parse_mapping(mapping, ROLES, table)
    loss, seed = (
        named.get(role) or next(iter(find_columns(table, names)), None)
        for role, names in (("loss", LOSS_NAMES), ("seed", SEED_NAMES))
    )
    variant = named.get("variant") or _choose_variant(table)
    if loss is None and variant and _has_seed_columns(table, variant):
        losses = _read_seed_columns(table, variant)
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
        losses = _read_rows(table, variant, seed, loss)
        first = f"{table.format}: variants from {variant}, losses from {loss} taken as {unit}"
    else:
        losses, others = _read_wide(table, seed)
        first = f"{table.format}: a column for each variant"
        if others:
            first += f", without {', '.join(others)}, whose numbers cannot be losses"
    first += f", seeds from {seed}" if seed else ", seeds by the order of the rows"
    return losses, f"{first}; {_count(losses)}", difference_unit


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


def _require_no_errors(table: Table, loss: Column) -> None:
    """Raise InputError for means with their errors: they are no losses of single runs."""
    with_error = [row for row in table.rows if "±" in str(row.cells.get(loss.name))]
    if with_error:
        raise InputError(
            f"line {with_error[0].line} of {table.path}: '{with_error[0].cells[loss.name]}' is a "
            "mean with its error: expected the loss of each run, a row for each seed"
        )


def _seed_columns(table: Table, variant: Column) -> list[str]:
    """The columns beside that of the variants, without the index of pandas."""
    return [name for name in table.names if name != variant.name and not _is_index(name)]


def _has_seed_columns(table: Table, variant: Column) -> bool:
    names = _seed_columns(table, variant)
    return len(names) > 1 and all(_SEED_COLUMN.fullmatch(name.strip()) for name in names)


def _read_seed_columns(table: Table, variant: Column) -> Losses:
    """The losses of a table with a row for each variant and a column for each seed."""
    losses: Losses = {}
    names = _seed_columns(table, variant)
    for row in table.rows:
        group = losses.setdefault(str(row.cells.get(variant.name)).strip(), {})
        for name in names:
            value = Column(name).number(row, table)
            if value is not None:
                group[name] = value if math.isfinite(value) else None
    return losses


def _read_rows(table: Table, variant: Column, seed: Column | None, loss: Column) -> Losses:
    losses: Losses = {}
    places: Counter[str] = Counter()  # of the rows of each variant
    for row in table.rows:
        name = str(row.cells.get(variant.name, "")).strip()
        has_diverged = str(row.cells.get(loss.name)).strip().lower() in DIVERGED
        value = math.nan if has_diverged else loss.number(row, table)
        place = str(places[name])
        places[name] += 1  # also of a row without a value: the next ones keep their partners
        if name and value is not None:
            key = str(row.cells.get(seed.name, "")).strip() if seed else place
            _add_loss(
                losses.setdefault(name, {}), name, key, value, f"line {row.line} of {table.path}"
            )
    if not losses:
        raise columns.unreadable(table.path, table, EXPECTED)
    return losses


def _add_loss(
    group: dict[str, float | None], variant: str, seed: str, value: float, where: str
) -> None:
    """Add the loss of a seed. Raises InputError where the variant has one already."""
    if seed in group:
        raise InputError(
            f"{where}: variant {variant} has seed {seed} twice: expected one final loss for each "
            "run"
        )
    group[seed] = value if math.isfinite(value) else None


def _read_wide(table: Table, seed: Column | None) -> tuple[Losses, list[str]]:
    """The losses of the columns, and the names of columns such as an index, steps or sizes."""
    names = [name for name in table.names if seed is None or name != seed.name]
    numeric = [
        name
        for name in names
        if all(is_number(row.cells.get(name, "")) for row in table.rows)
        and not all(is_missing(row.cells.get(name)) for row in table.rows)
    ]
    others = [
        name
        for name in numeric
        if _is_counter(table, name) or _median(table, name) > columns.MAX_LOSS
    ]
    numeric = [name for name in numeric if name not in others]
    if len(numeric) < 2 or len(numeric) + len(others) < len(names):
        raise columns.unreadable(table.path, table, EXPECTED)
    losses: Losses = {name: {} for name in numeric}
    for i, row in enumerate(table.rows):
        key = str(row.cells.get(seed.name, "")).strip() if seed else str(i)
        for name in numeric:
            value = Column(name).number(row, table)
            if value is not None:
                _add_loss(losses[name], name, key, value, f"line {row.line} of {table.path}")
    return losses, [name or "the column without a name" for name in others]


def _is_index(name: str) -> bool:
    """Whether a column is the index of pandas: without a name, "index" or "Unnamed: 0"."""
    normalized = columns.normalize_name(name)
    # A name in another alphabet is normalized to nothing.
    return _INDEX_NAME.fullmatch(normalized) is not None and (normalized != "" or not name.strip())


def _is_counter(table: Table, name: str) -> bool:
    """Whether a column of numbers counts the rows or steps, by its name or its values."""
    if _is_index(name) or columns.normalize_name(name) in _COUNTER_NAMES:
        return True
    numbers = [Column(name).number(row, table) for row in table.rows]
    return len(numbers) > 1 and any(
        numbers == list(range(start, start + len(numbers))) for start in (0, 1)
    )


def _median(table: Table, name: str) -> float:
    """The median of the finite numbers of a column; NaN if it has none."""
    numbers = [Column(name).number(row, table) for row in table.rows]
    finite = [number for number in numbers if number is not None and math.isfinite(number)]
    return median(finite) if finite else math.nan
