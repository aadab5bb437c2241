"""What the numbers of a run are worth: what its samples copy, what its validation text repeats, what counting reaches.

A small text is soon learnt by heart, and copied passages are easily taken for talent. All is computed on bytes, from
the tokens in the cache and the samples of the report; large texts are searched in part, as far as the constants say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.data.baselines import ORDERS, Baselines, after_reading
from glasslm.data.overlap import WINDOW, Passage, longest_shared, windows_found
from glasslm.data.shards import Dataset
from glasslm.data.tokenizers import Tokenizer
from glasslm.report.facts import Line
from glasslm.report.findings import Finding
from glasslm.text import size

SEARCHED = (
    16 << 20
)  # bytes of training text, from its beginning, searched for copies: about a second
COUNTED = (
    4 << 20
)  # bytes of training text, up to its end, that the others read: gzip and xz look back from there
UNSEEN = 512 << 10  # bytes of validation text
AROUND = 60  # bytes shown on either side of a copied passage
SHOWN = 400  # bytes of a copied passage
RECITES = 2.0  # times the copied length of natural text
LEAKING, LEAKED = (
    0.01,
    0.1,
)  # shares of the validation text; of Shakespeare's, nothing is in the training text


class Copied(NamedTuple):
    """The longest copied passage where it stands in the training text."""

    before: str
    passage: str
    after: str
    place: int  # byte of the training text


@dataclass(frozen=True)
class Honesty:
    """What the section shows; all empty but `missing` where the text is gone."""

    missing: str = ""
    judged: tuple[Finding, ...] = ()  # its signals are questions
    copied: Copied | None = None
    baselines: tuple[tuple[str, str, str], ...] = ()  # who, bits per byte, remark
    extent: str = ""  # how much of the text was looked at


def examine(dataset: Dataset | None, samples: Iterable[str], best: Line | None) -> Honesty:
    """Judge a run by its tokenised text, if the cache has it, the texts it wrote and its best validation line."""
    if dataset is None:
        return Honesty("The tokens of its text are no longer in the cache: `glasslm evaluate` on this run, then "
                       "`glasslm report`, brings them back if the text is still there.")  # fmt: skip
    train = text_of(dataset.train.tokens, dataset.tokenizer, SEARCHED)
    val = text_of(dataset.val.tokens, dataset.tokenizer, UNSEEN)
    if not (train and val):
        return Honesty("The text of its tokens is empty.")
    leakage = _leakage(train, val)
    reached = after_reading(end_of(dataset.train.tokens, dataset.tokenizer, COUNTED), val)
    pieces = [sample.encode("utf-8", "replace") for sample in samples if sample]
    copying, copied = _copying(pieces, train, val, leakage) if pieces else (None, None)
    judged = (copying, leakage, _worth(reached, best))
    return Honesty(
        judged=tuple(one for one in judged if one),
        copied=copied,
        baselines=tuple(_table(reached, best)),
        extent=_extent(dataset, train, val),
    )


def text_of(tokens: NDArray[Any], tokenizer: Tokenizer, most: int) -> bytes:
    """The bytes of `tokens` (N,), or the first `most` of them."""
    joined = np.frombuffer(b"".join(tokenizer.token_bytes), np.uint8)
    begins = np.cumsum(tokenizer.byte_lengths) - tokenizer.byte_lengths
    parts, room = [], most
    for first in range(0, len(tokens), 1 << 20):
        ids = tokens[first : first + (1 << 20)]
        lengths = tokenizer.byte_lengths[ids]
        before = np.cumsum(lengths) - lengths
        at = np.repeat(begins[ids] - before, lengths) + np.arange(lengths.sum())
        parts.append(joined[at[:room]].tobytes())
        room -= len(parts[-1])
        if not room:
            break
    return b"".join(parts)


def end_of(tokens: NDArray[Any], tokenizer: Tokenizer, most: int) -> bytes:
    """The last `most` bytes of `tokens` (N,), or all there are."""
    parts, room, stop = [], most, len(tokens)
    while room > 0 and stop > 0:
        begin = max(0, stop - (1 << 20))
        part = text_of(
            tokens[begin:stop], tokenizer, int(tokenizer.byte_lengths[tokens[begin:stop]].sum())
        )
        parts.append(part[-room:])
        room, stop = room - len(parts[-1]), begin
    return b"".join(reversed(parts))


def _copying(
    pieces: Sequence[bytes], train: bytes, val: bytes, leakage: Finding
) -> tuple[Finding, Copied]:
    """What samples copy, beside what evenly spaced pieces of unseen text of the same lengths copy."""
    found = longest_shared(pieces, train)
    starts = [
        i * max(0, len(val) - len(piece)) // max(1, len(pieces) - 1)
        for i, piece in enumerate(pieces)
    ]
    usual = longest_shared(
        [val[start : start + len(piece)] for start, piece in zip(starts, pieces)], train
    ).length
    passage = train[found.place : found.place + found.length]
    seen = (
        f"Of {sum(map(len, pieces)):,} bytes in {len(pieces)} samples, the longest passage that stands word for word "
        f"in the training text has {_length(passage)}; of as much validation text in as many pieces, {usual:,} bytes."
    )
    question = "Does it copy?"
    if leakage.verdict == "bad":
        judged = Finding(
            question,
            "watch",
            seen,
            "The validation text is no yardstick here: it is copied itself.",
        )
    elif found.length > RECITES * usual:
        means = (
            "More than twice as much as natural text does: it recites. More text, fewer epochs (--patience stops at "
            "the best validation loss) or --dropout help."
        )
        judged = Finding(question, "bad", seen, means)
    elif found.length > usual:
        judged = Finding(
            question, "ok", seen, "Not much more than natural text, which repeats itself, too."
        )
    else:
        judged = Finding(
            question, "ok", seen, "No more than natural text does, which repeats itself, too."
        )
    end = found.place + found.length
    around = train[max(0, found.place - AROUND) : found.place], train[end : end + AROUND]
    if found.length > SHOWN:
        passage, around = passage[:SHOWN], (around[0], b" ...")
    return judged, Copied(_shown(around[0]), _shown(passage), _shown(around[1]), found.place)


def _leakage(train: bytes, val: bytes) -> Finding:
    """How much of the validation text stands in the training text."""
    width = min(WINDOW, len(val))
    found = windows_found(val, train, width)
    share = float(found.mean())
    longest = longest_shared([val], train)
    seen = (
        f"{int(found.sum()):,} of {len(found):,} windows of {width} bytes of the validation text ({share:.1%}) stand "
        f"in the training text. The longest passage in both has {_length(_taken(val, longest))}, from byte "
        f"{longest.start:,} of the validation text and byte {longest.place:,} of the training text."
    )
    question = "Is its validation text new to it?"
    if share < LEAKING:
        return Finding(question, "ok", seen, "Yes: the loss there tells how it does elsewhere.")
    if share < LEAKED:
        means = "Most of it: on text that is wholly new the loss would be a little higher."
        return Finding(question, "watch", seen, means)
    means = "No: the validation loss tells of memory as well. Take duplicates out of the text, then train again."
    return Finding(question, "bad", seen, means)


def _worth(reached: Baselines, best: Line | None) -> Finding:
    """The model's bits per byte beside the best of the others."""
    rivals = {f"the best n-gram of bytes (order {reached.best_order})": min(reached.ngrams),
              "xz": min(reached.xz, reached.xz_after), "gzip": min(reached.gzip, reached.gzip_after)}  # fmt: skip
    others = ", ".join(f"{name} {bpb:.2f}" for name, bpb in rivals.items())
    bpb, question = (best or {}).get("bpb"), "Is it better than counting?"
    if bpb is None:
        seen = f"Bits a byte of the validation text: {others}."
        return Finding(
            question, "watch", seen, "Nobody knows: no finite validation loss was recorded."
        )
    seen = f"The model needs {bpb:.2f} bits a byte of the validation text, {others}."
    name, least = min(rivals.items(), key=lambda rival: rival[1])
    if bpb < least:
        means = f"Yes: it needs {1 - bpb / least:.0%} less than {name}."
        return Finding(question, "ok", seen, means)
    means = f"No: {name} needs no network and does better. Train longer, or ask `glasslm diagnose` what holds it back."
    return Finding(question, "bad", seen, means)


