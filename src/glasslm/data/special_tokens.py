"""Special tokens in texts: find their spellings, and end each document with a token.

In these streams every special token is a string of its own, so that nothing splits it.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glasslm.text import plural

MAX_LISTED = 5  # spellings in a note
MAX_SPELLING = 48  # characters of a spelling that SPECIAL_SPELLING finds
# The usual spelling of a special token, as in <|endoftext|> and <|im_start|>.
SPECIAL_SPELLING = r"<\|[A-Za-z0-9_]{1,44}\|>"


@dataclass(frozen=True)
class TokenPattern:
    """Finds the spellings of special tokens: the leftmost, and of these the longest."""

    tokens: tuple[str, ...]
    others: str = ""  # a further regular expression, of at most MAX_SPELLING characters

    def compile(self) -> re.Pattern[str]:
        """The regular expression."""
        return _compile(self.tokens, self.others)

    def matches(self, text: str) -> bool:
        """Whether the whole text is one match."""
        return len(text) <= self.max_length and self.compile().fullmatch(text) is not None

    @property
    def max_length(self) -> int:
        """Characters of the longest match."""
        return max([MAX_SPELLING if self.others else 1, *map(len, self.tokens)])

    def split(self, texts: Iterable[str]) -> Iterator[str]:
        """The same text, with each match as a string of its own.

        >>> list(TokenPattern(("<e>",)).split(["one<", "e>two"]))
        ['on', 'e', '<e>', 't', 'wo']
        """
        if not (self.tokens or self.others):
            yield from filter(None, texts)
            return
        pattern, buffer = self.compile(), ""
        for text in texts:
            buffer += text
            # A match that starts later may continue in the next text.
            start_limit = len(buffer) - self.max_length + 1
            end = 0
            for match in pattern.finditer(buffer):
                if match.start() >= start_limit:
                    break
                yield from filter(None, (buffer[end : match.start()], match[0]))
                end = match.end()
            if start_limit > end:
                yield buffer[end:start_limit]
                end = start_limit
            buffer = buffer[end:]
        end = 0
        for match in pattern.finditer(buffer):
            yield from filter(None, (buffer[end : match.start()], match[0]))
            end = match.end()
        if buffer[end:]:
            yield buffer[end:]


@functools.lru_cache(maxsize=8)  # a padded vocabulary may have 100,000 special tokens
def _compile(tokens: tuple[str, ...], others: str) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), *filter(None, [others])]))


def encode_pieces(
    text: str,
    special_tokens: Mapping[str, int],
    encode_ordinary: Callable[[str, int], NDArray[np.uint32]],
) -> NDArray[np.uint32]:
    """(N,) ids of a text with special tokens.

    `encode_ordinary` encodes a piece without special tokens, which begins at a character.
    """
    ids, start = [np.zeros(0, np.uint32)], 0
    whole = TokenPattern(tuple(special_tokens)).compile() if special_tokens else None
    # Ordinary text is encoded whole: a split at its end would hide unknown characters.
    pieces = re.split(f"({whole.pattern})", text) if whole else [text]
    for piece in filter(None, pieces):
        if piece in special_tokens:
            ids.append(np.array([special_tokens[piece]], np.uint32))
        else:
            ids.append(encode_ordinary(piece, start))
        start += len(piece)
    return np.concatenate(ids)


def count_spellings(
    texts: Iterable[str], special_tokens: Iterable[str], unused: Iterable[str]
) -> Counter[str]:
    """How often ordinary text is spelled as a special token is, by spelling.

    `special_tokens` are parsed, and not ordinary text. `unused`: special tokens of the vocabulary
    that are not parsed.
    """
    parsed = frozenset(special_tokens)
    pattern = TokenPattern((*parsed, *unused), SPECIAL_SPELLING)
    return Counter(
        piece for piece in pattern.split(texts) if piece not in parsed and pattern.matches(piece)
    )


def explain_spellings(counts: Mapping[str, int], text: str) -> str:
    """A note that `text` has these spellings, what happens, and the flag that changes it."""
    common = sorted(counts, key=lambda token: -counts[token])[:MAX_LISTED]
    listed = ", ".join(f"{token} {plural(counts[token], 'time')}" for token in common)
    more = f" and {len(counts) - len(common)} others" if len(counts) > len(common) else ""
    flag = " ".join(shlex.quote(token) for token in common)
    return (
        f"note: {text} spells {listed}{more}: ordinary text here, of several tokens. "
        f"A model trained with --special-tokens {flag} reads each as one token"
    )


@dataclass(frozen=True)
class Documents:
    """How the documents of a text end."""

    end: str  # the special token after each document
    separator: str = ""  # text between the documents of one file, which `end` replaces
    special_tokens: tuple[str, ...] = ()  # further special tokens

    @property
    def tokens(self) -> frozenset[str]:
        """All special tokens."""
        return frozenset((self.end, *self.special_tokens))

    def mark_ends(self, texts: Iterable[str]) -> Iterator[str]:
        """The text of a file, with `end` after each document; a special token is its own string.

        A document of blanks alone gets no end, so that a text that ends with a separator, or with
        the end token itself and a line break, ends with one token.
        """
        pattern = TokenPattern((*self.tokens, self.separator))
        is_empty = True
        for piece in pattern.split(texts):
            if piece == self.separator:
                if is_empty:
                    continue
                piece = self.end
            yield piece
            is_empty = piece == self.end or (is_empty and piece.isspace())
        if not is_empty:
            yield self.end

    def has_separator(self, texts: Iterable[str]) -> bool:
        """Whether the separator is in the text."""
        return self.separator in TokenPattern((self.separator,)).split(texts)
