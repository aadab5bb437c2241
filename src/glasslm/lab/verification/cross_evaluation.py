"""Cross evaluation: bits per byte of each run (row) on the validation text of each run (column).

All runs of a column score the same characters. A run whose tokenizer lacks many characters of the
text has no number there. Lines with characters that another run cannot encode are left out for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from glasslm.data.baselines import simple_baselines
from glasslm.data.dataset import Dataset
from glasslm.data.lossy_tokenizers import explain_lossy_tokenizer
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import DamagedError, DivergedError, InputError
from glasslm.inference import trained_model
from glasslm.lab.verification.compared_run import ComparedRun
from glasslm.report.data_checks import decode_bytes
from glasslm.report.page import Picture, Section
from glasslm.text import Notify, format_bytes, format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glasslm.report.figures import Palette

MAX_TEXT_BYTES = 128_000  # scored of a text; Shakespeare's validation text has fewer
EXCERPTS = 16  # of a larger text, evenly spaced
MIN_READABLE_SHARE = 0.9  # of a text, in whole lines, that a run must be able to encode
MAX_LISTED_CHARACTERS = 12

EXPLANATION = (
    "Bits per byte of the best checkpoints, each with its own tokenizer and context. Compare "
    "within a column: all runs, and gzip, scored the same text. Do not compare within a row: "
    "texts differ in their entropy."
)


@dataclass
class Column:
    """One validation text, and the bits per byte of the runs on it."""

    owners: str  # letters of the runs with this validation text: "A, C"
    text: str = ""  # the scored part
    total: int = 0  # bytes of the whole validation text
    # By letter; None if the run could not be scored.
    bpb: dict[str, float | None] = field(default_factory=dict)
    gzip_bpb: float | None = None

    @property
    def bytes(self) -> int:
        """The length of the scored part."""
        return len(self.text.encode())


@dataclass(frozen=True)
class CrossEvaluation:
    """The matrix, its column headers and what limits it."""

    letters: tuple[str, ...]
    columns: tuple[Column, ...]
    remarks: tuple[str, ...]

    @property
    def header(self) -> tuple[str, ...]:
        """The headers of the columns of `rows`."""
        return tuple(f"text of {column.owners}" for column in self.columns)

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """A letter, or "gzip", with its bits per byte as text."""
        by_run = [
            (letter, [column.bpb.get(letter) for column in self.columns]) for letter in self.letters
        ]
        all_rows = [*by_run, ("gzip", [column.gzip_bpb for column in self.columns])]
        return [
            (name, [format_number(value, ".3f") for value in values]) for name, values in all_rows
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """The matrix for --json."""
        texts = [
            {
                "of": c.owners.split(", "),
                "bytes": c.bytes,
                "of_bytes": c.total,
                "gzip_bpb": c.gzip_bpb,
            }
            for c in self.columns
        ]
        bpb = {
            letter: [column.bpb.get(letter) for column in self.columns] for letter in self.letters
        }
        return {"texts": texts, "bpb": bpb, "remarks": list(self.remarks)}


def evaluate_runs(compared: Sequence[ComparedRun], notify: Notify) -> CrossEvaluation:
    """Score every run on every text; remarks have the reason for each missing number.

    Raises InputError where no run learned a text.
    """
    learners = [run for run in compared if not run.run.config.data.predicts_answers]
    if not learners:
        raise InputError("no run learned a text, but --cross scores texts: leave it out")
    columns, remarks = _load_columns(learners, notify)
    remarks += _overlap_remarks(columns, learners)
    remarks += [
        f"{run.letter} learned the answers of a task or of conversations alone: neither it nor its "
        "text is scored."
        for run in compared
        if run not in learners
    ]
    for column in columns:
        remarks += _select_lines(column, learners)
    for run in learners:
        readable = [column for column in columns if run.letter in column.bpb]
        try:
            model = trained_model.load_model(run.run.path)
        except (DamagedError, DivergedError, InputError) as error:
            remarks.append(f"{run.letter} could not be scored: {error}")
            continue
        for column in readable:
            notify(
                f"{run.letter} scores the text of {column.owners} ({format_bytes(column.bytes)})"
            )
            ids = model.tokenizer.encode(column.text)
            if why := model.tokenizer.lossy_reason:
                remarks.append(
                    f"{run.letter} has no bits per byte: {explain_lossy_tokenizer(why)}."
                )
            elif model.tokenizer.decode(ids) == column.text:
                column.bpb[run.letter] = model.score(ids).bpb
            else:
                remarks.append(
                    f"{run.letter}: its tokens do not decode to the text of {column.owners}."
                )
    letters = tuple(run.letter for run in compared)
    return CrossEvaluation(letters, tuple(columns), (EXPLANATION, *remarks))


def section(evaluation: CrossEvaluation, compared: Sequence[ComparedRun]) -> Section:
    """The section of a comparison with the matrix."""
    names = {run.letter: f"{run.letter}: {run.name}" for run in compared}
    rows = [(names.get(name, name), *values) for name, values in evaluation.rows]
    label = (
        "Bits per byte of each run (row) on each text (column); darker cells are further above "
        "the best of their column"
    )
    picture = Picture("cross", label, lambda colours: draw_matrix(evaluation, colours))
    header = ("bits per byte", *evaluation.header)
    return Section("Each run on each text", evaluation.remarks, header, rows, [picture])


def draw_matrix(evaluation: CrossEvaluation, colours: Palette) -> Figure:
    """A heat map: the shade of a cell is its ratio to the lowest of its column, in octaves."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns = len(evaluation.letters), len(evaluation.columns)
    figure = Figure(figsize=(max(9.0, 1.2 * columns), 0.8 + 0.5 * rows), layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for x, column in enumerate(evaluation.columns):
        finite = [bpb for bpb in column.bpb.values() if bpb is not None and math.isfinite(bpb)]
        for y, letter in enumerate(evaluation.letters):
            bpb = column.bpb.get(letter)
            if bpb is not None and bpb in finite:
                octaves = math.log2(bpb / min(finite)) if min(finite) > 0 else 0.0
                shade = 0.08 + 0.62 * min(1.0, octaves / 2)
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colours.validation, alpha=shade)
                )
            weight = "bold" if letter in column.owners.split(", ") else "normal"
            axes.text(
                x,
                y,
                format_number(bpb, ".3f"),
                ha="center",
                va="center",
                color=colours.ink,
                fontweight=weight,
            )
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_xticks(range(columns), evaluation.header)
    axes.set_yticks(range(rows), evaluation.letters)
    axes.xaxis.tick_top()
    axes.tick_params(colors=colours.ink, length=0)
    axes.spines[:].set_visible(False)
    return figure


