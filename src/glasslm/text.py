"""Messages to the user; numbers, durations and foreign text formatted for terminals and pages."""

from __future__ import annotations

import difflib
import math
import re
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

Notify = Callable[[str], None]  # receives a message for the user
NOTIFY_INTERVAL_S = 5.0  # between two progress messages
SHOW_INTERVAL_S = 1.0  # between two states of a line on a terminal

# Invisible characters that reorder, hide or annotate the text around them. Joiners (U+200C, U+200D)
# are not among them: scripts and emoji need them.
HIDDEN_CHARACTERS = frozenset(
    "\u061c\u200e\u200f"  # marks of direction
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # embeddings, overrides, isolates
    "\u206a\u206b\u206c\u206d\u206e\u206f\ufff9\ufffa\ufffb"  # shaping, annotations
) | frozenset(map(chr, range(0xE0000, 0xE0080)))  # tags, an invisible copy of ASCII


def notify(message: str) -> None:
    """Print a message to standard error at once; a closed stream (`2>&1 | head`) is ignored.

    Control characters are escaped: names of files and texts in messages may be foreign.
    """
    with suppress(OSError):
        print_escaped(message, sys.stderr)


def print_escaped(text: str, stream: TextIO | None = None) -> None:
    """Print text for people, to standard output by default, with control characters escaped."""
    print(escape_control_chars(text), file=stream, flush=True)


def print_result(text: str) -> None:
    """Print a result to standard output: exact into a pipe or file, escaped on a terminal."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    print(escape_control_chars(text) if is_terminal else text, flush=True)


def ignore_message(message: str) -> None:
    """A Notify that shows nothing."""


def as_float(value: Any) -> float:
    """A number of a metrics line as a float; NaN for None, which stands for a non-finite number."""
    return math.nan if value is None else float(value)


def format_number(value: float | None, form: str) -> str:
    """`value` in the format `form`; "-" for None, "nan" for a number that is not finite."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else "nan"


def plural(count: int, word: str) -> str:
    """The count with its word.

    >>> plural(1, "head"), plural(4, "head")
    ('1 head', '4 heads')
    """
    return f"{count:,} {word}{'s' * (count != 1)}"


