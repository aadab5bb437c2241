"""Messages for characters that a tokenizer cannot encode."""

from __future__ import annotations

import re
import unicodedata

from glasslm.errors import InputError

MAX_NAMED_CHARACTERS = 50
MAX_KNOWN_CHARACTERS = 200  # of the alphabet, in a message


def explain_unknown_characters(text: str, alphabet: str, start: int = 0) -> str:
    """Name the characters of `text` that are not in `alphabet`, where they begin, and the cure.

    `text` follows `start` characters of a longer one.
    """
    unknown = sorted(set(text) - set(alphabet))
    n_more = len(unknown) - MAX_NAMED_CHARACTERS
    names = ", ".join(
        f"{c!r} (U+{ord(c):04X} {unicodedata.name(c, 'unnamed')})"
        for c in unknown[:MAX_NAMED_CHARACTERS]
    )
    more = f" and {n_more} more" if n_more > 0 else ""
    known = (
        alphabet
        if len(alphabet) <= MAX_KNOWN_CHARACTERS
        else f"{alphabet[:MAX_KNOWN_CHARACTERS]}..."
    )
    first = start + min(text.index(character) for character in unknown)
    cure = "Leave these characters out, or"
    if "\r" in unknown and "\n" in alphabet:
        cure = (
            "The text has Windows line ends (CR LF), the training text had LF alone: "
            "delete the CRs, for example with tr -d '\\r', or"
        )
    return (
        f"this character tokenizer does not know {names}{more}, first at character {first}; "
        f"it knows only the {len(alphabet)} characters of its training text: {known!r}. "
        f"{cure} train a model that reads any text with --tokenizer byte or bpe"
    )


def find_surrogate(text: str) -> re.Match[str] | None:
    """The first half of a UTF-16 pair in a text, which UTF-8 cannot encode."""
    return None if text.isascii() else re.search("[\ud800-\udfff]", text)


def refuse_surrogates(text: str) -> None:
    """Raise InputError for half of a UTF-16 pair.

    Python decodes arguments that are not UTF-8 into such halves.
    """
    if lone := find_surrogate(text):
        raise InputError(
            f"the text has a lone surrogate U+{ord(lone[0]):04X} at character {lone.start()}: "
            "the bytes it came from were not UTF-8"
        )
