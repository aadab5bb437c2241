"""Measures that only some texts have, beside the same of natural text: does it write Python, what names does it invent?

The model writes a fixed number of texts from a fixed seed. Without natural text, judged in the same way, such a share
would mean nothing; so there is no measure where the tokens of the run's text are gone.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glasslm.data.shards import Dataset
from glasslm.errors import DivergedError
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import Model
from glasslm.report import names, syntax
from glasslm.report.data_checks import SEARCHED, UNSEEN, text_of
from glasslm.runs.run_folder import Run
from glasslm.text import size

Kind = Literal["python", "names"]
Row = tuple[str, str, str]  # what, of the model's texts, of natural ones

TEMPERATURE, SEED = 0.8, 42  # as `glasslm generate` writes
TEXTS, BYTES = (
    20,
    300,
)  # of Python: about so many bytes each, so that runs with other tokens can be compared
NAMES, LONGEST = 200, 40  # names, and tokens of one
ROWS, CACHED = (
    25,
    1 << 15,
)  # texts written at once, and tokens for which their cache has room: some 100 MB
LOOKED_AT = 64 << 10  # tokens of the training text, by which a list of names is known

TOO_SLOW = (
    "This model writes too slowly for a report: `glasslm evaluate` on this run takes its time."
)
TOO_SHORT = "The validation text is too short to compare with."


@dataclass(frozen=True)
class Domain:
    """What a section shows; all empty but `kind`, `question` and `missing` where it could not be measured."""

    kind: Kind
    question: str
    missing: str = ""
    how: str = ""
    header: Row = ("", "", "")
    rows: tuple[Row, ...] = ()
    remark: str = ""
    examples: tuple[str, ...] = ()  # names that it invented
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # that it took

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind} | ({"missing": self.missing} if self.missing else self.measured)


def kind(run: Run, dataset: Dataset | None) -> Kind | None:
    """Of what kind the run's text is; None for all others.

    Python is the corpus of that name, and text of which more than half the bytes are in .py files. Names are known by
    their looks, for which their tokens must be in the cache.
    """
    if run.config.data.corpus == "python":
        return "python"
    files = run.record.get("data", {}).get("files", [])
    if 2 * sum(file["bytes"] for file in files if file["path"].endswith(".py")) > sum(
        file["bytes"] for file in files
    ):
        return "python"
    if dataset and names.is_list(_text(dataset.train.tokens[:LOOKED_AT], dataset, SEARCHED)):
        return "names"
    return None


def examine(run: Run, dataset: Dataset | None, model: Model, seconds: float) -> Domain | None:
    """The measure that fits the run's text, taken in about so many seconds; None for a text of no such kind."""
    found = kind(run, dataset)
    if found is None:
        return None
    begun = time.monotonic()
    asked = "Does it write Python?" if found == "python" else "What names does it invent?"
    if dataset is None:
        return Domain(found, asked, "The tokens of its text are no longer in the cache, and with them the natural "
                      "text to compare with: `glasslm evaluate` on this run brings them back.")  # fmt: skip
    measure = _python if found == "python" else _names
    try:
        domain = measure(dataset, model, asked, begun + seconds)
    except DivergedError as error:  # its logits are not finite, and so it cannot write
        return Domain(found, asked, str(error))
    return replace(domain, seconds=time.monotonic() - begun)


