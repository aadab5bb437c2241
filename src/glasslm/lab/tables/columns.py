"""Which column of a table is which: known names, units in names, and `--columns` of the user."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glasslm.errors import InputError
from glasslm.lab.tables.numbers import has_suffix, parse_number
from glasslm.lab.tables.rows import Row, Table

# A unit in a name, such as "params (M)" or "tokens_b", multiplies the cells.
UNITS = {
    "k": 1e3,
    "thousands": 1e3,
    "m": 1e6,
    "mil": 1e6,
    "mio": 1e6,
    "million": 1e6,
    "millions": 1e6,
    "b": 1e9,
    "bn": 1e9,
    "g": 1e9,
    "billion": 1e9,
    "billions": 1e9,
    "t": 1e12,
    "trillion": 1e12,
    "trillions": 1e12,
    "gflop": 1e9,
    "gflops": 1e9,
    "tflop": 1e12,
    "tflops": 1e12,
    "pflop": 1e15,
    "pflops": 1e15,
    "eflop": 1e18,
    "eflops": 1e18,
    "zflop": 1e21,
    "zflops": 1e21,
    "pf_days": 8.64e19,
    "pflop_s_days": 8.64e19,
    "petaflop_s_days": 8.64e19,
    "pfs_days": 8.64e19,
}
_PERPLEXITY = r"(?:^|_)(?:ppl|perplexity)(?:_|$)"
_LOGARITHM = re.compile(r"(?:^|_)(log|ln|log2|log10)_")  # of a perplexity
_NATS_OF_LOGARITHM = {"log": 1.0, "ln": 1.0, "log2": math.log(2), "log10": math.log(10)}
_BITS = r"(?:^|_)(?<!\d_)(?:bits|bpt)(?:_|$)"  # not bits per byte, nor weights of 4 bits
NATS = "nats per token"
MAX_LOSS = 20.0  # nats per token; above it a unit must be wrong
_BITS_PER_BYTE = r"bpb|bits_(?:per_)?byte"
_BITS_PER_CHARACTER = r"bpc|bits_(?:per_)?char"
LOSS_UNITS = {
    "nats", "nats_per_token", "nats_token", "bits", "bits_per_token", "bits_token", "bpb",
    "bits_per_byte", "bits_byte", "bpc", "bits_per_char", "bits_char", "bits_per_character",
    "bits_character",
}  # fmt: skip
STATUS_NAMES = {"status", "state", "run_status", "run_state"}
FAILED_RUNS = {
    "diverged", "diverges", "div", "failed", "oom", "crashed", "killed", "running", "pending",
    "timeout", "error", "cancelled", "canceled", "aborted", "preempted", "queued", "scheduled",
}  # fmt: skip
# A letter after these names a run or text, as in loss_b: no loss is counted in thousands.
_LOSS = re.compile(
    r"(?:^|_)(?:loss|losses|nll|xent|entropy|crossentropy|ce|bpb|bpc|bpt|ppl|perplexity)(?:_|$)"
)
_MAPPING = re.compile(
    r"(?P<role>\w+)\s*=\s*(?P<column>.+?)(?:\s*\*\s*(?P<factor>[\d.]+(?:e[+-]?\d+)?))?"
)


@dataclass(frozen=True)
class Column:
    """A column of a table, and what its cells are multiplied with to get the unit wanted.

    Cells of `perplexity` become their natural logarithms.
    """

    name: str
    factor: float = 1.0
    perplexity: bool = False

    def number(self, row: Row, table: Table) -> float | None:
        """The number in a row; None where it is missing. Raises InputError for a word."""
        try:
            return self.parse(row.cells.get(self.name), table.decimal_comma)
        except ValueError as error:
            raise InputError(
                f"line {row.line} of {table.path}, column {self.name}: {error}"
            ) from None

    def parse(self, cell: Any, decimal_comma: bool = False) -> float | None:
        """A cell as a number in the unit wanted; None where it is missing.

        The unit of a cell such as 10M counts instead of that of its column. Raises ValueError for a
        word.
        """
        number = parse_number(cell, decimal_comma)
        if number is None:
            return None
        if self.perplexity:
            number = math.log(number) if number > 0 else math.nan
        if self.factor == 1 or has_suffix(cell):
            return number
        return number * self.factor

    @property
    def notation(self) -> str:
        """In JSON: NAME or NAME*FACTOR, as --columns reads it; log(NAME) of perplexities."""
        if self.perplexity:
            return f"log({self.name})"
        factor = repr(float(self.factor)).removesuffix(".0")
        return f"{self.name}*{factor}" if self.factor != 1 else self.name

    def __str__(self) -> str:
        if self.perplexity:
            return f"the logarithm of `{self.name}`"
        times = f" times {self.factor:g}" if self.factor != 1 else ""
        return f"`{self.name}`{times}"


def normalize_name(name: object) -> str:
    """A name in lower case with underscores: "Train/Loss " and "train loss" are "train_loss".

    The name of a run before it, as wandb exports it ("run-3 - train/loss"), is left out.
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", str(name).strip())
    words = words.rsplit(" - ", 1)[-1]
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def find_columns(table: Table, known: Sequence[str]) -> list[Column]:
    """The columns whose names are among `known`, which prefers its earlier names.

    A name may have a unit: `params_m`, "Training FLOP (1e18)".
    """
    columns = [(split_unit(name), name) for name in table.names]
    found = [
        Column(name, factor) for word in known for (base, factor), name in columns if base == word
    ]
    return list(dict.fromkeys(found))


