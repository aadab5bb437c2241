"""Each run on each other's validation text: bits per byte as a matrix, a row for each run, a column for each text.

Down a column all runs read the same characters, or are left out: a run whose tokenizer lacks many of them gets no
number, and lines that some of the others cannot read are left out for all. Nothing is replaced and nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from glasslm.data import shards
from glasslm.data.baselines import baselines
from glasslm.data.shards import Dataset
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import GlasslmError, InputError
from glasslm.inference import trained_model
from glasslm.lab.verification.comparison import Side
from glasslm.report.data_checks import text_of
from glasslm.report.page import Picture, Section
from glasslm.text import Say, number, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glasslm.report.figures import Palette

MOST = 128_000  # bytes of a text: all of Shakespeare's validation part
STRETCHES = 16  # of a larger one, evenly spaced
READABLE = 0.9  # share of a text, in whole lines, that a run must be able to read
NAMED = 12  # characters that are told

READING = (
    "Bits per byte of the best checkpoints, each with its own tokens and its own context. Read down a column: there "
    "all runs, and gzip, had the same text. Texts differ in how much they hold, so that a row says little."
)


@dataclass
class Column:
    """One validation text, and the bits per byte of the runs on it."""

    owners: str  # letters of the runs that it was kept from: "A, C"
    text: str = ""  # what of it is read
    total: int = 0  # bytes of the whole validation text
    bpb: dict[str, float | None] = field(
        default_factory=dict
    )  # by letter; None of a run that could not be measured
    gzip_bpb: float | None = None

    @property
    def bytes(self) -> int:
        """Of what is read."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Cross:
    letters: tuple[str, ...]
    columns: tuple[Column, ...]
    remarks: tuple[str, ...]

    @property
    def header(self) -> tuple[str, ...]:
        """Of the columns of `rows`."""
        return tuple(f"text of {column.owners}" for column in self.columns)

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """A letter, or gzip, and its bits per byte as text."""
        by_run = [
            (letter, [column.bpb.get(letter) for column in self.columns]) for letter in self.letters
        ]
        all_rows = [*by_run, ("gzip", [column.gzip_bpb for column in self.columns])]
        return [(name, [number(value, ".3f") for value in values]) for name, values in all_rows]

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        texts = [{"of": c.owners.split(", "), "bytes": c.bytes, "of_bytes": c.total, "gzip_bpb": c.gzip_bpb}
                 for c in self.columns]  # fmt: skip
        bpb = {
            letter: [column.bpb.get(letter) for column in self.columns] for letter in self.letters
        }
        return {"texts": texts, "bpb": bpb, "remarks": list(self.remarks)}


def measure(compared: Sequence[Side], say: Say) -> Cross:
    """Score every run on every text. Runs and texts that cannot be had are left empty, and it is said why."""
    columns, remarks = _columns(compared, say)
    for column in columns:
        remarks += _prepare(column, compared)
    for side in compared:
        mine = [column for column in columns if side.letter in column.bpb]
        try:
            model = trained_model.load(side.run.path)
        except GlasslmError as error:
            remarks.append(f"{side.letter} could not be measured: {error}")
            continue
        for column in mine:
            say(f"{side.letter} reads the text of {column.owners} ({size(column.bytes)})")
            ids = model.tokenizer.encode(column.text)
            if model.tokenizer.decode(ids) == column.text:
                column.bpb[side.letter] = model.score(ids).bpb
            else:
                remarks.append(
                    f"{side.letter}: its tokens do not give back the text of {column.owners}."
                )
    letters = tuple(side.letter for side in compared)
    return Cross(letters, tuple(columns), (READING, *remarks))


def section(cross: Cross, compared: Sequence[Side]) -> Section:
    """The matrix as a part of a page."""
    names = {side.letter: f"{side.letter}: {side.name}" for side in compared}
    rows = [(names.get(name, name), *values) for name, values in cross.rows]
    label = "Bits per byte of each run (row) on each text (column); the darker, the more than the best of its column"
    picture = Picture("cross", label, lambda colours: draw(cross, colours))
    return Section(
        "Each on the others' text", cross.remarks, ("bits per byte", *cross.header), rows, [picture]
    )


