"""Texts out of a parquet file, read by pyarrow in batches, so that the file may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glasslm.data.sources.texts import text_column
from glasslm.errors import InputError
from glasslm.text import one_line

MAGIC = b"PAR1"  # at both ends of a file: https://parquet.apache.org/docs/file-format/
ROWS = 256  # of a batch


def texts(path: Path) -> Iterator[tuple[float, str]]:
    """The texts in their order, each with the share of the rows that is done then.

    Raises InputError where pyarrow is missing, the file is damaged, or it is not clear which column holds the text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path} is a parquet file, which needs the library pyarrow: pip install 'glasslm[hub]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            column = text_column(
                {field.name: _is_text(field.type) for field in file.schema_arrow}, str(path)
            )
            rows, done = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(ROWS, columns=[column]):
                done += batch.num_rows
                for text in batch.column(0).to_pylist():
                    yield done / rows, text or ""
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is a damaged parquet file ({one_line(str(error))}): get it again"
        ) from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
