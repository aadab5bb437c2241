"""Recognize a tokenizer that loses text: its tokens do not decode to the text that they encode.

Bits per byte of such a tokenizer cannot be compared: it predicts less than the text. A normalizer
that folds letters, a vocabulary of words, and characters that become <unk> or vanish are lossy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from glasslm.errors import InputError

# NFC is not here: it leaves usual text as it is.
LOSSY_NORMALIZERS = frozenset({
    "BertNormalizer", "Lowercase", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip",
    "StripAccents",
})  # fmt: skip
WORD_MODELS = ("WordLevel", "WordPiece")
# Short, because a tokenizer that refuses a character with an error loses nothing.
PROBES = (
    "a b", "The CAT sat.", "a  b", "a \n\tb", "x = (1,234 + y_2) != [\"No!\", 'n', don't]",
    "naïve façade", "ﬁ½２", "漢字", "Ελλάδα", "привет", "😀\u200d\u2028", "\u0378",
)  # fmt: skip


def find_lossy_reason(
    description: dict[str, Any], encode: Callable[[str], Any], decode: Callable[[Any], str]
) -> str:
    """The reason why the tokenizer of this tokenizer.json loses text; empty if it does not.

    Rules of the file come first, then PROBES, which are encoded and decoded.
    """
    for kind in _normalizer_types(description.get("normalizer")):
        if kind in LOSSY_NORMALIZERS:
            return f"its normalizer {kind} changes the text"
    model = description["model"]["type"]
    if model in WORD_MODELS:
        return f"{model} keeps no spaces and no unknown words"
    for probe in PROBES:
        try:
            decoded = decode(encode(probe))
        except InputError:  # a character that it refuses
            continue
        if decoded != probe:
            return f"{probe!r} comes back as {decoded!r}"
    return ""


def find_lost_bytes(token_bytes: int, text_bytes: int) -> str:
    """The reason why tokens of `token_bytes` lose a text of `text_bytes`; empty if they do not.

    A decoder may count a space more for each of the few pieces of a text.
    """
    if abs(token_bytes - text_bytes) <= 16 + text_bytes // 1000:
        return ""
    return f"the tokens of {text_bytes:,} bytes of text have {token_bytes:,} bytes"


def explain_lossy_tokenizer(reason: str) -> str:
    """A line for the user: the tokenizer loses text for this reason, and what follows from it."""
    return f"the tokenizer loses text ({reason}): there are no bits per byte"


def _normalizer_types(normalizer: dict[str, Any] | None) -> Iterator[str]:
    if normalizer is None:
        return
    yield str(normalizer.get("type"))
    for part in normalizer.get("normalizers", []):
        yield from _normalizer_types(part)