class _Coverage(NamedTuple):
    """How much of a text a run can encode."""

    letter: str
    unknown: frozenset[str]  # characters of the text that the tokenizer lacks
    readable_share: float  # of the characters, in lines without unknown ones


def _load_columns(
    compared: Sequence[ComparedRun], notify: Notify
) -> tuple[list[Column], list[str]]:
    """A column for each different validation text, and a remark for each text that is missing."""
    by_text: dict[Any, Column] = {}
    remarks = []
    for run in compared:
        column = by_text.setdefault(run.validation_text, Column(run.letter))
        if run.letter not in column.owners:
            column.owners += f", {run.letter}"
        if column.text:
            continue
        try:
            dataset = run.run.dataset(notify)
        except (DamagedError, DivergedError, InputError) as error:
            remarks.append(f"The text of {run.letter} could not be loaded: {error}")
            continue
        column.text, column.total = _sample_text(dataset), dataset.val.bytes
        if dataset.tokenizer.special_tokens:
            names = ", ".join(dataset.tokenizer.special_tokens)
            remarks.append(
                f"The text of {column.owners} is read without its special tokens ({names}), which "
                "other tokenizers lack. All "
                f"runs read its documents as one, so the number of {run.letter} may differ from "
                "that on its own validation text."
            )
    return list(by_text.values()), remarks


