"""Read model folders from untrusted sources: config.json and safetensors files.

Sizes are checked before a file is read, no path leaves the folder, nothing is executed or
unpickled, and a key of the wrong type is an error that names it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from glasslm import files
from glasslm.errors import DamagedError, InputError

Array = NDArray[Any]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_WEIGHT_FILES = 1000
MAX_HEADER_BYTES = 64 << 20  # a model of ten thousand matrices has 1 MB
# Buffers that old versions of transformers saved among the weights. They follow from the config.
BUFFER_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Values:
    """The values of a JSON object, read by type.

    Raises InputError for another type; null counts as absent.
    """

    path: Path
    values: dict[str, Any]

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self._type_error(name, value, "a whole number of 0 or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise self._type_error(name, value, "a finite number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._type_error(name, value, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if type(value) is not str:
            raise self._type_error(name, value, "a string")
        return value

    def array(self, name: str) -> list[Any]:
        """The list `name`; empty if it is absent."""
        value = self._get(name, [])
        if type(value) is not list:
            raise self._type_error(name, value, "a list")
        return value

    def object(self, name: str) -> Values:
        """The values of the object `name`; empty if it is absent."""
        value = self._get(name, {})
        if type(value) is not dict:
            raise self._type_error(name, value, "an object")
        return Values(self.path, value)

    def with_defaults(self, defaults: dict[str, Any]) -> Values:
        """The same values, with `defaults` for absent keys; a null stays null."""
        return Values(self.path, defaults | self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise InputError(
                f"{self.path} has no '{name}': expected the config.json of a model that glasslm "
                "can import"
            )
        return value

    def _type_error(self, name: str, value: Any, expected: str) -> InputError:
        return InputError(f"{self.path} has {name} {repr(value)[:100]}: expected {expected}")


def require_supported(supported: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError unless glasslm supports the value of a setting in a configuration file."""
    if not supported:
        raise InputError(
            f"the model has {name} {value}, which glasslm cannot compute: expected {expected}"
        )


def drop_tied_head(hf_weights: dict[str, Array], embedding: Array) -> None:
    """Remove the second copy (V, D) of a tied embedding matrix.

    Raises InputError where the two copies differ.
    """
    head = hf_weights.pop("lm_head.weight", embedding)
    if head.shape != embedding.shape or not np.array_equal(head, embedding):
        raise InputError(
            "the model's lm_head.weight differs from its embedding, but its config.json ties "
            "them: set tie_word_embeddings to false there"
        )


def read_json(path: Path) -> Values:
    """The values of a JSON object.

    Raises DamagedError for a missing file, and for anything else than an object.
    """
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is not a JSON object")
    return Values(path, content)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises InputError if there are none, and for paths out of the folder.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickled = sorted(
            path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")
        )
        if pickled:
            raise InputError(
                f"{folder} has its weights as {pickled[0]}, which runs code when it is read: "
                "convert it to safetensors with the program it came from (in transformers: "
                "save_pretrained)"
            )
        raise InputError(
            f"{folder} holds no {WEIGHTS_FILE}: expected a model folder as transformers writes it"
        )
    names = sorted(
        set(map(str, read_json(folder / INDEX_FILE).object("weight_map").values.values()))
    )
    if not 0 < len(names) <= MAX_WEIGHT_FILES:
        raise InputError(
            f"{folder / INDEX_FILE} lists {len(names):,} files: expected 1 to {MAX_WEIGHT_FILES:,}"
        )
    for name in names:
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(
                f"{folder / INDEX_FILE} names {name[:100]!r}: expected a safetensors file in the "
                "same folder"
            )
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name} is missing, but {INDEX_FILE} lists it")
    return [folder / name for name in names]


def read_shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each array, read from the headers alone; BUFFER_SUFFIXES are left out.

    Raises DamagedError for a file that is not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with open(path, "rb") as start:
            header_bytes = int.from_bytes(start.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise DamagedError(
                f"{path} has a header of {header_bytes:,} bytes: expected at most "
                f"{MAX_HEADER_BYTES:,}"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    if not name.endswith(BUFFER_SUFFIXES):
                        shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise DamagedError(f"{path} is not a safetensors file ({error})") from None
    return shapes


def read_weights(paths: list[Path]) -> Iterator[tuple[str, Array]]:
    """Names and arrays as float32, or float64 if they are stored so; BUFFER_SUFFIXES are left out.

    Shapes are those of the file; bfloat16 and float16 are widened. Raises DamagedError for a file
    that is not safetensors, and for values that are not finite.
    """
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    if not name.endswith(BUFFER_SUFFIXES):
                        yield name, _read_float_array(path, name, file)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            if isinstance(error, DamagedError):
                raise
            raise DamagedError(f"{path} is not a safetensors file ({error})") from None


def _read_float_array(path: Path, name: str, file: Any) -> Array:
    part = file.get_slice(name)
    dtype = part.get_dtype()
    if dtype == "BF16":
        array = _read_bfloat16(path, name, part.get_shape())
    elif dtype in ("F16", "F32", "F64"):
        array = file.get_tensor(name)
    else:
        raise DamagedError(f"{path} holds {name} as {dtype}: expected floating-point numbers")
    array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    if not np.isfinite(array).all():
        raise DamagedError(f"{path} holds {name}, which is not finite everywhere")
    return array


def _read_bfloat16(path: Path, name: str, shape: list[int]) -> Array:
    """A bfloat16 array as float32, of which it is the upper half; NumPy has no bfloat16."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")  # safe_open has checked header and bounds
        start, end = files.parse_json(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        upper = np.frombuffer(file.read(end - start), "<u2").astype(np.uint32)
    return (upper << 16).view(np.float32).reshape(shape)
