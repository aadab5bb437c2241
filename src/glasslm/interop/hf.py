"""A model folder of Hugging Face transformers: written so that no remote code is needed, compared, and read back."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from glasslm import files
from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import DamagedError, InputError
from glasslm.interop import families, vocabulary
from glasslm.interop.model_export import Leaving
from glasslm.interop.untrusted_json import (
    CONFIG,
    WEIGHTS,
    read_json,
    read_shapes,
    read_weights,
    weight_files,
)
from glasslm.model.parameters import parameter_table

Array = NDArray[Any]

TOLERANCE = 1e-5  # of logits in float32, as a share of the largest


@dataclass(frozen=True)
class Arriving:
    """A model from elsewhere: `weights` by the table's names."""

    model_type: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Array]


def write(leaving: Leaving, out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into the folder `out`, which is made.

    Raises InputError where no architecture of transformers computes what this model does, or `out` is not empty.
    """
    family = families.of(leaving.config)
    require_empty(out)
    contents = vocabulary.files(leaving.tokenizer, leaving.config.block_size)
    end = vocabulary.end_of_text(leaving.tokenizer)
    end_id = end.id if end else None
    values = (
        family.to_config(leaving.config, leaving.vocab_size)
        | {
            "bos_token_id": end_id,  # null for most: else transformers would take 1 and 2, which are characters here
            "eos_token_id": end_id,
            "pad_token_id": None,
            "dtype": "float32",
        }
    )
    weights = {name: np.ascontiguousarray(array) for name, array in
               family.to_weights(leaving.config, leaving.weights).items()}  # fmt: skip
    contents[CONFIG] = files.json_bytes(values)
    contents["generation_config.json"] = files.json_bytes(
        {"do_sample": True, "temperature": 0.8, "bos_token_id": end_id, "eos_token_id": end_id}
    )
    contents[WEIGHTS] = safetensors.numpy.save(weights, {"format": "pt"})
    files.make_folder(out)
    for name, content in contents.items():
        files.write_atomic(out / name, content)


def require_empty(out: Path) -> None:
    """Raises InputError unless `out` is a new or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already: choose a new folder with --out")


def logits(folder: Path, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> (B, T, V), as transformers computes them from the files in `folder`, in float32.

    Raises InputError where transformers or PyTorch is not installed.
    """
    return logits_of(loaded(folder, use_safetensors=True), tokens)


def loaded(folder: Path, **options: Any) -> Any:
    """The model that transformers makes of the files in `folder`, without a progress bar and without code of others."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise InputError("transformers is not installed: pip install 'glasslm[interop]'") from None
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **options
        )


def logits_of(model: Any, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> (B, T, V), by a model of PyTorch."""
    import torch

    with torch.no_grad():
        found: Array = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    return found


def read(folder: Path) -> Arriving:
    """The model in a folder: its own, or another's of the same families.

    Raises InputError for what glasslm cannot compute, and DamagedError for files that are not what they seem.
    """
    values = read_json(folder / CONFIG)
    family = families.named(values)
    try:
        config = family.from_config(values)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    vocab_size = values.whole("vocab_size")
    rows, paths = parameter_table(config, vocab_size), weight_files(folder)
    # First arrays without a size take the way of the weights: nothing is read before names and shapes are right.
    there = {
        name: np.broadcast_to(np.float32(0), shape) for name, shape in read_shapes(paths).items()
    }
    rehearsed = family.from_weights(config, there, list(rows))
    if there:
        raise InputError(
            f"{folder} has the weight {min(there)[:100]}, which glasslm has no place for"
        )
    for name, row in rows.items():
        if rehearsed[name].shape != row.shape:
            raise DamagedError(
                f"the weight {name} of {folder} has shape {rehearsed[name].shape}, where {CONFIG} asks for {row.shape}"
            )
    weights = family.from_weights(config, dict(read_weights(paths)), list(rows))
    tokenizer = vocabulary.from_file(folder, vocab_size)
    return Arriving(values.word("model_type"), config.resolved(), tokenizer, weights)
