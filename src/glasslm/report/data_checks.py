"""Data checks of a run: copied passages, leaked validation text, and simple baselines.

A small text is soon memorized, and long verbatim copies can be mistaken for skill. Everything is
computed on bytes, from the tokens in the cache and the samples of the report. Large texts are
searched in part, up to the limits below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from glasslm.data.baselines import MAX_ORDER, Baselines, explain_baseline_text, trained_baselines
from glasslm.data.dataset import Dataset
from glasslm.data.overlap import (
    MIN_LINE_BYTES,
    WINDOW_BYTES,
    Passage,
    count_shared_line_bytes,
    find_longest_passage,
    match_windows,
)
from glasslm.data.token_file import Tokens
from glasslm.data.tokenizers import Tokenizer
from glasslm.report.findings import Finding
from glasslm.runs.metrics import EvalLine
from glasslm.text import format_bytes

MAX_SEARCHED_BYTES = 16 << 20  # from the start of the training text: about a second of search
# To the end of the training text, which gzip and xz read before they compress: they look back from
# there.
MAX_BASELINE_BYTES = 4 << 20
MAX_VALIDATION_BYTES = 512 << 10
MAX_SHOWN_BYTES = 400  # of a copied passage
CONTEXT_BYTES = 60  # shown before and after a copied passage

RECITING_RATIO = 2.0  # copied length of the samples, as a multiple of that of natural text
LEAK_WATCH_SHARE, LEAK_BAD_SHARE = 0.01, 0.1  # of the validation text; Shakespeare has 0

COPYING = "Does the model copy its training text?"
LEAKAGE = "Is the validation text new to the model?"
BASELINES = "Is the model better than n-grams, gzip and xz?"


class CopiedPassage(NamedTuple):
    """The longest copied passage with its context in the training text."""

    before: str
    passage: str
    after: str
    offset: int  # bytes from the start of the training text


@dataclass(frozen=True)
class DataChecks:
    """The content of the report's section; only `missing` is set if there is no text."""

    missing: str = ""  # the reason why there are no checks
    findings: tuple[Finding, ...] = ()  # each signal is a question
    copied: CopiedPassage | None = None
    baselines: tuple[tuple[str, str, str], ...] = ()  # name, bits per byte, remark
    extent: str = ""  # how much of the text was used


def check_data(
    dataset: Dataset | None, samples: Iterable[str], best: EvalLine | None
) -> DataChecks:
    """The checks of a run, from its cached text, its samples and its best validation line."""
    if dataset is None:
        return DataChecks(
            "The run's tokens are not in the cache. `glasslm evaluate` on this run, then `glasslm "
            "report`, prepares them again if the text still exists."
        )
    if dataset.train.conversations is not None:
        return DataChecks(
            "The loss is that of the answers alone, so it cannot be compared with that of n-grams "
            "on a text. `glasslm evaluate --suite dialogues` counts exact answers to the made-up "
            "dialogues."
        )
    if dataset.train.answers is not None:
        return DataChecks(
            "The loss is that of the answers alone, so it cannot be compared with that of n-grams, "
            "gzip and xz on a text. The section on the task compares the share of exact answers "
            "with that of n-grams."
        )
    train = decode_bytes(dataset.train.tokens, dataset.tokenizer, MAX_SEARCHED_BYTES)
    val = decode_bytes(dataset.val.tokens, dataset.tokenizer, MAX_VALIDATION_BYTES)
    if not (train and val):
        return DataChecks("The run's tokens decode to an empty text.")
    leakage = _check_leakage(train, val)
    train_end = decode_last_bytes(dataset.train.tokens, dataset.tokenizer, MAX_BASELINE_BYTES)
    baselines = trained_baselines(train_end, val)
    pieces = [sample.encode("utf-8", "replace") for sample in samples if sample]
    copying, copied = _check_copying(pieces, train, val, leakage) if pieces else (None, None)
    difference = explain_baseline_text(dataset.tokenizer)
    findings = (copying, leakage, _compare_baselines(baselines, best, difference))
    return DataChecks(
        findings=tuple(finding for finding in findings if finding),
        copied=copied,
        baselines=tuple(_baseline_rows(baselines, best, bool(difference))),
        extent=_extent(dataset, train, val),
    )