def _overlap_remarks(columns: Sequence[Column], compared: Sequence[ComparedRun]) -> list[str]:
    """A remark for each column whose text may be in the training text of other runs.

    The training text is the first part of all files together, and the validation text follows it.
    """
    remarks = []
    for column in columns:
        owner = next(run for run in compared if run.letter == column.owners.split(", ")[0])
        files, end = owner.validation_text[0], _training_share(owner)
        letters = [
            run.letter
            for run in compared
            if not set(files).isdisjoint(other := run.validation_text[0])
            and (other != files or _training_share(run) > end)
        ]
        if letters:
            remarks.append(
                f"The training text of {', '.join(letters)} may contain a part of the text of "
                f"{column.owners}: they have files in common, but not the split. There, the "
                f"numbers of {', '.join(letters)} may be too low."
            )
    return remarks


def _training_share(run: ComparedRun) -> float:
    data = run.run.config.data
    return round(1 - data.val_fraction - data.test_fraction, 9)  # 0.1 + 0.2 is not 0.15 + 0.15


def _sample_text(dataset: Dataset) -> str:
    """The validation text, or evenly spaced excerpts of it, in whole lines if it has lines."""
    ids, tokenizer = dataset.val.tokens, dataset.tokenizer
    if dataset.val.bytes <= MAX_TEXT_BYTES:
        return decode_bytes(ids, tokenizer, dataset.val.bytes).decode("utf-8", "ignore")
    width = MAX_TEXT_BYTES // EXCERPTS
    edges = [i * len(ids) // EXCERPTS for i in range(EXCERPTS + 1)]
    pieces = [
        decode_bytes(ids[begin:end], tokenizer, width).decode("utf-8", "ignore")
        for begin, end in pairwise(edges)
    ]
    return "".join(piece[piece.find("\n") + 1 : piece.rfind("\n") + 1] or piece for piece in pieces)


def _select_lines(column: Column, compared: Sequence[ComparedRun]) -> list[str]:
    """Cut the text to the lines that its readers can encode, and enter them in `bpb`.

    Returns remarks on what is left out.
    """
    text = column.text
    if not text:
        return []
    lines = text.splitlines(keepends=True)
    coverages = [_measure_coverage(run, text, lines) for run in compared]
    excluded = [run for run in coverages if run.readable_share < MIN_READABLE_SHARE]
    readers = [run for run in coverages if run not in excluded]
    unknown = frozenset[str]().union(*(reader.unknown for reader in readers))
    common = "".join(line for line in lines if unknown.isdisjoint(line))
    column.text = common
    if len(common) > 1:
        column.bpb = {reader.letter: None for reader in readers}
        column.gzip_bpb = simple_baselines(common.encode())["gzip_bpb"]
    remarks = [
        f"{run.letter} cannot read the text of {column.owners}: {1 - run.readable_share:.0%} of "
        "it is in lines with characters that its tokenizer lacks "
        f"({_list_characters(run.unknown)})."
        for run in excluded
    ]
    if (sampled := len(text.encode())) < column.total:
        remarks.append(
            f"Of the text of {column.owners}, {sampled / column.total:.1%} is scored, evenly "
            "spaced."
        )
    if len(common) < len(text):
        remarks.append(
            f"Of the text of {column.owners}, {1 - len(common) / len(text):.1%} is left out for "
            f"all: lines with characters that some tokenizers lack ({_list_characters(unknown)})."
        )
    return remarks


def _measure_coverage(run: ComparedRun, text: str, lines: Sequence[str]) -> _Coverage:
    unknown = _unknown_characters(run.run.tokenizer, text)
    readable = sum(len(line) for line in lines if unknown.isdisjoint(line))
    return _Coverage(run.letter, unknown, readable / len(text))


def _unknown_characters(tokenizer: Tokenizer, text: str) -> frozenset[str]:
    """The characters of `text` that the tokenizer cannot encode."""
    characters = sorted(set(text))
    if _can_encode(tokenizer, "".join(characters)):
        return frozenset()
    return frozenset(character for character in characters if not _can_encode(tokenizer, character))


def _can_encode(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except InputError:
        return False
    return True


def _list_characters(characters: frozenset[str]) -> str:
    listed = ", ".join(map(repr, sorted(characters)[:MAX_LISTED_CHARACTERS]))
    return listed + (
        f" and {len(characters) - MAX_LISTED_CHARACTERS} more"
        if len(characters) > MAX_LISTED_CHARACTERS
        else ""
    )
