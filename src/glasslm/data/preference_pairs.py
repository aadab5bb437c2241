"""Pairs of answers to a prompt, one preferred to the other: a JSON-lines file, read strictly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from glasslm.errors import InputError, explain_system_errors

FIELDS = ("prompt", "chosen", "rejected")
EXPECTED = 'expected one object a line, {"prompt": "...", "chosen": "...", "rejected": "..."}'


class PreferencePair(NamedTuple):
    """A prompt, the answer that was preferred, and the other one."""

    prompt: str
    chosen: str
    rejected: str


class PreferencePairs(NamedTuple):
    """The pairs of a file, in its order, and the SHA-256 of its bytes."""

    train: list[PreferencePair]
    held_out: list[PreferencePair]
    sha256: str


def read_preference_pairs(path: str | Path, val_fraction: float) -> PreferencePairs:
    """The pairs of a JSON-lines file; about `val_fraction` of its prompts are held out.

    At least one prompt is held out, and one is not. All pairs of a prompt are on the same side:
    prompts are held out by a hash, so that a longer file holds out the same ones. Raises
    InputError, with the number of the line, for a line that is not an object of three texts, and
    for a file of fewer than two prompts.
    """
    with explain_system_errors(path, lambda why: InputError(f"{path} cannot be read ({why})")):
        data = Path(path).read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start:,}): {EXPECTED}") from None
    pairs = [
        _parse_pair(line, f"{path}, line {number:,}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    prompts = sorted({pair.prompt for pair in pairs}, key=_hash_text)
    if len(prompts) < 2:
        raise InputError(
            f"{path} has {len(prompts)} prompt(s): expected 2 or more, because some are held out"
        )
    n_held_out = min(len(prompts) - 1, max(1, round(val_fraction * len(prompts))))
    held_out = set(prompts[:n_held_out])
    return PreferencePairs(
        [pair for pair in pairs if pair.prompt not in held_out],
        [pair for pair in pairs if pair.prompt in held_out],
        hashlib.sha256(data).hexdigest(),
    )


def _parse_pair(line: str, place: str) -> PreferencePair:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{place} is not JSON: {EXPECTED}") from None
    if not isinstance(value, dict) or set(value) != set(FIELDS):
        names = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{place} holds {names or 'nothing'}: {EXPECTED}")
    for field in FIELDS:
        if not isinstance(value[field], str):
            kind = type(value[field]).__name__
            raise InputError(f"{place}: '{field}' is {kind}, not a text: {EXPECTED}")
        try:
            value[field].encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(value[field][error.start]):04X}"
            raise InputError(
                f"{place}: '{field}' has half of a surrogate pair ({half}): correct it"
            ) from None
    pair = PreferencePair(*(value[field] for field in FIELDS))
    if not (pair.chosen and pair.rejected) or pair.chosen == pair.rejected:
        fault = "an answer is empty" if not (pair.chosen and pair.rejected) else "both are equal"
        raise InputError(f"{place}: {fault}: expected two different answers")
    return pair


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
