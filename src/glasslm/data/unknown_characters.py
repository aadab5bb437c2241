"""The message for characters that a character tokenizer does not know."""

from __future__ import annotations

import unicodedata

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
