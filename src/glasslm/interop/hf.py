"""A model folder of transformers without remote code: write it, compare logits, read it back."""

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
from glasslm.interop import families, hf_tokenizer
from glasslm.interop.model_export import ModelExport
from glasslm.interop.untrusted_json import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_json,
    read_shapes,
    read_weights,
    weight_files,
)
from glasslm.model.parameters import parameter_table

Array = NDArray[Any]

TOLERANCE = 1e-5  # of logits in float32, as a share of the largest one


@dataclass(frozen=True)
class ModelImport:
    """A model from another program; `weights` are named and shaped as in the parameter table."""

    model_type: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Array]


def write(export: ModelExport, out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into the new folder `out`.

    Raises InputError where no architecture of transformers computes this model, or `out` is not
    empty.
    """
    family = families.choose_family(export.config)
    require_empty(out)
    contents = hf_tokenizer.tokenizer_files(export.tokenizer, export.config.block_size)
    end = hf_tokenizer.end_of_text(export.tokenizer)
    end_id = end.id if end else None
    # The ids are written even where they are null: the defaults of transformers, 1 and 2, are
    # characters here.
    values = family.to_hf_config(export.config, export.vocab_size) | {
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": None,
        "dtype": "float32",
    }
    weights = {name: np.ascontiguousarray(array) for name, array in
               family.to_hf_weights(export.config, export.weights).items()}  # fmt: skip
    contents[CONFIG_FILE] = files.json_bytes(values)
    contents["generation_config.json"] = files.json_bytes(
        {"do_sample": True, "temperature": 0.8, "bos_token_id": end_id, "eos_token_id": end_id}
    )
    contents[WEIGHTS_FILE] = safetensors.numpy.save(weights, {"format": "pt"})
    files.make_folder(out)
    for name, content in contents.items():
        files.write_atomic(out / name, content)


def require_empty(out: Path) -> None:
    """Raise InputError unless `out` is a new or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists already: choose a new folder with --out")


def logits(folder: Path, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> logits (B, T, V) in float32, computed by transformers from `folder`.

    Raises InputError where transformers or PyTorch is not installed.
    """
    return model_logits(load_model(folder, use_safetensors=True), tokens)


def load_model(folder: Path, **options: Any) -> Any:
    """The model in `folder`, loaded by transformers without remote code and without a progress bar.

    Raises InputError where transformers or PyTorch is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise InputError("transformers is not installed: pip install 'glasslm[interop]'") from None
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **options
        )


def model_logits(model: Any, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> logits (B, T, V), computed by a PyTorch model."""
    import torch

    with torch.no_grad():
        result: Array = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    return result


def read(folder: Path) -> ModelImport:
    """The model in a folder that glasslm or transformers wrote.

    Raises InputError for a model that glasslm cannot compute, and DamagedError for files that are
    not what they claim.
    """
    values = read_json(folder / CONFIG_FILE)
    family = families.find_family(values)
    try:
        config = family.from_hf_config(values)
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from None
    vocab_size = values.integer("vocab_size")
    table, paths = parameter_table(config, vocab_size), weight_files(folder)
    # First with arrays that take no memory: weights are read only after their names and shapes are
    # checked.
    placeholders = {
        name: np.broadcast_to(np.float32(0), shape) for name, shape in read_shapes(paths).items()
    }
    shaped = family.from_hf_weights(config, placeholders, list(table))
    if placeholders:
        raise InputError(
            f"{folder} has the weight {min(placeholders)[:100]}, which glasslm has no place for"
        )
    for name, row in table.items():
        if shaped[name].shape != row.shape:
            raise DamagedError(
                f"the weight {name} of {folder} has the shape {shaped[name].shape}: {CONFIG_FILE} "
                f"asks for {row.shape}"
            )
    weights = family.from_hf_weights(config, dict(read_weights(paths)), list(table))
    tokenizer = hf_tokenizer.read_tokenizer(folder, vocab_size)
    return ModelImport(values.string("model_type"), config.resolve(), tokenizer, weights)
