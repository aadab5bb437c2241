"""Read one field of each line of a JSON-lines file (https://jsonlines.org)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from glasslm.data.sources.texts import list_names
from glasslm.errors import InputError

MAX_LINE_CHARACTERS = 100_000_000  # a file without line ends is not read into memory


def read_documents(texts: Iterable[str], field: str, path: str, errors: str) -> Iterator[str]:
    """The field `field` of each line of `texts`; empty documents and empty lines are left out.

    Raises InputError, with the number of the line, where a line is not a JSON object or has no such
    field. A lone surrogate is an error, too, or U+FFFD unless `errors` is "strict".
    """
    for number, line in enumerate(_split_lines(texts, path), 1):
        if not line.strip():
            continue
        document = _parse_line(line, field, f"{path}, line {number:,}").strip("\r\n")
        try:
            document.encode()
        except UnicodeEncodeError as error:
            if errors == "strict":
                raise InputError(
                    f"{path}, line {number:,}: the field '{field}' has half of a surrogate pair "
                    f"(U+{ord(document[error.start]):04X}): correct it, or use --encoding-errors "
                    "replace to read it as U+FFFD"
                ) from None
            document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if document:
            yield document


def _split_lines(texts: Iterable[str], path: str) -> Iterator[str]:
    """Lines without their ends. Other line separators of Unicode may stand inside a JSON string."""
    pieces: list[str] = []
    n_characters = 0
    for text in texts:
        *ends, rest = text.split("\n")
        for end in ends:
            yield "".join([*pieces, end])
            pieces, n_characters = [], 0
        pieces.append(rest)
        n_characters += len(rest)
        if n_characters > MAX_LINE_CHARACTERS:
            raise InputError(
                f"{path} has a line of more than {MAX_LINE_CHARACTERS:,} characters: "
                "--json-field reads one JSON object per line"
            )
    yield "".join(pieces)


def _parse_line(line: str, field: str, place: str) -> str:
    """The field of one line; "" for null."""
    expected = "--json-field reads one JSON object per line (jq -c '.[]' makes lines of a list)"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise InputError(f"{place} is not JSON ({reason}): {expected}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place} is not a JSON object: {expected}")
    if field not in value:
        names = list_names(list(value), field)
        raise InputError(f"{place} has no field '{field}': there are {names}")
    text = value[field]
    if not isinstance(text, str | None):
        raise InputError(
            f"{place}: the field '{field}' holds no text, but {type(text).__name__}: "
            "choose a field of text"
        )
    return text or ""
