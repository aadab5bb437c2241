"""Reading model folders that other people's programs wrote: config.json, and weights in one or several safetensors.

Everything in such a folder is somebody's claim. Sizes are looked at before anything is read, no path leaves the folder,
nothing is ever run or unpickled, and a key that is of another type than it must be is an error that names it.
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

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MOST_FILES = 1000
LARGEST_HEADER = 64 << 20  # bytes; a model of ten thousand matrices has one
# What old versions of transformers saved among the weights, of whatever type, and what follows from the config.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Values:
    """The values of a JSON object, each asked for by its type. Raises InputError for another one; null is absent."""

    path: Path
    values: dict[str, Any]

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self._wrong(name, value, "a whole number of 0 or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def word(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if type(value) is not str:
            raise self._wrong(name, value, "a word")
        return value

    def list(self, name: str) -> list[Any]:
        value = self._get(name, [])
        if type(value) is not list:
            raise self._wrong(name, value, "a list")
        return value

    def part(self, name: str) -> Values:
        """The values of an object inside; none where it is absent."""
        value = self._get(name, {})
        if type(value) is not dict:
            raise self._wrong(name, value, "an object")
        return Values(self.path, value)

    def over(self, defaults: dict[str, Any]) -> Values:
        """With these where a name is absent; where it is null it stays so."""
        return Values(self.path, defaults | self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise InputError(
                f"{self.path} does not say '{name}': it is no config.json of a model that glasslm knows"
            )
        return value

    def _wrong(self, name: str, value: Any, expected: str) -> InputError:
        shown = repr(value)
        return InputError(f"{self.path} has {name} {shown[:100]}: expected {expected}")


def refuse_others(known: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError unless glasslm has a switch for what a config.json asks for."""
    if not known:
        raise InputError(
            f"the model has {name} {value}, which glasslm cannot compute: expected {expected}"
        )


def drop_tied_head(there: dict[str, Array], embedding: Array) -> None:
    """Some files have the tied matrix twice. Raises InputError where the two differ: then they are not tied."""
    head = there.pop("lm_head.weight", embedding)
    if head.shape != embedding.shape or not np.array_equal(head, embedding):
        raise InputError(
            "the model's lm_head.weight is not its embedding, though its config.json ties them: say false there for "
            "tie_word_embeddings"
        )


def read_json(path: Path) -> Values:
    """A JSON object. Raises DamagedError where the file is missing or something else."""
    found = files.read_json(path)
    if not isinstance(found, dict):
        raise DamagedError(f"{path} is not a JSON object")
    return Values(path, found)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model folder. Raises InputError where there are none, and for names that lead elsewhere."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(
            path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")
        )
        if pickled:
            raise InputError(
                f"{folder} has its weights as {pickled[0]}, which runs code when it is read: convert it to safetensors "
                "with the program it came from (in transformers: save_pretrained)"
            )
        raise InputError(
            f"{folder} holds no {WEIGHTS}: expected a model folder as transformers writes it"
        )
    names = sorted(set(map(str, read_json(folder / INDEX).part("weight_map").values.values())))
    if not 0 < len(names) <= MOST_FILES:
        raise InputError(
            f"{folder / INDEX} lists {len(names):,} files: expected 1 to {MOST_FILES:,}"
        )
    for name in names:
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(
                f"{folder / INDEX} names {name[:100]!r}: expected a safetensors file in the same folder"
            )
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name} is missing, though {INDEX} lists it")
    return [folder / name for name in names]


def read_shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each array but BUFFERS, from the headers alone. Raises DamagedError for what is no safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with open(path, "rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > LARGEST_HEADER:
            raise DamagedError(
                f"{path} has a header of {header:,} bytes: expected at most {LARGEST_HEADER:,}"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    if not name.endswith(BUFFERS):
                        shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise DamagedError(f"{path} is not a safetensors file ({error})") from None
    return shapes


def read_weights(paths: list[Path]) -> Iterator[tuple[str, Array]]:
    """Names and arrays but BUFFERS, float32 (or float64, where they are so); bfloat16 and float16 are widened.

    Raises DamagedError for a file that is no safetensors, and for values that are not finite.
    """
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    if not name.endswith(BUFFERS):
                        yield name, _widened(path, name, file)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            if isinstance(error, DamagedError):
                raise
            raise DamagedError(f"{path} is not a safetensors file ({error})") from None


def _widened(path: Path, name: str, file: Any) -> Array:
    part = file.get_slice(name)
    kind = part.get_dtype()
    if kind == "BF16":
        array = _from_bfloat16(path, name, part.get_shape())
    elif kind in ("F16", "F32", "F64"):
        array = file.get_tensor(name)
    else:
        raise DamagedError(f"{path} holds {name} as {kind}: expected floating-point numbers")
    array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    if not np.isfinite(array).all():
        raise DamagedError(f"{path} holds {name}, which is not finite everywhere")
    return array


def _from_bfloat16(path: Path, name: str, shape: list[int]) -> Array:
    """NumPy has no bfloat16: it is the upper half of a float32, read where the file's header says it lies."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")  # safe_open has checked header and bounds
        start, end = files.parse_json(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        upper = np.frombuffer(file.read(end - start), "<u2").astype(np.uint32)
    return (upper << 16).view(np.float32).reshape(shape)
