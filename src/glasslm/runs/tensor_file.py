"""Safetensors files: the pieces that a checkpoint writes, and the arrays of any such file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm import files, strict_json
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.errors import DamagedError, explain_system_errors

Array = NDArray[Any]

DTYPE_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
NUMPY_TYPES = {  # of the types in safetensors files; BF16 as its bits
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?", "C64": "<c8",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip
DTYPE_BITS = {name: 8 * np.dtype(dtype).itemsize for name, dtype in NUMPY_TYPES.items()} | {
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
LENGTH_BYTES = 8  # of the length of the header
MAX_DIMENSIONS, MAX_NUMBERS = 32, 1 << 48  # of an array; NumPy's own limits are a little higher
MAX_HEADER_BYTES = 16 << 20  # a model of ten thousand matrices has 1 MB


class TensorEntry(NamedTuple):
    """A tensor in a safetensors file; its bytes are [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def safetensors_chunks(
    arrays: Mapping[str, Array], metadata: dict[str, str] | None = None
) -> Iterable[files.Chunk]:
    """The pieces of a safetensors file: header length, header, then the arrays, without a copy.

    The layout is that of the safetensors library: names in order, header padded to 8 bytes.
    `metadata` is what the header says of the file. LazyArrays are read while they are written.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in sorted(arrays):
        dtype, shape = _type_and_shape(arrays, name)
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = [len(text).to_bytes(8, "little"), text]
    if isinstance(arrays, LazyArrays):
        return chain(first, (arrays[name] for name in sorted(arrays)))
    return [*first, *(arrays[name] for name in sorted(arrays))]


def _type_and_shape(
    arrays: Mapping[str, Array], name: str
) -> tuple[np.dtype[Any], tuple[int, ...]]:
    if isinstance(arrays, LazyArrays):
        return np.dtype(np.float32), arrays.shapes[name]
    return arrays[name].dtype, arrays[name].shape


def read_arrays(path: Path, prefix: str = "") -> dict[str, Array]:
    """The arrays of a file whose names begin with `prefix`.

    Raises DamagedError unless it is a safetensors file of float32 or float64 numbers.
    """
    lazy = lazy_arrays(path, prefix)
    with _read_errors(path):
        return dict(lazy.items())


def lazy_arrays(path: Path, prefix: str = "") -> LazyArrays:
    """`read_arrays`, with each array read when it is asked for."""
    with _read_errors(path):
        entries = read_entries(path)
    for name, entry in entries.items():
        if name.startswith(prefix) and entry.dtype not in DTYPE_NAMES.values():
            raise DamagedError(f"{path} holds {name} as {entry.dtype}: expected float32 or float64")
    shapes = {name: entry.shape for name, entry in entries.items() if name.startswith(prefix)}
    return LazyArrays(shapes, lambda name: read_tensor(path, entries[name]))


def _read_errors(path: Path) -> AbstractContextManager[None]:
    return explain_system_errors(path, lambda why: DamagedError(f"{path} cannot be read ({why})"))


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors that the header of a safetensors file lists, by name.

    Raises DamagedError unless the tensors fill the rest of the file without holes and overlaps.
    The library for this is not used: it reports each error of the system as a missing file, and
    its code in Rust panics without memory. https://github.com/huggingface/safetensors#format
    """

    def not_safetensors(reason: str) -> DamagedError:
        return DamagedError(f"{path} is not a whole safetensors file ({reason})")

    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise not_safetensors(
                f"its header has {length:,} bytes, expected at most {MAX_HEADER_BYTES:,} and a "
                f"part of the file's {size:,}"
            )
        text = file.read(length)
    try:
        header = strict_json.parse_json(text)
        header.pop("__metadata__", None)
        data_start = LENGTH_BYTES + length
        entries = {name: _parse_entry(values, data_start) for name, values in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise not_safetensors(f"its header is not valid: {error}") from None
    end = data_start
    for start, next_end in sorted((entry.start, entry.end) for entry in entries.values()):
        if start != end:
            raise not_safetensors(f"an array begins at byte {start:,}, expected {end:,}")
        end = next_end
    if end != size:
        raise not_safetensors(f"it has {size:,} bytes, its header says {end:,}")
    return entries


def _parse_entry(values: dict[str, Any], data_start: int) -> TensorEntry:
    """One entry of a header; ValueError, KeyError or TypeError for a wrong one."""
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    start, end = offsets
    if {*map(type, shape), type(start), type(end)} != {int} or min(shape + offsets) < 0:
        raise ValueError(f"shape {shape} and offsets {offsets} are not whole numbers from 0 on")
    if len(shape) > MAX_DIMENSIONS or math.prod(number or 1 for number in shape) > MAX_NUMBERS:
        raise ValueError(f"the shape {shape} is beyond what NumPy can hold")
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{dtype} of shape {shape} does not have {end - start:,} bytes")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)


def read_tensor(path: Path, entry: TensorEntry) -> Array:
    """The array of an entry of `read_entries`; bfloat16 is widened to float32.

    Raises DamagedError for a type that NumPy does not have, and for a file that was cut meanwhile.
    """
    if entry.dtype not in NUMPY_TYPES:
        raise DamagedError(f"{path} holds {entry.dtype}, which NumPy does not have")
    count = math.prod(entry.shape)
    array = np.fromfile(path, NUMPY_TYPES[entry.dtype], count, offset=entry.start)
    if len(array) < count:
        raise DamagedError(f"{path} was cut while it was read")
    if entry.dtype == "BF16":  # the upper half of a float32
        wide = array.astype(np.uint32)
        wide <<= 16  # in place: an embedding matrix is a large part of a small model
        array = wide.view(np.float32)
    return array.reshape(entry.shape)
