"""Numbers as people write them: 10M, 10,000,000, 2,5 with a decimal comma, nan, or nothing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import Any

# K to T as people count parameters and tokens: B is a US billion, as G.
SUFFIXES = {
    "": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12,
    "mn": 1e6, "mio": 1e6, "million": 1e6, "millions": 1e6,
    "bn": 1e9, "billion": 1e9, "billions": 1e9, "tn": 1e12, "trillion": 1e12, "trillions": 1e12,
}  # fmt: skip
MISSING = {"", "-", "--", "—", "–", "n/a", "na", "none", "null", "?", "no log", "...", ".."}

_WORDS = "|".join(sorted(filter(None, SUFFIXES), key=len, reverse=True))
_PLAIN = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_NUMBER = re.compile(rf"(?P<number>{_PLAIN})\s*(?P<suffix>{_WORDS}|)(?P<unit>%?)", re.I)
_POWER = re.compile(
    rf"(?P<factor>{_PLAIN})\s*[x×*·]\s*10\s*(?:\^|\*\*)\s*(?P<power>[+-]?\d+)", re.I
)
_THOUSANDS = re.compile(
    rf"[+-]?(?:\d{{1,3}}(?:,\d{{3}})+|\d{{1,2}}(?:,\d{{2}})+,\d{{3}})(?:\.\d*)?(?:\s*(?:{_WORDS}))?",
    re.I,
)
_EUROPEAN = re.compile(r"[+-]?\d{1,3}(?:\.\d{3})+,\d*")
_POINT_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,(?:\d{1,2}|\d{4,})(?:e[+-]?\d+)?", re.I)
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+(?:e[+-]?\d+)?", re.I)
_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:[ '’]\d{3})+(?!\d)")  # 70 000 000 or 70'000'000
# What follows a number and is no part of it: its error, as in 4.52 ± 0.01 or 4.52(1), or a footnote
# mark.
_ERROR = re.compile(r"\s*(?:±|\+/-|\+-)\s*[\d.,]+(?:e[+-]?\d+)?\s*|(?<=\d)\s*\(\d+\)$", re.I)
_MARKS = "*†‡§¶ "
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")


def parse_number(cell: Any, decimal_comma: bool = False) -> float | None:
    """A cell as a number; None where it is missing. NaN and infinity are numbers.

    With `decimal_comma`, 2,5 is two and a half and 1.000 is a thousand; otherwise commas separate
    thousands. An error after a number (4.52 ± 0.01) and footnote marks are left out. Raises
    ValueError for words.

    >>> parse_number("10M"), parse_number("10,000,000"), parse_number("1.5e-3"), parse_number("")
    (10000000.0, 10000000.0, 0.0015, None)
    >>> parse_number("2,5", decimal_comma=True), parse_number("1.000", decimal_comma=True)
    (2.5, 1000.0)
    >>> parse_number("0.5bn"), parse_number("70 000 000"), parse_number("4.52 ± 0.01*")
    (500000000.0, 70000000.0, 4.52)
    """
    if cell is None or isinstance(cell, (int, float)):
        return None if cell is None else float(cell)
    if not decimal_comma:
        with contextlib.suppress(ValueError):
            return float(cell)  # most cells
    text = _plain_text(str(cell))
    if text.lower() in MISSING:
        return None
    if re.fullmatch(r"[+-]?(?:nan|inf(?:inity)?)", text, re.I):
        return float(text)
    if _EUROPEAN.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    elif _POINT_THOUSANDS.fullmatch(text) and (decimal_comma or text.count(".") > 1):
        text = text.replace(".", "")
    elif decimal_comma and not re.search(r",\d{3},", text):
        text = text.replace(",", ".")
    elif _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if match := _POWER.fullmatch(text):
        return float(match["factor"]) * 10.0 ** int(match["power"])
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"'{cell}' is not a number")
    number = float(match["number"]) * SUFFIXES[match["suffix"].lower()]
    return number / 100 if match["unit"] else number


def _plain_text(cell: str) -> str:
    """The cell with usual signs in place of typographic ones, without what is not the number."""
    text = cell.strip().strip("'\"").replace("_", "").replace("\u2212", "-")
    text = _SPACES.sub(" ", text).lstrip("~≈$€£ ").rstrip(_MARKS)
    if re.search("10[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]", text):
        text = re.sub("10(?=[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺])", "10^", text).translate(_SUPERSCRIPTS)
    text = _ERROR.sub("", text.rstrip("⁰¹²³⁴⁵⁶⁷⁸⁹")).rstrip(_MARKS)
    return _GROUPED.sub(lambda match: re.sub("[ '’]", "", match[0]), text)


def is_number(cell: Any) -> bool:
    """Whether a cell is a number or missing."""
    try:
        parse_number(cell)
    except ValueError:
        return _DECIMAL_COMMA.fullmatch(str(cell).strip()) is not None
    return True


def uses_decimal_commas(cells: Iterable[Any], is_usual: bool = False) -> bool:
    """Whether cells have commas that are decimal ones, and no decimal points.

    A comma before three digits is ambiguous: it is a decimal one if `is_usual`, as it is in tables
    with semicolons, or if another cell says so.

    >>> uses_decimal_commas(["1", "3,5", "3,512"]), uses_decimal_commas(["3.5", "10,000"])
    (True, False)
    >>> uses_decimal_commas(["1.000", "3,512"]), uses_decimal_commas(["1.000", "3,512"], True)
    (False, True)
    """
    comma = False
    for cell in cells:
        text = str(cell).strip()
        if _DECIMAL_POINT.fullmatch(text) and not _POINT_THOUSANDS.fullmatch(text):
            return False
        if re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3}){2,}", text):  # 1,000,000
            return False
        comma = comma or bool(_DECIMAL_COMMA.fullmatch(text) or _EUROPEAN.fullmatch(text))
        comma = comma or (is_usual and bool(_THOUSANDS.fullmatch(text)))
    return comma


def has_suffix(cell: Any) -> bool:
    """Whether a number has a unit of its own, as 10M has."""
    if not isinstance(cell, str):
        return False
    match = _NUMBER.fullmatch(_plain_text(cell).replace(",", ""))
    return match is not None and bool(match["suffix"])


def is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing: blank, a dash, NA. NaN is a number."""
    return cell is None or (isinstance(cell, str) and cell.strip().lower() in MISSING)