def format_duration(seconds: float) -> str:
    """A duration in its two largest units.

    >>> format_duration(9), format_duration(62), format_duration(7500)
    ('9s', '1m 02s', '2h 05m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def format_bytes(count: float) -> str:
    """A number of bytes in powers of 1000.

    >>> format_bytes(210_000_000), format_bytes(999_700), format_bytes(2.5e15)
    ('210 MB', '1 MB', '2,500 TB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        rounded = float(f"{count:.3g}")
        if rounded < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{rounded:,g} {unit}"


def escape_control_chars(text: str) -> str:
    """`text` with visible signs in place of all characters that could steer a terminal or a page.

    >>> escape_control_chars("red\\x1b[31m\\ttab")
    'red␛[31m    tab'
    """
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return text if text.isprintable() else "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    code = ord(character)
    if character == "\n" or character.isprintable():
        return character
    if code < 32:
        return chr(0x2400 + code)  # the Unicode picture of the control character
    is_hidden = (
        unicodedata.category(character) in ("Cc", "Cs", "Cn", "Zl", "Zp")
        or character in HIDDEN_CHARACTERS
    )
    return "\ufffd" if is_hidden else character


def to_one_line(text: str, max_chars: int = 160) -> str:
    """`text` in one line of at most `max_chars`, safe to print, with " / " for line breaks.

    >>> to_one_line("To be,\\nor not to be")
    'To be, / or not to be'
    """
    line = re.sub(r"\s*\n\s*", " / ", escape_control_chars(text).strip())
    return line if len(line) <= max_chars else f"{line[: max_chars - 3]}..."


def describe_error(error: BaseException) -> str:
    """The type of an error and its message, in one line.

    >>> describe_error(ValueError("a\\nb")), describe_error(NotImplementedError())
    ('ValueError: a / b', 'NotImplementedError')
    """
    try:
        message = to_one_line(str(error))
    except Exception:  # a class of errors of the user's own code may fail to print itself
        message = ""
    return f"{type(error).__name__}{': ' if message else ''}{message}"


def collapse_whitespace(text: object) -> str:
    """`text` with control characters escaped and each run of white space as one space.

    >>> collapse_whitespace("To be,\\n  or not")
    'To be, or not'
    """
    return " ".join(escape_control_chars(str(text)).split())


def wrap_lines(text: str, indent: str = "", width: int = 100) -> list[str]:
    """`text` in lines of at most `width` characters, each after `indent`."""
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


def align_columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """The rows of a table as lines, with two spaces between columns.

    >>> align_columns([("name", "loss"), ("a", "1.5")])
    ['name  loss', 'a     1.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))).rstrip()
        for row in rows
    ]


def similar_names(
    name: str, known: Iterable[str], count: int = 1, min_similarity: float = 0.6
) -> list[str]:
    """At most `count` of the known names, those most like `name` first.

    `min_similarity` is between 0 and 1 (difflib).

    >>> similar_names("trian", ["train", "resume"])
    ['train']
    """
    return difflib.get_close_matches(name, sorted(known), count, min_similarity)


def suggest_name(name: str, known: Iterable[str], quote: str = "'") -> str:
    """The end of a message about an unknown name: the known one most like it, or nothing.

    >>> suggest_name("trian", ["train", "resume"])
    ": did you mean 'train'?"
    """
    similar = similar_names(name, known)
    return f": did you mean {quote}{similar[0]}{quote}?" if similar else ""


def quote_path(path: object) -> str:
    """A path as one types it in a command: in double quotes where it has a space."""
    return f'"{path}"' if " " in str(path) else str(path)


@contextmanager
def show_elapsed(action: str, notify: Notify, expected_s: float = 0.0) -> Iterator[None]:
    """Tell that `action` begins and, if it was long, how long it took.

    On a terminal, a line shows each second how long the block takes, of about `expected_s` if
    known: for calls of libraries that report no progress.
    """
    notify(action)
    started, ended = time.monotonic(), threading.Event()
    expected = f" of about {format_duration(expected_s)}" if expected_s else ""

    def show() -> None:
        while not ended.wait(SHOW_INTERVAL_S):
            elapsed = format_duration(time.monotonic() - started)
            with suppress(OSError, ValueError):  # a closed terminal
                print(f"\r  {elapsed}{expected}   ", end="", file=sys.stderr, flush=True)

    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    thread = threading.Thread(target=show, daemon=True, name="elapsed time")
    if is_terminal:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if is_terminal:
            thread.join()
            with suppress(OSError, ValueError):
                print("\r" + " " * 30, end="\r", file=sys.stderr, flush=True)
    if (seconds := time.monotonic() - started) >= NOTIFY_INTERVAL_S:
        notify(f"{action}: done in {format_duration(seconds)}")


class Progress:
    """Sends a progress message with the time left, at most every NOTIFY_INTERVAL_S seconds."""

    def __init__(self, notify: Notify) -> None:
        self._notify, self._started_s = notify, time.monotonic()
        self._notified_s = self._started_s

    def count(self, done: int, total: int, action: str, unit: str) -> None:
        """`done` of `total` units are done, as in "evaluating: 5 of 9 tokens, 2 per second"."""
        speed = done / max(1e-9, time.monotonic() - self._started_s)
        self.update(
            done / total, f"{action}: {done:,} of {total:,} {unit}, {speed:,.0f} per second"
        )

    def update(self, share: float, message: str) -> None:
        """`share`, between 0 and 1, of the work is done; `message` describes it."""
        now = time.monotonic()
        if now - self._notified_s >= NOTIFY_INTERVAL_S and share > 0:
            self._notified_s = now
            left_s = (now - self._started_s) * max(0.0, 1 - share) / share
            self._notify(f"{message}, about {format_duration(left_s)} left")