def _table(reached: Baselines, best: Line | None) -> list[tuple[str, str, str]]:
    rows = []
    if best is not None and best.get("bpb") is not None:
        measured = "all of the validation part" if best.get("whole") else "an evenly spaced sample"
        rows += [("the model", best["bpb"], f"its best, at step {best['step']:,}, on {measured}")]
    orders = ", ".join(f"{bpb:.2f}" for bpb in reached.ngrams)
    rows += [
        (f"n-grams of {reached.best_order} bytes", min(reached.ngrams),
         f"counted in the training text, Witten-Bell; the best of 1 to {ORDERS}: {orders}"),
        ("single bytes", reached.ngrams[0], "by how often each stands in the training text"),
        ("xz, after reading", reached.xz_after, "what the validation text adds to the last MB of the training text"),
        ("xz", reached.xz, "the validation text by itself"),
        ("gzip, after reading", reached.gzip_after, "which remembers the last 32 kB"),
        ("gzip", reached.gzip, "the validation text by itself"),
    ]  # fmt: skip
    return [(name, f"{bpb:.3f}", remark) for name, bpb, remark in rows]


def _extent(dataset: Dataset, train: bytes, val: bytes) -> str:
    """In words, what was left out; empty where nothing was."""
    told = []
    if dataset.train.bytes > len(train):
        told.append(f"Copies were looked for in the first {size(len(train))} of the training text.")
    if dataset.train.bytes > COUNTED:
        told.append(f"n-grams were counted in the last {size(COUNTED)} of the training text.")
    if dataset.val.bytes > len(val):
        told.append(f"Of the validation text the first {size(len(val))} were taken.")
    return " ".join(told)


def _taken(text: bytes, passage: Passage) -> bytes:
    return text[passage.start : passage.start + passage.length]


def _length(passage: bytes) -> str:
    characters = len(_shown(passage))
    return f"{len(passage):,} bytes" + (
        f" ({characters:,} characters)" if characters != len(passage) else ""
    )


def _shown(passage: bytes) -> str:
    return passage.decode("utf-8", "ignore")  # its ends may be inside a character
