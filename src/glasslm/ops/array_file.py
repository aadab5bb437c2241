"""Checkpoints of a learner's own program: a dictionary of arrays in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from glasslm import files
from glasslm.errors import DamagedError, InputError
from glasslm.ops.arguments import as_array
from glasslm.runs.tensor_file import read_entries, read_tensor

# The types that safetensors and NumPy have in common.
ARRAY_TYPES = ["float16", "float32", "float64", "bool"] + [
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
]


def save_checkpoint(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write arrays, and numbers, to a safetensors file, atomically: the old file or the new one.

    Moments and counters are entries like the weights, such as {"m/w": m, "step": 100}.

    Args:
        path: The file, which is replaced if it exists. Its folder is created.
        arrays: Arrays of any shape, of floats, integers or bools, by name.

    Raises:
        InputError: A value is not an array or a number, or the folder cannot be created.
        ExhaustedError: The disk is full; an old file is intact.

    >>> save_checkpoint("checkpoint.safetensors", weights | {"step": 100})
    """
    path = _as_path(path)
    if not isinstance(arrays, Mapping):
        raise InputError(
            f"arrays is {type(arrays).__name__}: expected a dictionary of arrays by name"
        )
    copies = {}
    for name, value in arrays.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise InputError(f"the name of an array is {name!r}: expected another string")
        if isinstance(value, Mapping):
            raise InputError(
                f"arrays[{name!r}] is a dictionary: expected an array; give its arrays names such "
                f"as '{name}/{next(iter(value), 'NAME')}'"
            )
        array = np.array(as_array(f"arrays[{name!r}]", value), order="C")
        if array.dtype.name not in ARRAY_TYPES:
            raise InputError(
                f"arrays[{name!r}] is {array.dtype}, with the shape {array.shape}: expected an "
                "array of floats, integers or bools"
            )
        copies[name] = array.astype(array.dtype.newbyteorder("="))
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the path of a file in it")
    files.make_folder(path.parent)
    files.write_atomic(path, safetensors.numpy.save(copies))


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file by name; a saved number is an array with the shape ().

    Raises:
        InputError: There is no such file.
        DamagedError: The file is not a whole safetensors file of NumPy's types.
        ExhaustedError: The memory is full, or too many files are open.

    >>> step = int(load_checkpoint("checkpoint.safetensors")["step"])
    """
    path = _as_path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: give the path of a saved checkpoint")
    try:
        return {name: read_tensor(path, entry) for name, entry in read_entries(path).items()}
    except DamagedError as error:
        raise DamagedError(f"{error}: restore it from a copy") from None


def _as_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise InputError(f"path is {path!r}: expected the path of a file, as text or a Path")
    return Path(path)
