"""Cut unbroken runs of characters for the training of BPE.

BPE counts the pairs of each word of GPT-2's split pattern. Its time for one word is quadratic in
the length of the word, and a text without blanks (DNA, base64, one repeated letter) is one word.
Only the trainer sees the cuts: the tokenizer that results encodes the text as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from glasslm.text import Notify

MAX_WORD_CHARACTERS = 256  # of a word that the trainer sees whole
MAX_PIECES = 4096  # of all cut words together, evenly spaced; about a million characters
# A word of GPT-2's pattern consists of letters, numbers, white space, or other signs alone.
_LONG_WORD = "|".join(
    rf"{sign}{{{MAX_WORD_CHARACTERS + 1},}}"
    for sign in (r"\p{L}", r"\p{N}", r"\s", r"[^\s\p{L}\p{N}]")
)
# Each long word is inside such a run, which Python finds faster.
_LONG_RUN = re.compile(rf"\w{{{MAX_WORD_CHARACTERS + 1},}}|[\W_]{{{MAX_WORD_CHARACTERS + 1},}}")


def cut_long_words(texts: Iterable[str], notify: Notify) -> Iterator[str]:
    """`texts` with each longer word cut into pieces of MAX_WORD_CHARACTERS.

    Of the pieces at most MAX_PIECES are taken, evenly spaced; they come last. A note gives the
    number of cut words.
    """
    sample = _EvenSample()
    n_words = 0
    for text in texts:
        start = 0
        for first, end in _find_long_words(text):
            n_words += 1
            yield text[start:first]
            for i in range(first, end, MAX_WORD_CHARACTERS):
                sample.add(text[i : min(end, i + MAX_WORD_CHARACTERS)])
            start = end
        yield text[start:]
    yield from sample.pieces
    if n_words:
        share = f", and 1 of {sample.stride} pieces was used" if sample.stride > 1 else ""
        notify(
            f"note: for the training of BPE, unbroken runs of more than {MAX_WORD_CHARACTERS} "
            f"characters were cut: {n_words:,} of them{share}"
        )


def _find_long_words(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each word of more than MAX_WORD_CHARACTERS characters."""
    runs = list(_LONG_RUN.finditer(text))
    if not runs:
        return
    from tokenizers import Regex, pre_tokenizers

    long_words = pre_tokenizers.Split(Regex(_LONG_WORD), "removed", invert=True)
    for run in runs:
        for _, (start, end) in long_words.pre_tokenize_str(run[0]):
            yield run.start() + start, run.start() + end


class _EvenSample:
    """At most MAX_PIECES of the pieces that are added, evenly spaced."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.stride, self._count = 1, 0

    def add(self, piece: str) -> None:
        if self._count % self.stride == 0:
            self.pieces.append(piece)
        self._count += 1
        if len(self.pieces) > MAX_PIECES:
            self.pieces, self.stride = self.pieces[::2], self.stride * 2
