"""Many texts as one: which column of a table they are, joined by blank lines, cut to a size, kept in the cache.

What takes long to fetch or to convert is made once: a small file named after the request holds the hash of its text.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.data.cache import writing
from glasslm.errors import InputError
from glasslm.text import Say, duration, harmless

SEPARATOR = "\n\n"
WAIT = 5.0  # seconds between two words on how far it is
LISTED = 20  # names that an error shows, at most


def joined(texts: Iterable[str], most: float = float("inf")) -> Iterator[bytes]:
    """Whole texts with a blank line between them, as many as fit into `most` bytes; empty ones are left out.

    Where the first one is longer than that, it alone is cut, after a whole character.

    >>> b"".join(joined(["one", "", "two", "three"], most=9))
    b'one\\n\\ntwo'
    """
    total = 0
    for text in texts:
        body = text.strip("\r\n").encode(
            "utf-8", "replace"
        )  # "replace" is for half a surrogate pair, which is no UTF-8
        if not body:
            continue
        if total:
            body = SEPARATOR.encode() + body
        if total + len(body) > most:
            if not total:
                yield body[: int(most)].decode("utf-8", "ignore").encode()
            return
        total += len(body)
        yield body


def text_column(holds: Mapping[str, bool], where: str, asked: str | None = None) -> str:
    """The column with the text: the one asked for, else "text", else the only one that holds text.

    `holds` says of each column whether it does. Raises InputError with the names that there are.
    """
    names = listed(list(holds), asked)
    if asked is not None:
        if asked not in holds:
            raise InputError(f"{where} has no column '{asked}': there are {names}")
        if not holds[asked]:
            raise InputError(f"column '{asked}' of {where} holds no text: there are {names}")
        return asked
    if holds.get("text"):
        return "text"
    strings = [name for name, does in holds.items() if does]
    if len(strings) == 1:
        return strings[0]
    if not strings:
        raise InputError(f"no column of {where} holds text: there are {names}")
    raise InputError(f"{where} has no column 'text', but several that hold text: {listed(strings)}")


def listed(names: list[str], asked: str | None = None) -> str:
    """A list of names for a message, those like `asked` first, and not endless."""
    close = difflib.get_close_matches(asked or "", names, n=3)
    names = close + [name for name in names if name not in close]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return harmless(", ".join(names[:LISTED])) + more if names else "none"


def made_once(
    folder: Path, request: Any, make: Callable[[], Iterator[bytes]], origin: Callable[[], str] = str
) -> tuple[Path, str]:
    """The file with what `make` yields for `request` (strict JSON), made only if the cache does not have it whole.

    Beside it what `origin` said, once it was made, of where it is from.
    """
    recipe = folder / f"{sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()}.json"
    try:
        made = files.read_json(recipe)
        path = folder / f"{made['text']}.txt"
        if files.sha256_of(path) == path.stem:
            return path, made.get("origin", "")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # missing or damaged: DamagedError is an OSError, too
        pass
    with writing(folder):
        path = files.write_by_hash(folder, make(), ".txt")
        found = origin()
        files.write_json(recipe, {"text": path.stem, "of": request, "origin": found})
    return path, found


class Progress:
    """Says now and then how much of something is done, and how long the rest will take."""

    def __init__(self, say: Say) -> None:
        self._say, self._began = say, time.monotonic()
        self._said = self._began

    def at(self, share: float, what: str) -> None:
        """`share` is done, of 1; `what` says it in words."""
        now = time.monotonic()
        if now - self._said >= WAIT and share > 0:
            self._said = now
            left = (now - self._began) * max(0.0, 1 - share) / share
            self._say(f"{what}, about {duration(left)} left")