def decode_bytes(tokens: Tokens, tokenizer: Tokenizer, max_bytes: int) -> bytes:
    """The first `max_bytes` bytes of the text of `tokens` (N,), or all if there are fewer."""
    joined = np.frombuffer(b"".join(tokenizer.token_bytes), np.uint8)
    token_starts = np.cumsum(tokenizer.byte_lengths) - tokenizer.byte_lengths
    parts, room = [], max_bytes
    for first in range(0, len(tokens), 1 << 20):
        ids = tokens[first : first + (1 << 20)]
        lengths = tokenizer.byte_lengths[ids]
        text_starts = np.cumsum(lengths) - lengths
        indices = np.repeat(token_starts[ids] - text_starts, lengths) + np.arange(lengths.sum())
        parts.append(joined[indices[:room]].tobytes())
        room -= len(parts[-1])
        if not room:
            break
    return b"".join(parts)


def decode_last_bytes(tokens: Tokens, tokenizer: Tokenizer, max_bytes: int) -> bytes:
    """The last `max_bytes` bytes of the text of `tokens` (N,), or all if there are fewer."""
    parts, room, stop = [], max_bytes, len(tokens)
    while room > 0 and stop > 0:
        start = max(0, stop - (1 << 20))
        part_bytes = int(tokenizer.byte_lengths[tokens[start:stop]].sum())
        part = decode_bytes(tokens[start:stop], tokenizer, part_bytes)
        parts.append(part[-room:])
        room, stop = room - len(parts[-1]), start
    return b"".join(reversed(parts))


def _check_copying(
    pieces: Sequence[bytes], train: bytes, val: bytes, leakage: Finding
) -> tuple[Finding, CopiedPassage]:
    """The longest passage that samples copy, compared with that of validation text.

    The validation text is cut into evenly spaced pieces of the lengths of the samples.
    """
    longest = find_longest_passage(pieces, train)
    starts = [
        i * max(0, len(val) - len(piece)) // max(1, len(pieces) - 1)
        for i, piece in enumerate(pieces)
    ]
    natural_length = find_longest_passage(
        [val[start : start + len(piece)] for start, piece in zip(starts, pieces)], train
    ).length
    end = longest.text_start + longest.length
    passage = train[longest.text_start : end]
    evidence = (
        f"The longest passage in {len(pieces)} samples ({sum(map(len, pieces)):,} bytes) that "
        f"stands word for word in the training text has {_describe_length(passage)}. In as much "
        f"validation text, in as many pieces, it has {natural_length:,} bytes."
    )
    if leakage.verdict == "bad":
        finding = Finding(
            COPYING,
            "watch",
            evidence,
            "No comparison is possible: much of the validation text stands in the training text.",
        )
    elif longest.length > RECITING_RATIO * natural_length:
        meaning = (
            f"The model recites: more than {RECITING_RATIO:g} times as long as in natural text. "
            "Use more text, fewer epochs (--patience stops at the best validation loss) or "
            "--dropout."
        )
        finding = Finding(COPYING, "bad", evidence, meaning)
    elif longest.length > natural_length:
        meaning = "A little longer than in natural text, which repeats itself, too."
        finding = Finding(COPYING, "ok", evidence, meaning)
    else:
        meaning = "Not longer than in natural text, which repeats itself, too."
        finding = Finding(COPYING, "ok", evidence, meaning)
    before = train[max(0, longest.text_start - CONTEXT_BYTES) : longest.text_start]
    after = train[end : end + CONTEXT_BYTES]
    if longest.length > MAX_SHOWN_BYTES:
        passage, after = passage[:MAX_SHOWN_BYTES], b" ..."
    return finding, CopiedPassage(
        _decode(before), _decode(passage), _decode(after), longest.text_start
    )


def _check_leakage(train: bytes, val: bytes) -> Finding:
    """How much of the validation text stands in the training text.

    The larger of two shares decides: that of windows, and that of whole lines, for texts whose
    lines are shorter than a window.
    """
    width = min(WINDOW_BYTES, len(val))
    matches = match_windows(val, train, width)
    line_bytes = count_shared_line_bytes(val, train)
    share = max(float(matches.mean()), line_bytes / len(val))
    longest = find_longest_passage([val], train)
    evidence = (
        f"{int(matches.sum()):,} of {len(matches):,} windows of {width} bytes of the validation "
        f"text ({matches.mean():.1%}) stand in the training text. Its lines of {MIN_LINE_BYTES} "
        f"bytes or more that are also lines of the training text have {line_bytes:,} bytes "
        f"({line_bytes / len(val):.1%}). The longest passage in both has "
        f"{_describe_length(_cut(val, longest))}, from byte {longest.start:,} of the validation "
        f"text and byte {longest.text_start:,} of the training text."
    )
    if share < LEAK_WATCH_SHARE:
        return Finding(LEAKAGE, "ok", evidence, "Yes: the validation loss measures new text.")
    if share < LEAK_BAD_SHARE:
        meaning = "Mostly: the loss on entirely new text would be a little higher."
        return Finding(LEAKAGE, "watch", evidence, meaning)
    meaning = (
        "No: the validation loss also measures memory. Remove duplicates from the text, then "
        "train again."
    )
    return Finding(LEAKAGE, "bad", evidence, meaning)


