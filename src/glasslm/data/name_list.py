"""Lists of names: whether a text is one, its names, and the trigrams of a name.

A text is a list of names when nearly all its lines are short, of a few words without digits and
signs: people, places, plants, words. Prose, verse and code have longer lines, and abstracts have
one line per paragraph.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator

MIN_LINES = 100
MAX_MEDIAN_CHARACTERS = 20  # of a line
MAX_WORDS = 3  # of a line
MIN_NAME_SHARE = 0.99  # of the lines; allows a heading or a stray line

NAME = re.compile(
    r"""[^\d_<>(){}\[\]=+*/\\|#@!?;:"$%^&~`]+"""
)  # apostrophes, hyphens, dots and commas are allowed


def is_name_list(text: str) -> bool:
    """Whether `text`, or the start of a longer text, is a list of names.

    >>> is_name_list("emma\\nolivia\\nMary Ann\\n" * 40)
    True
    >>> is_name_list("To be, or not to be, that is the question\\n" * 120)
    False
    """
    lines = [stripped for line in text.split("\n")[:-1] if (stripped := line.strip())]
    if len(lines) < MIN_LINES or statistics.median(map(len, lines)) > MAX_MEDIAN_CHARACTERS:
        return False
    names = sum(bool(NAME.fullmatch(line)) and len(line.split()) <= MAX_WORDS for line in lines)
    return names >= MIN_NAME_SHARE * len(lines)


def list_lines(text: str) -> Iterator[str]:
    """The lines of a text that are not empty, without the space around them."""
    return (stripped for line in text.split("\n") if (stripped := line.strip()))


def trigrams(name: str) -> Iterable[str]:
    """All sequences of three characters, start and end included: ^em, emm, mma, ma$."""
    marked = f"\n{name}\n"  # no name contains a line break
    return (marked[i : i + 3] for i in range(len(marked) - 2))
