"""What there is to know about a tokenised text before a model reads it, as one dictionary for people and for JSON.

Sizes, vocabulary, what the tokenizer saves (also by script and by kind of file, where the text mixes them), and how
much of the validation text occurs in the training text. Large texts are sampled, by as much as the constants say.
"""

from __future__ import annotations

import collections
import functools
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import DataConfig
from glasslm.data import shards
from glasslm.data.shards import Dataset
from glasslm.data.sources.files import Source
from glasslm.data.tokenizers import CharTokenizer, SubwordTokenizer, Tokenizer, cut

PIECE = 1 << 16  # characters read at once
SCRIPT_SAMPLE = 2_000_000  # bytes
SUFFIX_SAMPLE = 500_000  # characters of each kind of file
TRAIN_SAMPLE, VAL_SAMPLE = 20_000_000, 2_000_000  # bytes compared for duplicates
WINDOW = 50  # characters
SHORTEST_LINE = 20  # characters; shorter lines repeat in any text
RARE = 0.01  # scripts with less of the letters are not listed


def facts(data: DataConfig, source: Source, dataset: Dataset) -> dict[str, Any]:
    """Everything, JSON-ready. Reads the text about four times."""
    known = shards.survey(source, data.encoding_errors)
    tokenizer = dataset.tokenizer
    count = sum(len(part.tokens) for part in (dataset.train, dataset.val, dataset.test) if part)
    result: dict[str, Any] = {
        "name": source.name,
        "bytes": known.bytes,
        "characters": known.characters,
        "distinct_characters": len(known.alphabet),
        "tokens": count,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
        },
        "bytes_per_token": known.bytes / count,
        "characters_per_token": known.characters / count,
    }
    if isinstance(tokenizer, CharTokenizer):
        result["vocabulary"] = tokenizer.alphabet
    if isinstance(tokenizer, SubwordTokenizer):
        result["first_merges"] = [[_shown(a), _shown(b)] for a, b in tokenizer.merges[:20]]
    result["by_script"] = by_script(data, source, known.bytes, tokenizer)
    result["by_suffix"] = by_suffix(data, source, tokenizer)
    result["excerpt"] = tokenizer.decode(np.asarray(dataset.val.tokens[:200]))
    result["duplicates"] = duplicates(data, source, known.bytes)
    result["split"] = {
        key: value for key, value in dataset.facts.items() if key.endswith(("_tokens", "_bytes"))
    }
    result["files"] = [asdict(file) for file in source.files]
    result["sha256"] = dataset.sha256
    return result


def by_script(
    data: DataConfig, source: Source, total_bytes: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Compression of each script's lines, commonest first; empty where the text has only one."""
    lines: dict[str, list[str]] = collections.defaultdict(list)
    letters: collections.Counter[str] = collections.Counter()
    pieces = cut(source.text(data.encoding_errors), PIECE)
    for text in shards.thinned(pieces, SCRIPT_SAMPLE / total_bytes):
        for line in text.splitlines(keepends=True):
            script, found = _script(line)
            if found:
                lines[script].append(line)
                letters[script] += found
    common = [script for script, found in letters.most_common() if found >= RARE * letters.total()]
    if len(common) < 2:
        return []
    return [
        {"script": script, **_compression("".join(lines[script]), tokenizer)} for script in common
    ]


def by_suffix(data: DataConfig, source: Source, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Compression of each kind of file, by what its name ends in, largest first; empty where there is only one kind."""
    size: collections.Counter[str] = collections.Counter()
    samples: dict[str, str] = collections.defaultdict(str)
    for file in source.files:
        suffix = Path(file.path).suffix or "(none)"
        size[suffix] += file.bytes
        if len(samples[suffix]) < SUFFIX_SAMPLE:
            samples[suffix] += "".join(
                _first(Source(file.path, (file,)).text(data.encoding_errors), SUFFIX_SAMPLE)
            )
    if len(size) < 2:
        return []
    return [
        {"suffix": suffix, "file_bytes": of, **_compression(samples[suffix], tokenizer)}
        for suffix, of in size.most_common()
        if samples[suffix]
    ]


def duplicates(data: DataConfig, source: Source, total_bytes: int) -> dict[str, Any]:
    """The share of the validation text's lines and 50-character windows that the training text has as well.

    A model that has seen the answers looks better than it is. Bounded: see the constants.
    """
    parts = shards.parts_of(source, data, total_bytes)
    val = "".join(_first((text for part, text in parts if part == "val"), VAL_SAMPLE))
    lines = _long_lines(val)
    wanted, seen_lines = set(lines), set[str]()
    windows = window_hashes(val)[::WINDOW]
    seen = np.zeros(len(windows), bool)
    training = (
        text for part, text in shards.parts_of(source, data, total_bytes) if part == "train"
    )
    share = TRAIN_SAMPLE / (total_bytes * (1 - data.val_fraction - data.test_fraction))
    held = ""
    for text in shards.thinned(cut(training, 16 * PIECE), share):
        held += text
        seen_lines |= wanted.intersection(_long_lines(held))
        seen |= np.isin(windows, window_hashes(held))
        held = held[held.rfind("\n", 0, -WINDOW) + 1 :][
            -PIECE:
        ]  # lines and windows go on in the next piece
    return {
        "lines": sum(line in seen_lines for line in lines) / len(lines) if lines else None,
        "windows": float(seen.mean()) if len(seen) else None,
        "lines_compared": len(lines),
        "windows_compared": len(windows),
        "share_of_training_text": min(1.0, share),
    }


def window_hashes(text: str) -> NDArray[np.uint64]:
    """(N - WINDOW + 1,) a hash of every WINDOW characters in a row: polynomials modulo 2^64, from prefix sums."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64)
    if len(codes) < WINDOW:
        return np.zeros(0, np.uint64)
    base = 0x9E3779B97F4A7C15  # odd, and so invertible
    powers = np.cumprod(np.full(len(codes), base, np.uint64))
    inverses = np.cumprod(np.full(len(codes), pow(base, -1, 1 << 64), np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers)])
    hashes: NDArray[np.uint64] = (sums[WINDOW:] - sums[:-WINDOW]) * inverses[
        : len(codes) - WINDOW + 1
    ]
    return hashes


def _compression(text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    count = max(1, len(tokenizer.encode(text)))
    return {
        "characters": len(text),
        "bytes_per_token": len(text.encode()) / count,
        "characters_per_token": len(text) / count,
    }


def _script(line: str) -> tuple[str, int]:
    """The commonest script of a line's letters, and how many letters there are."""
    if line.isascii():
        return "LATIN", sum(map(str.isalpha, line))
    scripts = collections.Counter(
        _letter_script(character) for character in line if character.isalpha()
    )
    return (scripts.most_common(1)[0][0], scripts.total()) if scripts else ("", 0)


@functools.cache
def _letter_script(character: str) -> str:
    """The first word of a letter's Unicode name, which is its script: LATIN, CYRILLIC, CJK, HANGUL ..."""
    return unicodedata.name(character, "UNNAMED").split()[0].split("-")[0]


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= SHORTEST_LINE]


def _first(texts: Iterable[str], most: int) -> Iterator[str]:
    """The first `most` characters."""
    for text in texts:
        yield text[:most]
        most -= len(text)
        if most <= 0:
            break


def _shown(token: bytes) -> str:
    """A token as text; bytes that are only part of a character as \\xd0."""
    return token.decode("utf-8", "backslashreplace")
