"""Join texts, choose the text column of a table, cut to a size, and cache what is slow to make.

`cached_text` stores each text under the hash of its content. A small JSON file, named after the
hash of the request, records which text belongs to the request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.data.cache import explain_write_errors
from glasslm.errors import InputError, raise_if_exhausted
from glasslm.text import escape_control_chars, similar_names

SEPARATOR = "\n\n"
MAX_LISTED_NAMES = 20  # in one error message


def join_texts(
    texts: Iterable[str], max_bytes: float = float("inf"), separator: str = SEPARATOR
) -> Iterator[bytes]:
    """Whole texts with `separator` between them, as many as fit into `max_bytes`, as UTF-8.

    Empty texts are left out. A first text longer than `max_bytes` is cut after a whole character.

    >>> b"".join(join_texts(["one", "", "two", "three"], max_bytes=9))
    b'one\\n\\ntwo'
    """
    total = 0
    for text in texts:
        # "replace" is for lone surrogates, which UTF-8 cannot encode.
        body = text.strip("\r\n").encode("utf-8", "replace")
        if not body:
            continue
        if total:
            body = separator.encode() + body
        if total + len(body) > max_bytes:
            if not total:
                yield body[: int(max_bytes)].decode("utf-8", "ignore").encode()
            return
        total += len(body)
        yield body


def choose_text_column(
    is_text: Mapping[str, bool],
    table: str,
    requested: str | None = None,
    cure: str = "rename the one to use to text",
) -> str:
    """Name of the text column: the requested one, else "text", else the only one that holds text.

    `is_text` tells for each column whether it holds text; `table` names the table in messages.
    Raises InputError with the names of the columns; the `cure` is for several that hold text.
    """
    names = list_names(list(is_text), requested)
    if requested is not None:
        if requested not in is_text:
            raise InputError(f"{table} has no column '{requested}': there are {names}")
        if not is_text[requested]:
            raise InputError(f"column '{requested}' of {table} holds no text: there are {names}")
        return requested
    if is_text.get("text"):
        return "text"
    text_columns = [name for name, holds_text in is_text.items() if holds_text]
    if len(text_columns) == 1:
        return text_columns[0]
    if not text_columns:
        raise InputError(f"no column of {table} holds text: there are {names}")
    raise InputError(
        f"{table} has no column 'text', but several that hold text, "
        f"{list_names(text_columns)}: {cure}"
    )


def list_names(names: list[str], requested: str | None = None) -> str:
    """Names for a message, at most MAX_LISTED_NAMES; those similar to `requested` come first."""
    similar = similar_names(requested or "", names, count=3)
    names = similar + [name for name in names if name not in similar]
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return escape_control_chars(", ".join(names[:MAX_LISTED_NAMES])) + more if names else "none"


def cached_text(
    folder: Path,
    request: Any,
    make_text: Callable[[], Iterator[bytes]],
    find_origin: Callable[[], str] = str,
) -> tuple[Path, str]:
    """Path and origin of the text for `request`, made only if the cache has no intact copy.

    `request` is strict JSON; its hash names the record. `find_origin` is called after `make_text`
    is exhausted; it returns the address of the text.
    """
    recipe = folder / f"{sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()}.json"
    try:
        record = files.read_json(recipe)
        path = folder / f"{record['text']}.txt"
        if files.file_sha256(path) == path.stem:
            return path, record.get("origin", "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise_if_exhausted(error, recipe)  # Else it is missing or damaged: it is made again.
    with explain_write_errors(folder):
        path = files.write_by_hash(folder, make_text(), ".txt")
        origin = find_origin()
        files.write_json(recipe, {"text": path.stem, "of": request, "origin": origin})
    return path, origin
