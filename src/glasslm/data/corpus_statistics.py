"""Measure a tokenized text before a model is trained on it.

The result is a JSON-ready dictionary. It has sizes, the vocabulary, the compression by the
tokenizer (also by script and by file suffix), and how much of the validation text occurs in the
training text. Large texts are sampled; the constants bound the samples.
"""

from __future__ import annotations

import collections
import functools
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import DataConfig
from glasslm.data.dataset import Dataset, with_vocabulary
from glasslm.data.rolling_hash import RollingHash
from glasslm.data.sources.text_files import Source
from glasslm.data.text_pieces import cut_between_words, subsample, take_characters
from glasslm.data.text_split import split_text, survey_text
from glasslm.data.tokenizers import CharTokenizer, SubwordTokenizer, Tokenizer

PIECE_CHARACTERS = 1 << 16  # read at once
SCRIPT_SAMPLE_BYTES = 2_000_000
SUFFIX_SAMPLE_CHARACTERS = 500_000  # of each file suffix
TRAIN_SAMPLE_BYTES = 20_000_000  # searched for duplicates
VAL_SAMPLE_CHARACTERS = 2_000_000  # compared with the training text
WINDOW_CHARACTERS = 50
MIN_LINE_CHARACTERS = 20  # shorter lines repeat in any text
MIN_SCRIPT_SHARE = 0.01  # of the letters; scripts with less are not listed


def measure_corpus(data: DataConfig, source: Source, dataset: Dataset) -> dict[str, Any]:
    """All statistics of a text, JSON-ready. Reads the text about four times.

    Special tokens count among the tokens; their spellings are no bytes and no characters.
    """
    tokenizer = dataset.tokenizer
    source = with_vocabulary(source, data, tokenizer)
    survey = survey_text(source, data.encoding_errors)
    parts = [part for part in (dataset.train, dataset.val, dataset.test) if part]
    n_bytes, count = sum(part.bytes for part in parts), sum(len(part.tokens) for part in parts)
    result: dict[str, Any] = {
        "name": source.name,
        "bytes": n_bytes,
        "characters": survey.characters,
        "distinct_characters": len(survey.alphabet),
        "tokens": count,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "lossless": not tokenizer.lossy_reason,
        },
        "bytes_per_token": n_bytes / count,
        "characters_per_token": survey.characters / count,
    }
    if tokenizer.lossy_reason:
        result["tokenizer"]["lossy_reason"] = tokenizer.lossy_reason
    if isinstance(tokenizer, CharTokenizer):
        result["vocabulary"] = tokenizer.alphabet
    if isinstance(tokenizer, SubwordTokenizer):
        result["first_merges"] = [
            [_escape_token(left), _escape_token(right)] for left, right in tokenizer.merges[:20]
        ]
    result["by_script"] = compression_by_script(data, source, survey.bytes, tokenizer)
    result["by_suffix"] = compression_by_suffix(data, source, tokenizer)
    result["excerpt"] = tokenizer.decode(np.asarray(dataset.val.tokens[:200]))
    result["duplicates"] = measure_duplicates(data, source, survey.bytes)
    result["split"] = {
        key: value for key, value in dataset.facts.items() if key.endswith(("_tokens", "_bytes"))
    }
    result["files"] = [asdict(file) for file in source.files]
    result["sha256"] = dataset.sha256
    return result


