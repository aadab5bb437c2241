"""Convert parquet files to text once; the text is kept in the cache.

pyarrow reads a file in batches, so a file may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.data.cache import cache_dir
from glasslm.data.sources.texts import (
    SEPARATOR,
    cached_text,
    choose_text_column,
    join_texts,
)
from glasslm.errors import InputError, explain_system_errors
from glasslm.text import Notify, Progress, format_bytes, to_one_line

MAGIC = b"PAR1"  # at both ends of a file: https://parquet.apache.org/docs/file-format/
BATCH_ROWS = 256
MAX_EXPANSION = 1000  # bytes of text per byte of a file; natural text reaches about 10
CONVERSION_FORMAT = 1  # part of the cache key: another number converts every file again


def convert_to_text(path: Path, notify: Notify, separator: str = SEPARATOR) -> Path:
    """Path of the text: `path` itself, or the cached text of a parquet file.

    `separator` stands between its rows. A parquet file is recognized by its content. Raises
    InputError where the file cannot be read, is damaged, or pyarrow is missing.
    """
    with explain_system_errors(path, lambda why: InputError(f"{path} cannot be read ({why})")):
        if not _is_parquet(path):
            return path
        bytes_in_file = path.stat().st_size

    def make_text() -> Iterator[bytes]:
        notify(
            f"{path.name}: a parquet file, {format_bytes(bytes_in_file)}; "
            "converting it to text, once"
        )
        return join_texts(_report_progress(path, notify), separator=separator)

    request = {
        "sha256": files.file_sha256(path),
        "kind": "a parquet file",
        "format": CONVERSION_FORMAT,
    }
    if separator != SEPARATOR:  # texts of older versions keep their names
        request["separator"] = separator
    return cached_text(cache_dir("converted"), request, make_text)[0]


def _is_parquet(path: Path) -> bool:
    """Whether the file is parquet. Raises InputError for a .parquet file of other content."""
    with open(path, "rb") as file:
        head = file.read(8192)
    has_suffix = path.suffix.lower() == ".parquet"
    if head.startswith(MAGIC) and (has_suffix or b"\0" in head):
        return True
    if has_suffix:
        raise InputError(
            f"{path} is called a parquet file, but does not begin as one: get it again"
        )
    return False


def _report_progress(path: Path, notify: Notify) -> Iterator[str]:
    """The texts of the file, with progress messages, and a note on empty texts at the end."""
    progress, count, empty = Progress(notify), 0, 0
    for share, text in _read_texts(path):
        count += 1
        empty += not text.strip("\r\n")
        progress.update(share, f"{path.name}: {share:.0%}, {count:,} texts")
        yield text
    if empty:
        notify(f"note: {empty:,} of the {count:,} texts in {path.name} are empty and left out")


def _read_texts(path: Path) -> Iterator[tuple[float, str]]:
    """The texts in order, each with the share of the rows that is read by then.

    Raises InputError where pyarrow is missing, the file is damaged, or the text column is unclear.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path} is a parquet file, which needs the library pyarrow: pip install 'glasslm[hub]'"
        ) from None

    def damaged(why: str) -> InputError:
        return InputError(f"{path} is a damaged parquet file ({to_one_line(why)}): get it again")

    with explain_system_errors(path, damaged, pyarrow.ArrowException, ValueError):
        with pyarrow.parquet.ParquetFile(path) as file:
            column = choose_text_column(
                {field.name: _is_text(field.type) for field in file.schema_arrow}, str(path)
            )
            n_rows, rows_read, bytes_read = max(1, file.metadata.num_rows), 0, 0
            file_bytes = path.stat().st_size
            _limit_expansion(path, file_bytes, _stated_bytes(file.metadata, column))
        # Of a dictionary with long texts a batch holds the indices, not a copy for each row.
        with pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, read_dictionary=[column]
        ) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
                rows_read += batch.num_rows
                for value in batch.column(0):
                    text = value.as_py() or ""
                    bytes_read += len(text)
                    _limit_expansion(path, file_bytes, bytes_read)
                    yield rows_read / n_rows, text


def _stated_bytes(metadata: Any, column: str) -> int:
    """Size of a column after decompression, as the file states it; before dictionaries expand."""
    chunks = (
        metadata.row_group(group).column(index)
        for group in range(metadata.num_row_groups)
        for index in range(metadata.num_columns)
    )
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _limit_expansion(path: Path, file_bytes: int, text_bytes: int) -> None:
    """Raise InputError for a file that expands so much that it was made to fill the memory."""
    if text_bytes > MAX_EXPANSION * file_bytes:
        raise InputError(
            f"{path} has {format_bytes(file_bytes)}, but unpacks to {format_bytes(text_bytes)} or "
            f"more; expected at most {MAX_EXPANSION:,} times its size: give the text itself"
        )


def _is_text(column_type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return bool(
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_string_view(column_type)
    )
