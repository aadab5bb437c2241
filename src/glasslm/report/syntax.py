"""Whether texts are Python as far as they go: what a model writes, and natural code cut in the same way.

A text is judged without its last line, in the middle of which it was broken off. It *parses* when `ast.parse` reads
it, or would if its last lines, which merely lack their continuation (an open bracket, a block without a body), were
gone, and when at least one statement is left. It is *broken* when the parser stumbles before its end, and *unfinished*
when nothing is wrong with it, but no statement ends in it. Nothing of a text is ever run.
"""

from __future__ import annotations

import ast
import codeop
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, NamedTuple

from glasslm.report.proportions import Share

MOST = 4000  # characters of a text: what is nested deeper than this allows cannot bring the parser down
NATURAL = 100  # pieces of natural text
COMMONEST = 3  # errors that are told
# What nesting, numbers, NULs and characters that UTF-8 cannot write make of `ast.parse`.
REFUSALS = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)

Outcome = Literal["parses", "broken", "unfinished"]


class Judged(NamedTuple):
    outcome: Outcome
    lines: int  # of the longest beginning that parses, without blank ones
    error: str  # of a broken one, without its place


@dataclass(frozen=True)
class Syntax:
    """What was found in several texts."""

    judged: tuple[Judged, ...]

    def share(self, outcome: Outcome) -> Share:
        return Share(sum(one.outcome == outcome for one in self.judged), len(self.judged))

    @property
    def lines(self) -> float:
        """The mean of the lines that parse."""
        return sum(one.lines for one in self.judged) / len(self.judged)

    @property
    def errors(self) -> list[tuple[str, int]]:
        """The commonest errors and how often each came, most often first."""
        return Counter(one.error for one in self.judged if one.error).most_common(COMMONEST)

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        outcomes: tuple[Outcome, ...] = ("parses", "broken", "unfinished")
        return {name: self.share(name).facts for name in outcomes} | {
            "lines": self.lines,
            "errors": self.errors,
        }


def of(texts: Sequence[str]) -> Syntax:
    return Syntax(tuple(judge(text) for text in texts))


def opening(text: str, wanted: int) -> str:
    """The line breaks after which something new begins in `text`, for prompts and for pieces: as many as come often.

    Two blank lines stand before what is not part of anything else; texts that have them in fewer than `wanted` places
    are cut at one, or at any line.

    >>> opening("import re\\n\\nx = 1\\n\\ny = 2\\n", 2)
    '\\n\\n'
    """
    line_break = "\r\n" if "\r\n" in text else "\n"
    candidates = (line_break * count for count in (3, 2, 1))
    return next((one for one in candidates if text.count(one) >= wanted), line_break)


def pieces(text: str, begin: str, lengths: Sequence[int], count: int = NATURAL) -> list[str]:
    """Up to `count` pieces of `text`, each after `begin`, evenly spaced among all such places, and of these lengths.

    Lengths are in characters; when they are used up they are used again. Places too near to the end are left out.
    """
    longest = max(lengths, default=0)
    places = [
        found.end()
        for found in re.finditer(re.escape(begin), text)
        if found.end() + longest <= len(text)
    ]
    taken = min(count, len(places))
    chosen = [places[i * len(places) // taken] for i in range(taken)]
    return [text[place : place + length] for place, length in zip(chosen, cycle(lengths))]


def judge(text: str) -> Judged:
    """See the module's beginning.

    >>> judge("def f(x):\\n    return x\\n\\nprint(f(")
    Judged(outcome='parses', lines=2, error='')
    >>> judge("def f(x:\\n    return x\\n")
    Judged(outcome='broken', lines=0, error='invalid syntax')
    """
    lines = text[:MOST].replace("\r\n", "\n").split("\n")[:-1]
    while lines and lines[-1].endswith("\\"):  # the line goes on in the one that was broken off
        lines.pop()
    with _silence():
        error = _error(lines)
        broken = bool(error) and not _lacks_only_its_end(lines)
        ends = [end for end in range(len(lines), 0, -1) if lines[end - 1].strip()]
        longest = next((end for end in ends if not _error(lines[:end])), 0)
        statements = ast.parse(_joined(lines[:longest])).body
    outcome: Outcome = "broken" if broken else "parses" if statements else "unfinished"
    return Judged(
        outcome, sum(bool(line.strip()) for line in lines[:longest]), error if broken else ""
    )


def _error(lines: Sequence[str]) -> str:
    """What `ast.parse` says against these lines, without the places in it; empty if nothing."""
    try:
        ast.parse(_joined(lines))
    except SyntaxError as error:
        return re.sub(r" on line \d+| \(detected at line \d+\)", "", error.msg)
    except REFUSALS as error:
        return (
            "nested too deeply"
            if isinstance(error, (RecursionError, MemoryError))
            else type(error).__name__
        )
    return ""


def _lacks_only_its_end(lines: Sequence[str]) -> bool:
    """Whether the parser had no objection before it came to the end, as an interactive prompt asks."""
    try:
        return codeop.compile_command(_joined(lines), symbol="exec") is None
    except REFUSALS:
        return False


def _joined(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def _silence() -> Iterator[None]:
    """Without the warnings of dubious but valid code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
