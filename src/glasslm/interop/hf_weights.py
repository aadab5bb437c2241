"""Read the safetensors files of a model folder from an untrusted source.

Sizes are checked before a file is read, no path leaves the folder, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.errors import DamagedError, InputError
from glasslm.interop.import_source import PICKLE_CURE, PICKLE_SUFFIXES
from glasslm.interop.untrusted_json import read_values
from glasslm.runs.tensor_file import TensorEntry, read_entries, read_tensor
from glasslm.text import Notify

Array = NDArray[Any]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_WEIGHT_FILES = 1000
FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
# Buffers that old versions of transformers saved among the weights. They follow from the config.
BUFFER_SUFFIXES = (
    ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias",
    ".attention.masked_bias",
)  # fmt: skip
WRAPPER_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile, and of DistributedDataParallel
HEAD = "lm_head.weight"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises InputError if there are none, and for paths out of the folder.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise InputError(f"{folder} has its weights as {pickles[0]}: {PICKLE_CURE}")
        raise InputError(
            f"{folder} holds no {WEIGHTS_FILE}: expected a model folder as transformers writes it"
        )
    names = sorted(
        set(map(str, read_values(folder / INDEX_FILE).object("weight_map").values.values()))
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


class HFWeights(LazyArrays):
    """The tensors of a model folder by their names in transformers, read when asked for.

    They are float32, or float64 if they are stored so; bfloat16 and float16 are widened.
    BUFFER_SUFFIXES are left out. Reading raises DamagedError for values that are not finite.
    """

    def __init__(self, paths: list[Path]) -> None:
        """Raises DamagedError for a file that is not safetensors."""
        self._entries = {
            name: (path, entry)
            for path in paths
            for name, entry in read_entries(path).items()
            if not name.endswith(BUFFER_SUFFIXES)
        }
        self._last = ("", np.zeros(0))  # several weights may be in one tensor
        super().__init__(
            {name: entry.shape for name, (_, entry) in self._entries.items()}, self._read_tensor
        )

    def rename(self, names: dict[str, str]) -> None:
        """Give each tensor another name."""
        self._entries = {names[name]: value for name, value in self._entries.items()}
        self.shapes = {names[name]: shape for name, shape in self.shapes.items()}

    def _read_tensor(self, name: str) -> Array:
        if self._last[0] != name:
            path, entry = self._entries[name]
            self._last = ("", np.zeros(0))  # freed before the next one is read
            self._last = (name, _read_float_tensor(path, name, entry))
        return self._last[1]


def _read_float_tensor(path: Path, name: str, entry: TensorEntry) -> Array:
    if entry.dtype not in FLOAT_TYPES:
        raise DamagedError(f"{path} holds {name} as {entry.dtype}: expected floating-point numbers")
    array = read_tensor(path, entry)
    array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    if not np.isfinite(array).all():
        raise DamagedError(f"{path} holds {name}, which is not finite everywhere")
    return array


def require_equal_head(head: Array, embedding: Array) -> None:
    """Raise InputError where the second copy of a tied embedding matrix (V, D) differs from it."""
    if head.shape != embedding.shape or not np.array_equal(head, embedding):
        raise InputError(
            f"the model's {HEAD} differs from its embedding, but its config.json ties "
            "them: set tie_word_embeddings to false there"
        )


def wrapper_prefix(names: Iterable[str]) -> str:
    """The prefix that all names have from PyTorch's wrappers of a model; empty without one."""
    prefix, rest = "", set(names)
    while word := next((w for w in WRAPPER_PREFIXES if all(n.startswith(w) for n in rest)), ""):
        prefix, rest = prefix + word, {name.removeprefix(word) for name in rest}
        if not any(rest):
            break
    return prefix


def canonical_names(
    names: Iterable[str], prefix: str, tied_to: str | None, notify: Notify
) -> dict[str, str]:
    """The name of each array in the files -> its name in transformers.

    `prefix` is left out. With `tied_to`, the name of the embedding that the head is tied to, a
    head without that embedding is taken as the embedding. `notify` receives a note of each.
    """
    canonical = {name: name.removeprefix(prefix) for name in names}
    if prefix:
        notify(f"note: all names of the weights begin with {prefix!r}, which is left out")
    present = set(canonical.values())
    if tied_to and HEAD in present and not present & {tied_to, tied_to.partition(".")[2]}:
        canonical = {name: tied_to if new == HEAD else new for name, new in canonical.items()}
        notify(
            f"note: the model has {HEAD} and no {tied_to}; its config.json ties the two, so the "
            "one matrix is used for both"
        )
    return canonical
