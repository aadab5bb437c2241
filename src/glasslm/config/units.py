"""Durations and sizes from flags, such as "1h30m" and "50MB"."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from glasslm.errors import InputError

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_UNITS = {"h": 3600, "min": 60, "m": 60, "s": 1}


def parse_duration(duration: str) -> float:
    """The seconds of a duration such as "90s", "10min", "1h30m", ".5h" or "45" (seconds).

    Raises InputError for anything else, and for 0.

    >>> parse_duration("1h30m")
    5400.0
    """
    with_unit = rf"{_NUMBER}\s*({'|'.join(_UNITS)})\s*"
    total = math.nan
    if re.fullmatch(rf"\s*(?:{with_unit})+", duration):
        total = sum(
            float(number) * _UNITS[unit] for number, unit in re.findall(with_unit, duration)
        )
    elif plain_number := re.fullmatch(rf"\s*{_NUMBER}\s*", duration):
        total = float(plain_number[1])
    if not 0 < total < math.inf:
        raise InputError(
            f"'{duration}' is not a duration: "
            "write numbers with s, m or h, such as 90s, 10m or 2h30m"
        )
    return total


def round_up_duration(seconds: float) -> str:
    """The next duration in whole seconds, or from two minutes on in whole minutes, as a flag.

    >>> round_up_duration(5350.0)
    '1h30m'
    """
    if seconds <= 120:
        return f"{math.ceil(seconds)}s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes else "")


def parse_size(size: str) -> int:
    """The bytes of a size such as "200kB", "50 MB" or "2GB", in powers of 1000; 0 if it is none.

    >>> parse_size("200kB")
    200000
    """
    parts = re.fullmatch(rf"{_NUMBER}\s*(B|kB|MB|GB|)", size.strip(), re.IGNORECASE)
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    return int(Fraction(parts[1]) * units[parts[2].upper()]) if parts else 0