def write(
    model: Model, prompt: str, count: int, most: int, stop: str, deadline: float
) -> list[str | None]:
    """`count` continuations of `prompt`, of up to `most` tokens; None for one that did not come to `stop`.

    Fewer, and perhaps none, when the deadline (time.monotonic) comes first: the ones that were not begun or finished
    by then are left out, whatever their lengths would have been.
    """
    rows = max(1, min(ROWS, CACHED // model.config.model.block_size))
    written: list[str | None] = []
    for first in range(0, count, rows):
        texts = [""] * min(rows, count - first)
        ended = [not stop] * len(texts)
        sampling = Sampling(temperature=TEMPERATURE, seed=SEED + first)
        for piece in model.pieces(
            [prompt], most, sampling=sampling, samples=len(texts), stop=stop or ()
        ):
            texts[piece.sample] += piece.text
            ended[piece.sample] |= piece.finish == "stop"
            if time.monotonic() > deadline:
                return written
        written += [text if end else None for text, end in zip(texts, ended)]
    return written


def _python(dataset: Dataset, model: Model, asked: str, deadline: float) -> Domain:
    val = _text(dataset.val.tokens, dataset, UNSEEN)
    if not val:
        return Domain("python", asked, TOO_SHORT)
    prompt, tokens = (
        syntax.opening(val, TEXTS),
        math.ceil(BYTES * len(dataset.val.tokens) / dataset.val.bytes),
    )
    texts = [text or "" for text in write(model, prompt, TEXTS, tokens, "", deadline)]
    if not texts:
        return Domain("python", asked, TOO_SLOW)
    natural = syntax.pieces(val, prompt, list(map(len, texts)))
    if not natural:
        return Domain("python", asked, TOO_SHORT)
    mine, theirs = syntax.of(texts), syntax.of(natural)
    outcomes: tuple[tuple[str, syntax.Outcome], ...] = (
        ("parses, as far as it goes", "parses"),
        ("broken: a syntax error before its end", "broken"),
        ("unfinished: no statement ends in it", "unfinished"),
    )
    rows = [
        (name, str(mine.share(outcome)), str(theirs.share(outcome))) for name, outcome in outcomes
    ]
    rows += [
        (
            "lines from its beginning that parse, on average",
            f"{mine.lines:.1f}",
            f"{theirs.lines:.1f}",
        )
    ]
    errors = "; ".join(f"{error} ({count})" for error, count in mine.errors)
    blank = prompt.count("\n") - 1
    where = f"{blank} blank line{'s' if blank > 1 else ''}" if blank else "a line break"
    return Domain(
        "python",
        asked,
        how=f"{len(texts)} texts of {tokens} tokens after {where}, temperature {TEMPERATURE}, seed {SEED}, beside "
        f"{len(natural)} pieces of the validation text of the same lengths after the same. Each without its last line, "
        "which is broken off, and without lines at its end that merely lack what follows them; then by ast.parse. In "
        "brackets: 95% intervals.",
        header=("", "what it wrote", "natural text"),
        rows=tuple(rows),
        remark=f"Its commonest errors: {errors}." if errors else "",
        measured=_written(len(texts), tokens)
        | mine.facts
        | {"natural": {"texts": len(natural)} | theirs.facts},
    )


def _names(dataset: Dataset, model: Model, asked: str, deadline: float) -> Domain:
    written = write(model, "\n", NAMES, LONGEST, "\n", deadline)
    found = names.examine(
        written,
        _text(dataset.train.tokens, dataset, SEARCHED),
        _text(dataset.val.tokens, dataset, UNSEEN),
    )
    if not written:
        return Domain("names", asked, TOO_SLOW)
    if not found.natural_known.of:
        return Domain("names", asked, TOO_SHORT)
    rows = (
        ("in the training text", str(found.known), str(found.natural_known)),
        ("not there, but in the validation text", str(found.unseen), "-"),
        ("invented: in neither", str(found.invented), "-"),
        ("no name: empty, or without an end", str(found.nothing), "-"),
        ("different ones among the names", str(found.distinct), str(found.natural_distinct)),
        (
            "well formed, of those new to the training text",
            str(found.well_formed),
            str(found.natural_well_formed),
        ),
    )
    return Domain(
        "names",
        asked,
        how=f"{len(written)} names, temperature {TEMPERATURE}, seed {SEED}, beside the {found.natural_known.of:,} of "
        "the validation text. Well formed is what has no three letters in a row, its beginning and its end included, "
        "that no name of the training text has. In brackets: 95% intervals." + _extent(dataset),
        header=("", "what it wrote", "the validation text"),
        rows=rows,
        examples=found.examples,
        measured=_written(len(written), LONGEST) | found.facts,
    )


def _written(texts: int, tokens: int) -> dict[str, Any]:
    return {"texts": texts, "tokens": tokens, "temperature": TEMPERATURE, "seed": SEED}


def _extent(dataset: Dataset) -> str:
    if dataset.train.bytes <= SEARCHED:
        return ""
    return f" Of the training text the first {size(SEARCHED)} were looked at."


def _text(tokens: Any, dataset: Dataset, most: int) -> str:
    return text_of(tokens, dataset.tokenizer, most).decode("utf-8", "ignore")
