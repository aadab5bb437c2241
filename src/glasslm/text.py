"""Messages to the user; numbers, durations and foreign text formatted for terminals and pages."""

from __future__ import annotations

import difflib
import math
import re
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

Notify = Callable[[str], None]  # receives a message for the user

# Bidirectional classes of the invisible characters that reorder the text around them.
BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def notify(message: str) -> None:
    """Print a message to standard error at once; a closed stream (`2>&1 | head`) is ignored."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def as_float(value: Any) -> float:
    """A number of a metrics line as a float; NaN for None, which stands for a non-finite number."""
    return math.nan if value is None else float(value)


def format_number(value: float | None, form: str) -> str:
    """`value` in the format `form`; "-" for None, "nan" for a number that is not finite."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else "nan"


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

    >>> format_bytes(210_000_000)
    '210 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


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
        or unicodedata.bidirectional(character) in BIDI_CONTROLS
    )
    return "\ufffd" if is_hidden else character


def to_one_line(text: str, max_chars: int = 160) -> str:
    """`text` in one line of at most `max_chars`, safe to print, with " / " for line breaks.

    >>> to_one_line("To be,\\nor not to be")
    'To be, / or not to be'
    """
    line = re.sub(r"\s*\n\s*", " / ", escape_control_chars(text).strip())
    return line if len(line) <= max_chars else f"{line[: max_chars - 3]}..."


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


def suggest_name(name: str, known: Iterable[str], quote: str = "'") -> str:
    """The end of a message about an unknown name: the known one most like it, or nothing.

    >>> suggest_name("trian", ["train", "resume"])
    ": did you mean 'train'?"
    """
    similar = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {quote}{similar[0]}{quote}?" if similar else ""


def quote_path(path: object) -> str:
    """A path as one types it in a command: in double quotes where it has a space."""
    return f'"{path}"' if " " in str(path) else str(path)
