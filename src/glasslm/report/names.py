"""What a model makes of a list of names: which it knows by heart, which it invents, and whether they look like names.

A text is a list of names when it has nothing but short lines of a few words without digits and signs: lists of people,
places, plants, words. Prose, verse and code have longer lines; abstracts have one line a paragraph.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glasslm.report.proportions import Share

FEWEST = 100  # lines of a list
MEDIAN = 20  # characters of its median line, at most
WORDS = 3  # of a line, at most
NEARLY_ALL = 0.99  # share of the lines that must be so: a heading or a stray line does not matter
SHOWN = 12  # invented names

NAME = re.compile(
    r"""[^\d_<>(){}\[\]=+*/\\|#@!?;:"$%^&~`]+"""
)  # apostrophes, hyphens, dots and commas are allowed


@dataclass(frozen=True)
class Names:
    """What was found among the names that a model wrote, and among natural ones that it never saw."""

    known: Share  # in the training text
    unseen: Share  # not there, but in the validation text
    invented: Share  # in neither
    nothing: Share  # empty, or without an end
    distinct: Share  # different ones among those that are names at all
    well_formed: Share  # of the invented, those made of nothing but trigrams of training names
    examples: tuple[str, ...]  # the first invented ones
    natural_known: Share  # of the validation names, those in the training text as well
    natural_distinct: Share  # of as many validation names, evenly spaced
    natural_well_formed: Share  # of the validation names that are not in the training text

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        mine = {name: getattr(self, name).facts for name in (
            "known", "unseen", "invented", "nothing", "distinct", "well_formed")}  # fmt: skip
        natural = {
            name: getattr(self, f"natural_{name}").facts
            for name in ("known", "distinct", "well_formed")
        }
        return mine | {"examples": list(self.examples), "natural": natural}


def is_list(text: str) -> bool:
    """Whether `text`, or the beginning of a longer one, is a list of names.

    >>> is_list("emma\\nolivia\\nMary Ann\\n" * 40), is_list("To be, or not to be, that is the question\\n" * 120)
    (True, False)
    """
    lines = [stripped for line in text.split("\n")[:-1] if (stripped := line.strip())]
    if len(lines) < FEWEST or statistics.median(map(len, lines)) > MEDIAN:
        return False
    fitting = sum(bool(NAME.fullmatch(line)) and len(line.split()) <= WORDS for line in lines)
    return fitting >= NEARLY_ALL * len(lines)


def examine(written: Sequence[str | None], train: str, val: str) -> Names:
    """Judge what was `written` (None where a name did not end) by the names of both parts of the text.

    The parts are cut between two characters: the line that is broken there belongs to neither.
    """
    whole = train.endswith("\n")
    seen = set(_lines(train if whole else train.rpartition("\n")[0]))
    unseen = list(_lines(val if whole else val.partition("\n")[2]))
    mine = [name for text in written if (name := (text or "").strip())]
    among = set(unseen) - seen
    invented = [name for name in mine if name not in seen and name not in among]
    count = min(len(mine), len(unseen))
    spaced = [unseen[i * len(unseen) // count] for i in range(count)]
    trigrams = {part for name in seen for part in _trigrams(name)}
    new = [name for name in unseen if name not in seen]
    return Names(
        known=Share(sum(name in seen for name in mine), len(written)),
        unseen=Share(sum(name in among for name in mine), len(written)),
        invented=Share(len(invented), len(written)),
        nothing=Share(len(written) - len(mine), len(written)),
        distinct=Share(len(set(mine)), len(mine)),
        well_formed=_well_formed(invented, trigrams),
        examples=tuple(dict.fromkeys(invented))[:SHOWN],
        natural_known=Share(len(unseen) - len(new), len(unseen)),
        natural_distinct=Share(len(set(spaced)), len(spaced)),
        natural_well_formed=_well_formed(new, trigrams),
    )


def _lines(text: str) -> Iterator[str]:
    return (stripped for line in text.split("\n") if (stripped := line.strip()))


def _well_formed(names: Sequence[str], trigrams: set[str]) -> Share:
    return Share(sum(trigrams.issuperset(_trigrams(name)) for name in names), len(names))


def _trigrams(name: str) -> Iterable[str]:
    """All three characters in a row, beginning and end included: ^em, emm, mma, ma$."""
    marked = f"\n{name}\n"  # which no name has inside
    return (marked[i : i + 3] for i in range(len(marked) - 2))
