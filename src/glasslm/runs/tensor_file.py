"""Safetensors files of a checkpoint: the pieces that are written, and the arrays that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from glasslm import files
from glasslm.errors import DamagedError, raise_if_exhausted

Array = NDArray[Any]

DTYPE_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}


def safetensors_chunks(arrays: dict[str, Array]) -> list[files.Chunk]:
    """The pieces of a safetensors file: header length, header, then the arrays, without a copy.

    The layout is that of the safetensors library: names in order, header padded to 8 bytes.
    """
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(arrays):
        start, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[arrays[name].dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(arrays[name] for name in sorted(arrays))]


def read_arrays(path: Path, prefix: str = "") -> dict[str, Array]:
    """The arrays of a file whose names begin with `prefix`.

    Raises DamagedError unless it is a safetensors file of float32 or float64 numbers.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            arrays = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise_if_exhausted(error, path)
        raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from None
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{path} is not a safetensors file that glasslm wrote ({error})"
        ) from None
    for name, array in arrays.items():
        if array.dtype not in DTYPE_NAMES:
            raise DamagedError(f"{path} holds {name} as {array.dtype}: expected float32 or float64")
    return arrays
