"""Cut a stream of strings into pieces, sample pieces, or take a prefix, in bounded memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from glasslm.data.special_tokens import TokenPattern

_WORD_END = re.compile(r"\S(?=[ \n])")


def cut_between_words(
    texts: Iterable[str], size: int, special: TokenPattern | None = None
) -> Iterator[str]:
    """The same text in pieces of at least `size` characters; each ends before a blank.

    The last piece may be shorter. Where no blank comes for 16 times `size`, as in scripts without
    blanks, a piece ends anywhere, so that memory is bounded. A token of `special` is never cut if
    none of `texts` ends inside one.
    """
    buffer, searched = "", 0  # no word ends before buffer[searched], so it is searched once
    for text in texts:
        buffer += text
        start = 0
        while len(buffer) - start > size:
            word_end = _WORD_END.search(buffer, max(start + size, searched))
            if word_end is None:
                searched = len(buffer) - 1  # what follows the last character is not known yet
                if len(buffer) - start < 16 * size:
                    break
            end = word_end.end() if word_end else start + 16 * size
            if special and special.tokens:
                end = _end_of_token(special, buffer, start, end)
            yield buffer[start:end]
            start = end
        buffer, searched = buffer[start:], searched - start
    if buffer:
        yield buffer


def _end_of_token(special: TokenPattern, buffer: str, start: int, cut: int) -> int:
    """`cut`, or the end of the special token that it is inside of."""
    first = max(start, cut - special.max_length)
    for match in special.compile().finditer(buffer, first, cut + special.max_length):
        if match.start() < cut < match.end():
            return match.end()
    return cut


def subsample(texts: Iterable[str], share: float) -> Iterator[str]:
    """This share of `texts`, evenly spaced; all of them if `share` is 1 or more."""
    for i, text in enumerate(texts):
        if math.floor((i + 1) * share) > math.floor(i * share):
            yield text


def take_characters(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    """The first `max_characters` characters of `texts`."""
    for text in texts:
        yield text[:max_characters]
        max_characters -= len(text)
        if max_characters <= 0:
            break
