"""Survey a text, and split it by bytes into training, validation and test parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from glasslm.config.schema import DataConfig
from glasslm.data.sources.text_files import Source
from glasslm.data.special_tokens import SPECIAL_SPELLING, TokenPattern
from glasslm.data.tasks.catalogue import line_length
from glasslm.errors import InputError

CODE_POINTS = 0x110000  # of Unicode


@dataclass(frozen=True)
class TextSurvey:
    """Size and characters of a text, which are needed before it is split."""

    bytes: int  # special tokens included, as they are spelled
    characters: int  # without special tokens
    alphabet: str  # without special tokens
    nuls: int
    replaced: int  # U+FFFD; with --encoding-errors replace it stands for bytes that are not UTF-8
    special_tokens: dict[str, int]  # how often each special token occurs
    spellings: dict[str, int]  # what is spelled as a special token and is ordinary text


def survey_text(source: Source, errors: str, unused: tuple[str, ...] = ()) -> TextSurvey:
    """Size and characters of the whole text; `unused`: special tokens that are ordinary text in it.

    Raises InputError if it is empty.
    """
    n_bytes = n_characters = nuls = replaced = 0
    in_alphabet = np.zeros(CODE_POINTS, bool)
    special_tokens, spellings = Counter[str](), Counter[str]()
    pattern = TokenPattern((*source.special_tokens, *unused), SPECIAL_SPELLING)
    for text in pattern.split(source.text(errors)):
        n_bytes += len(text.encode())
        if text in source.special_tokens:
            special_tokens[text] += 1
            continue
        if pattern.matches(text):
            spellings[text] += 1
        n_characters += len(text)
        nuls += text.count("\0")
        replaced += text.count("\ufffd")
        in_alphabet[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
    if not n_characters:
        raise InputError(
            f"the text of {source.name} is empty: give a text of two different characters or more"
        )
    alphabet = "".join(map(chr, np.flatnonzero(in_alphabet)))
    return TextSurvey(
        n_bytes, n_characters, alphabet, nuls, replaced, dict(special_tokens), dict(spellings)
    )


def split_text(source: Source, data: DataConfig, total_bytes: int) -> Iterator[tuple[str, str]]:
    """The text in order, in pieces (part, text) where part is train, val or test.

    train is the first floor((1 - val - test) x bytes), val follows, test is last. A boundary inside
    a character, or inside a special token, moves to its beginning.
    """
    # Fraction takes the decimal digits of the flags exactly.
    val, test = Fraction(str(data.val_fraction)), Fraction(str(data.test_fraction))
    ends = {
        "train": math.floor((1 - val - test) * total_bytes),
        "val": math.floor((1 - test) * total_bytes),
    }
    if data.task:  # no example is divided
        ends = {part: end - end % line_length(data) for part, end in ends.items()}
    if test:
        ends["test"] = total_bytes
    parts = iter(ends.items())
    part, end = next(parts)
    position = 0
    for text in source.text(data.encoding_errors):
        body = text.encode()
        while position + len(body) > end:
            room = 0 if text in source.special_tokens else end - position
            # A continuation byte: its character began before the boundary.
            while room and body[room] & 0xC0 == 0x80:
                room -= 1
            yield part, body[:room].decode()
            position, body = position + room, body[room:]
            part, end = next(parts)
        yield part, body.decode()
        position += len(body)