def find_by_words(
    table: Table, required: Collection[str], allowed: Collection[str]
) -> list[Column]:
    """The columns whose names have a word of `required`, and besides only words of `allowed`."""
    found = []
    for name in table.names:
        base, factor = split_unit(name)
        words = base.split("_")
        if any(word in required for word in words) and all(
            word in required or word in allowed or word.isdigit() for word in words
        ):
            found.append(Column(name, factor))
    return found


def split_unit(name: str) -> tuple[str, float]:
    """The normalized name without its unit, and the factor of the unit. Losses have none.

    >>> split_unit("Model Size (M)"), split_unit("tokens_b"), split_unit("C (1e18 FLOPs)")
    (('model_size', 1000000.0), ('tokens', 1000000000.0), ('c', 1e+18))
    """
    bracket = re.search(r"[(\[]\s*([^()\[\]]*?)\s*[)\]]\s*$", name)
    if bracket:
        factor = 1.0 if normalize_name(bracket[1]) in LOSS_UNITS else _unit_factor(bracket[1])
        stem = normalize_name(name[: bracket.start()])
        if factor == 1 or (factor is not None and not _LOSS.search(stem)):
            return stem, factor
    base = normalize_name(name)
    for unit, factor in UNITS.items():
        stem = base.removesuffix(f"_{unit}")
        if stem not in (base, "") and not _LOSS.search(stem):
            return stem.removesuffix("_in"), factor  # "params in millions"
    return base, 1.0


def _unit_factor(text: str) -> float | None:
    if match := re.match(r"(?:[x×]\s*)?(1e\d+|10\^\d+)", text, re.I):
        return float(match[1].replace("10^", "1e"))
    unit = normalize_name(text)
    return UNITS.get(unit) or next(
        (UNITS[word] for word in reversed(unit.split("_")) if word in UNITS), None
    )


def parse_mapping(words: Sequence[str], roles: Sequence[str], table: Table) -> dict[str, Column]:
    """The columns that the user named: "N=params", "D=tokens*1e9", or several with commas.

    Raises InputError for an unknown role or column, with those that exist.
    """
    entries = [
        part
        for word in words
        for part in re.split(rf",(?=\s*(?:{'|'.join(roles)})\s*=)", word)
        if part.strip()
    ]
    mapping: dict[str, Column] = {}
    by_name = {normalize_name(name): name for name in reversed(table.names)}
    for entry in entries:
        match = _MAPPING.fullmatch(entry.strip())
        if match is None or match["role"] not in roles:
            raise InputError(
                f"--columns {entry}: expected {', '.join(f'{role}=COLUMN' for role in roles)}, "
                "with a factor if the unit is another one, as in N=size*1e6"
            )
        wanted = match["column"].strip().strip("'\"")
        name = wanted if wanted in table.names else by_name.get(normalize_name(wanted))
        if name is None:
            raise InputError(
                f"--columns {entry}: {table.path} has no column {wanted!r}, but {list_names(table)}"
            )
        mapping[match["role"]] = Column(name, float(match["factor"] or 1))
    return mapping


def list_names(table: Table) -> str:
    """The names of the columns as text, at most 20."""
    names = table.names
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) or "none") + more


def to_loss(column: Column) -> tuple[Column, str]:
    """The column of losses in nats per token where that can be, and the unit of its numbers.

    The name tells the unit: bits per token are converted, the logarithm of a perplexity is taken
    unless the name says that it is one, and bits per byte or character stay. A name without a unit
    means nats per token.
    """
    name = normalize_name(column.name)
    if re.search(_BITS_PER_BYTE, name):
        return column, "bits per byte"
    if re.search(_BITS_PER_CHARACTER, name):
        return column, "bits per character"
    if column.factor == 1 and re.search(_PERPLEXITY, name):
        logarithm = _LOGARITHM.search(name)
        if logarithm is None:
            return replace(column, perplexity=True), NATS
        return replace(column, factor=_NATS_OF_LOGARITHM[logarithm[1]]), NATS
    if column.factor == 1 and re.search(_BITS, name):
        return replace(column, factor=math.log(2)), f"bits per token, converted to {NATS}"
    return column, NATS


def find_failure(row: Row, loss: Column) -> tuple[str, str] | None:
    """Where a row says that its run has no final loss, "loss" or "status", and its word there."""
    for name in (loss.name, *(n for n in row.cells if normalize_name(n) in STATUS_NAMES)):
        word = str(row.cells.get(name)).strip().lower()
        if word in FAILED_RUNS:
            return "loss" if name == loss.name else "status", word
    return None


def find_perplexity(table: Table) -> list[Column]:
    """The columns of perplexities, or of their logarithms."""
    return [Column(name) for name in table.names if re.search(_PERPLEXITY, normalize_name(name))]


def unreadable(path: Path, table: Table, expected: str) -> InputError:
    """The error for a table without a column that is needed."""
    return InputError(
        f"{path} ({table.format}) has the columns {list_names(table)}: expected {expected}. "
        "--columns says which is which"
    )