def draw(cross: Cross, colours: Palette) -> Figure:
    """A heat map: the shade of a cell says how far it is above the lowest of its column, in octaves."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns = len(cross.letters), len(cross.columns)
    figure = Figure(figsize=(max(9.0, 1.2 * columns), 0.8 + 0.5 * rows), layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for x, column in enumerate(cross.columns):
        known = [bpb for bpb in column.bpb.values() if bpb is not None and math.isfinite(bpb)]
        for y, letter in enumerate(cross.letters):
            bpb = column.bpb.get(letter)
            if bpb is not None and bpb in known:
                octaves = math.log2(bpb / min(known)) if min(known) > 0 else 0.0
                shade = 0.08 + 0.62 * min(1.0, octaves / 2)
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colours.validation, alpha=shade)
                )
            weight = "bold" if letter in column.owners.split(", ") else "normal"
            axes.text(
                x,
                y,
                number(bpb, ".3f"),
                ha="center",
                va="center",
                color=colours.ink,
                fontweight=weight,
            )
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_xticks(range(columns), cross.header)
    axes.set_yticks(range(rows), cross.letters)
    axes.xaxis.tick_top()
    axes.tick_params(colors=colours.ink, length=0)
    axes.spines[:].set_visible(False)
    return figure


class _Reader(NamedTuple):
    letter: str
    unknown: frozenset[str]  # characters of the text
    share: float  # of the text's characters that stand in lines without unknown ones


def _columns(compared: Sequence[Side], say: Say) -> tuple[list[Column], list[str]]:
    """A column for each different validation text, with its text, and what could not be had."""
    by_text: dict[Any, Column] = {}
    remarks = []
    for side in compared:
        found = by_text.setdefault(side.validation_text, Column(side.letter))
        if side.letter not in found.owners:
            found.owners += f", {side.letter}"
        if found.text:
            continue
        try:
            run = side.run
            dataset = shards.of_run(run.config.data, run.record["data"], run.tokenizer, say)
        except GlasslmError as error:
            remarks.append(f"The text of {side.letter} could not be had: {error}")
            continue
        found.text, found.total = _sampled(dataset), dataset.val.bytes
    return list(by_text.values()), remarks


def _sampled(dataset: Dataset) -> str:
    """The validation text, or evenly spaced stretches of it, in whole lines where it has lines."""
    ids, tokenizer = dataset.val.tokens, dataset.tokenizer
    if dataset.val.bytes <= MOST:
        return text_of(ids, tokenizer, dataset.val.bytes).decode("utf-8", "ignore")
    width = MOST // STRETCHES
    edges = [i * len(ids) // STRETCHES for i in range(STRETCHES + 1)]
    pieces = [
        text_of(ids[begin:end], tokenizer, width).decode("utf-8", "ignore")
        for begin, end in pairwise(edges)
    ]
    return "".join(piece[piece.find("\n") + 1 : piece.rfind("\n") + 1] or piece for piece in pieces)


def _prepare(column: Column, compared: Sequence[Side]) -> list[str]:
    """Cut the text to what its readers have in common, and name them in `bpb`; returns what is to be said of that."""
    text = column.text
    if not text:
        return []
    lines = text.splitlines(keepends=True)
    readers = [_reader(side, text, lines) for side in compared]
    barred = [reader for reader in readers if reader.share < READABLE]
    unknown = frozenset[str]().union(
        *(reader.unknown for reader in readers if reader not in barred)
    )
    kept = "".join(line for line in lines if unknown.isdisjoint(line))
    column.text = kept
    if len(kept) > 1:
        column.bpb = {reader.letter: None for reader in readers if reader not in barred}
        column.gzip_bpb = baselines(kept.encode())["gzip_bpb"]
    remarks = [
        f"{one.letter} cannot read the text of {column.owners}: {1 - one.share:.0%} of it stands in lines with "
        f"characters that its tokenizer does not know ({_listed(one.unknown)})."
        for one in barred
    ]
    if (taken := len(text.encode())) < column.total:
        remarks.append(
            f"Of the text of {column.owners}, {taken / column.total:.1%} was taken, evenly spaced."
        )
    if len(kept) < len(text):
        remarks.append(f"Of the text of {column.owners}, {1 - len(kept) / len(text):.1%} was left out for all: lines "
                       f"with characters that not all of the others know ({_listed(unknown)}).")  # fmt: skip
    return remarks


def _reader(side: Side, text: str, lines: Sequence[str]) -> _Reader:
    unknown = _unknown(side.run.tokenizer, text)
    readable = sum(len(line) for line in lines if unknown.isdisjoint(line))
    return _Reader(side.letter, unknown, readable / len(text))


def _unknown(tokenizer: Tokenizer, text: str) -> frozenset[str]:
    """The characters of `text` that the tokenizer cannot express."""
    characters = sorted(set(text))
    if _knows(tokenizer, "".join(characters)):
        return frozenset()
    return frozenset(character for character in characters if not _knows(tokenizer, character))


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except InputError:
        return False
    return True


def _listed(characters: frozenset[str]) -> str:
    shown = ", ".join(map(repr, sorted(characters)[:NAMED]))
    return shown + (f" and {len(characters) - NAMED} more" if len(characters) > NAMED else "")
