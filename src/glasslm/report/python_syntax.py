"""Check whether texts are Python: generated ones, and natural code that is cut likewise.

A text is checked without its last line, which is cut off somewhere in the middle. It *parses* when
`ast.parse` accepts it, or would accept it without its last lines if these only lack their
continuation (an open bracket, a block without a body), and at least one statement is left. It is
*broken* when the parser finds an error before the end, and *unfinished* when nothing is wrong but
no statement is complete. No text is ever executed.
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

from glasslm.inference.proportions import Proportion

MAX_CHARACTERS = 4000  # of a text: nesting that fits into them cannot crash the parser
NATURAL_PIECES = 100
MAX_ERRORS = 3  # listed
# What `ast.parse` raises for deep nesting, long numbers, NUL and characters that UTF-8 cannot
# encode.
PARSER_ERRORS = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)

Outcome = Literal["parses", "broken", "unfinished"]


class SyntaxCheck(NamedTuple):
    """The outcome for one text."""

    outcome: Outcome
    lines: int  # of the longest beginning that parses, without blank lines
    error: str  # of a broken text, without the line number


@dataclass(frozen=True)
class SyntaxStatistics:
    """The outcomes for several texts."""

    checks: tuple[SyntaxCheck, ...]

    def proportion(self, outcome: Outcome) -> Proportion:
        """The texts with this outcome, of all texts."""
        return Proportion(sum(check.outcome == outcome for check in self.checks), len(self.checks))

    @property
    def lines(self) -> float:
        """The mean number of lines that parse."""
        return sum(check.lines for check in self.checks) / len(self.checks)

    @property
    def errors(self) -> list[tuple[str, int]]:
        """The most frequent errors with their counts, in descending order."""
        return Counter(check.error for check in self.checks if check.error).most_common(MAX_ERRORS)

    @property
    def facts(self) -> dict[str, Any]:
        """The same for JSON."""
        outcomes: tuple[Outcome, ...] = ("parses", "broken", "unfinished")
        return {name: self.proportion(name).facts for name in outcomes} | {
            "lines": self.lines,
            "errors": self.errors,
        }


def check_texts(texts: Sequence[str]) -> SyntaxStatistics:
    """The outcomes of `check_syntax` for all texts."""
    return SyntaxStatistics(tuple(check_syntax(text) for text in texts))


def find_separator(text: str, min_count: int) -> str:
    """The line breaks that separate definitions in `text`, at least `min_count` times.

    Python has two blank lines between top-level definitions; a text with fewer such places is cut
    at one blank line, or at any line break.

    >>> find_separator("import re\\n\\nx = 1\\n\\ny = 2\\n", 2)
    '\\n\\n'
    """
    line_break = "\r\n" if "\r\n" in text else "\n"
    separators = (line_break * count for count in (3, 2, 1))
    return next(
        (separator for separator in separators if text.count(separator) >= min_count), line_break
    )


def cut_pieces(
    text: str, separator: str, lengths: Sequence[int], count: int = NATURAL_PIECES
) -> list[str]:
    """Up to `count` evenly spaced pieces of `text`, each after a `separator`.

    `lengths` are in characters; they are repeated when there are fewer than pieces. Places too
    close to the end of the text are left out.
    """
    longest = max(lengths, default=0)
    starts = [
        match.end()
        for match in re.finditer(re.escape(separator), text)
        if match.end() + longest <= len(text)
    ]
    count = min(count, len(starts))
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    return [text[start : start + length] for start, length in zip(chosen, cycle(lengths))]


def check_syntax(text: str) -> SyntaxCheck:
    """The outcome for one text, as defined at the top of this module.

    >>> check_syntax("def f(x):\\n    return x\\n\\nprint(f(")
    SyntaxCheck(outcome='parses', lines=2, error='')
    >>> check_syntax("x = = 3\\n")
    SyntaxCheck(outcome='broken', lines=0, error='invalid syntax')
    """
    lines = text[:MAX_CHARACTERS].replace("\r\n", "\n").split("\n")[:-1]
    while lines and lines[-1].endswith("\\"):  # the line continues in the last one, which is gone
        lines.pop()
    with _ignore_warnings():
        error = _parse_error(lines)
        is_broken = bool(error) and not _is_incomplete(lines)
        ends = [end for end in range(len(lines), 0, -1) if lines[end - 1].strip()]
        longest = next((end for end in ends if not _parse_error(lines[:end])), 0)
        statements = ast.parse(_join(lines[:longest])).body
    outcome: Outcome = "broken" if is_broken else "parses" if statements else "unfinished"
    return SyntaxCheck(
        outcome, sum(bool(line.strip()) for line in lines[:longest]), error if is_broken else ""
    )


def _parse_error(lines: Sequence[str]) -> str:
    """The error of `ast.parse` for these lines, without line numbers; empty for none."""
    try:
        ast.parse(_join(lines))
    except SyntaxError as error:
        return re.sub(r" on line \d+| \(detected at line \d+\)", "", error.msg)
    except PARSER_ERRORS as error:
        return (
            "nested too deeply"
            if isinstance(error, (RecursionError, MemoryError))
            else type(error).__name__
        )
    return ""


def _is_incomplete(lines: Sequence[str]) -> bool:
    """Whether an interactive prompt would wait for more lines: there is no error before the end."""
    try:
        return codeop.compile_command(_join(lines), symbol="exec") is None
    except PARSER_ERRORS:
        return False


def _join(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Ignore warnings about dubious but valid code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