def compression_by_script(
    data: DataConfig, source: Source, total_bytes: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Compression of the lines of each script, commonest first; empty if there is only one."""
    lines: dict[str, list[str]] = collections.defaultdict(list)
    letters: collections.Counter[str] = collections.Counter()
    pieces = cut_between_words(_ordinary_text(data, source), PIECE_CHARACTERS)
    for text in subsample(pieces, SCRIPT_SAMPLE_BYTES / total_bytes):
        for line in text.splitlines(keepends=True):
            script, n_letters = _line_script(line)
            if n_letters:
                lines[script].append(line)
                letters[script] += n_letters
    min_letters = MIN_SCRIPT_SHARE * letters.total()
    common = [script for script, n_letters in letters.most_common() if n_letters >= min_letters]
    if len(common) < 2:
        return []
    return [
        {"script": script, **_compression("".join(lines[script]), tokenizer)} for script in common
    ]


def compression_by_suffix(
    data: DataConfig, source: Source, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Compression of the files of each name suffix, largest first; empty if there is only one."""
    sizes: collections.Counter[str] = collections.Counter()
    samples: dict[str, str] = collections.defaultdict(str)
    for file in source.files:
        suffix = Path(file.path).suffix or "(none)"
        sizes[suffix] += file.bytes
        if len(samples[suffix]) < SUFFIX_SAMPLE_CHARACTERS:
            text = _ordinary_text(data, replace(source, files=(file,)))
            samples[suffix] += "".join(take_characters(text, SUFFIX_SAMPLE_CHARACTERS))
    if len(sizes) < 2:
        return []
    return [
        {"suffix": suffix, "file_bytes": n_bytes, **_compression(samples[suffix], tokenizer)}
        for suffix, n_bytes in sizes.most_common()
        if samples[suffix]
    ]


def measure_duplicates(data: DataConfig, source: Source, total_bytes: int) -> dict[str, Any]:
    """Share of the validation text that occurs in the training text, by lines and by windows.

    A model scores better on text that it was trained on. The constants bound both samples.
    """
    parts = split_text(source, data, total_bytes)
    val_texts = (text for part, text in parts if part == "val")
    val = "".join(take_characters(val_texts, VAL_SAMPLE_CHARACTERS))
    lines = _long_lines(val)
    val_lines, duplicate_lines = set(lines), set[str]()
    window_hashes = hash_character_windows(val)[::WINDOW_CHARACTERS]
    is_duplicate = np.zeros(len(window_hashes), bool)
    training = (text for part, text in split_text(source, data, total_bytes) if part == "train")
    share = TRAIN_SAMPLE_BYTES / (total_bytes * (1 - data.val_fraction - data.test_fraction))
    buffer = ""
    for text in subsample(cut_between_words(training, 16 * PIECE_CHARACTERS), share):
        buffer += text
        duplicate_lines |= val_lines.intersection(_long_lines(buffer))
        is_duplicate |= np.isin(window_hashes, hash_character_windows(buffer))
        # Lines and windows continue in the next piece.
        last_line = buffer.rfind("\n", 0, -WINDOW_CHARACTERS) + 1
        buffer = buffer[last_line:][-PIECE_CHARACTERS:]
    n_duplicates = sum(line in duplicate_lines for line in lines)
    return {
        "lines": n_duplicates / len(lines) if lines else None,
        "windows": float(is_duplicate.mean()) if len(is_duplicate) else None,
        "lines_compared": len(lines),
        "windows_compared": len(window_hashes),
        "share_of_training_text": min(1.0, share),
    }


def hash_character_windows(text: str) -> NDArray[np.uint64]:
    """(N - WINDOW_CHARACTERS + 1,) hashes of all windows of a text of N characters."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return RollingHash(codes).hash_all_windows(WINDOW_CHARACTERS)


def _ordinary_text(data: DataConfig, source: Source) -> Iterator[str]:
    """The text without its special tokens, which are no text to compress."""
    special_tokens = source.special_tokens
    return (text for text in source.text(data.encoding_errors) if text not in special_tokens)


def _compression(text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    count = max(1, len(tokenizer.encode(text)))
    return {
        "characters": len(text),
        "bytes_per_token": len(text.encode()) / count,
        "characters_per_token": len(text) / count,
    }


def _line_script(line: str) -> tuple[str, int]:
    """The commonest script among the letters of a line, and the number of letters."""
    if line.isascii():
        return "LATIN", sum(map(str.isalpha, line))
    scripts = collections.Counter(
        _letter_script(character) for character in line if character.isalpha()
    )
    return (scripts.most_common(1)[0][0], scripts.total()) if scripts else ("", 0)


@functools.cache
def _letter_script(character: str) -> str:
    """The script of a letter, the first word of its Unicode name: LATIN, CYRILLIC, CJK ..."""
    return unicodedata.name(character, "UNNAMED").split()[0].split("-")[0]


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= MIN_LINE_CHARACTERS]


def _escape_token(token: bytes) -> str:
    """A token as text; bytes that are only part of a character as \\xd0."""
    return token.decode("utf-8", "backslashreplace")