def _compare_baselines(baselines: Baselines, best: EvalLine | None, difference: str) -> Finding:
    """The model's bits per byte compared with the best baseline.

    `difference` is a sentence about the texts that they read.
    """
    others = {
        f"the best byte n-gram (order {baselines.best_order})": min(baselines.ngrams),
        "xz": min(baselines.xz, baselines.xz_after),
        "gzip": min(baselines.gzip, baselines.gzip_after),
    }
    listed = ", ".join(f"{name} {bpb:.2f}" for name, bpb in others.items())
    bpb = best.get("bpb") if best else None
    if bpb is None:
        evidence = f"Bits per byte of the validation text: {listed}."
        meaning = "Unknown: no finite validation loss was recorded."
        return Finding(BASELINES, "watch", evidence, meaning)
    evidence = f"Bits per byte of the validation text: the model {bpb:.2f}, {listed}. {difference}"
    evidence = evidence.rstrip()
    name, least = min(others.items(), key=lambda item: item[1])
    if bpb < least:
        meaning = f"Yes: the model needs {1 - bpb / least:.0%} fewer bits than {name}."
        return Finding(BASELINES, "ok", evidence, meaning)
    meaning = (
        f"No: {name} needs fewer bits. Train longer, or run `glasslm diagnose` to find the cause."
    )
    return Finding(BASELINES, "bad", evidence, meaning)


def _baseline_rows(
    baselines: Baselines, best: EvalLine | None, has_special_tokens: bool
) -> list[tuple[str, str, str]]:
    """Name, bits per byte and a remark: the model first, then the baselines."""
    rows: list[tuple[str, float, str]] = []
    if best is not None and (bpb := best.get("bpb")) is not None:
        extent = "all of the validation text" if best.get("whole") else "an evenly spaced sample"
        extent += ", special tokens included" if has_special_tokens else ""
        rows += [("the model", bpb, f"its best, at step {best['step']:,}, on {extent}")]
    orders = ", ".join(f"{bpb:.2f}" for bpb in baselines.ngrams)
    rows += [
        (
            f"n-grams of {baselines.best_order} bytes",
            min(baselines.ngrams),
            f"counted in the training text (Witten-Bell); orders 1 to {MAX_ORDER}: {orders}",
        ),
        ("single bytes", baselines.ngrams[0], "their frequencies in the training text"),
        (
            "xz after training text",
            baselines.xz_after,
            "validation text compressed after the last MB of training text",
        ),
        ("xz", baselines.xz, "validation text alone"),
        (
            "gzip after training text",
            baselines.gzip_after,
            "validation text compressed after the last 32 kB of training text",
        ),
        ("gzip", baselines.gzip, "validation text alone"),
    ]
    return [(name, f"{bpb:.3f}", remark) for name, bpb, remark in rows]


def _extent(dataset: Dataset, train: bytes, val: bytes) -> str:
    """A sentence for each text that was used in part; empty where all of it was used."""
    sentences = []
    if dataset.train.bytes > len(train):
        sentences.append(
            f"Copies were searched in the first {format_bytes(len(train))} of the training text."
        )
    if dataset.train.bytes > MAX_BASELINE_BYTES:
        sentences.append(
            f"n-grams were counted in the last {format_bytes(MAX_BASELINE_BYTES)} of the training "
            "text."
        )
    if dataset.val.bytes > len(val):
        sentences.append(f"The first {format_bytes(len(val))} of the validation text were used.")
    return " ".join(sentences)


def _cut(text: bytes, passage: Passage) -> bytes:
    return text[passage.start : passage.start + passage.length]


def _describe_length(passage: bytes) -> str:
    characters = len(_decode(passage))
    return f"{len(passage):,} bytes" + (
        f" ({characters:,} characters)" if characters != len(passage) else ""
    )


def _decode(passage: bytes) -> str:
    return passage.decode("utf-8", "ignore")  # the ends may split a character
