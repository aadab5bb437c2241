"""Numbers in words, text made safe to show, and a line for a person: for the display, the report and the commands."""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Say = Callable[[str], None]  # takes a message that a person should read

BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def tell(message: str) -> None:
    """A message to standard error, at once; lost where nobody reads that any more (`2>&1 | head`)."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def as_float(value: Any) -> float:
    """A number of a metrics line; null stands for a non-finite one."""
    return math.nan if value is None else float(value)


def number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else "nan"


def duration(seconds: float) -> str:
    """
    >>> duration(9), duration(62), duration(7500)
    ('9s', '1m 02s', '2h 05m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Bytes in powers of 1000: size(210_000_000) is "210 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def harmless(text: str) -> str:
    """`text` with nothing that could steer a terminal or a page: control characters become visible signs.

    >>> harmless("red\\x1b[31m\\ttab")
    'red␛[31m    tab'
    """
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n" or character.isprintable():
        return character
    if code < 32:
        return chr(0x2400 + code)  # the Unicode picture of the control character
    hidden = (
        unicodedata.category(character) in ("Cc", "Cs", "Cn", "Zl", "Zp")
        or unicodedata.bidirectional(character) in BIDI
    )
    return "\ufffd" if hidden else character


def one_line(text: str, longest: int = 160) -> str:
    """`text` in one line, line breaks as verse has them: "To be, / or not to be"."""
    line = re.sub(r"\s*\n\s*", " / ", harmless(text).strip())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def quoted(path: object) -> str:
    """A path as one would type it in a command."""
    return f'"{path}"' if " " in str(path) else str(path)
