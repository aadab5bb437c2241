"""A model folder of transformers without remote code: write it, compare logits, read it back."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm import files
from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import DamagedError, InputError, raise_if_exhausted
from glasslm.interop import families, hf_tokenizer
from glasslm.interop.hf_special_tokens import (
    GENERATION_FILE,
    TokenSettings,
    read_settings,
    role_ids,
)
from glasslm.interop.hf_weights import (
    WEIGHTS_FILE,
    canonical_names,
    read_shapes,
    read_weights,
    weight_files,
    wrapper_prefix,
)
from glasslm.interop.model_export import ModelExport, compute_logits, largest_difference
from glasslm.interop.untrusted_json import CONFIG_FILE, read_values
from glasslm.model.parameters import parameter_table
from glasslm.runs.tensor_file import safetensors_chunks
from glasslm.text import Notify, format_bytes, notify, to_one_line
from glasslm.training.memory import free_memory_bytes

Array = NDArray[Any]

# Of logits in float32, as a share of the largest one. Imports have more layers than exports.
TOLERANCE, IMPORT_TOLERANCE = 1e-5, 1e-4
MAX_IMPORT_PROBE_TOKENS = 256
COPIES_TO_COMPARE = 2  # of the weights, beside those that are imported: theirs, and the engine's


@dataclass(frozen=True)
class ModelImport:
    """A model from another program; `weights` are named and shaped as in the parameter table."""

    model_type: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Array]
    token_settings: TokenSettings
    prefix: str = ""  # of all names in the files: a wrapper's of PyTorch


def write(export: ModelExport, out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into the new folder `out`.

    Raises InputError where no architecture of transformers computes this model, or `out` is not
    empty.
    """
    family = families.choose_family(export.config)
    require_empty(out)
    settings = export.token_settings
    contents = hf_tokenizer.tokenizer_files(export.tokenizer, export.config.block_size, settings)
    ids: dict[str, Any] = {**role_ids(settings, hf_tokenizer.token_ids(export.tokenizer))}
    if ends := settings.get("generation_eos_ids"):
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    # The ids are written even where they are null: the defaults of transformers, 1 and 2, are
    # characters here.
    values = family.to_hf_config(export.config, export.vocab_size) | {
        **ids,
        "dtype": "float32",
    }
    weights = {name: np.ascontiguousarray(array) for name, array in
               family.to_hf_weights(export.config, export.weights).items()}  # fmt: skip
    contents[CONFIG_FILE] = files.json_bytes(values)
    generation = {"do_sample": True, "temperature": 0.8, **ids}
    contents[GENERATION_FILE] = files.json_bytes(generation)
    files.make_folder(out)
    for name, content in contents.items():
        files.write_atomic(out / name, content)
    files.write_stream(out / WEIGHTS_FILE, safetensors_chunks(weights, {"format": "pt"}))


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


def read(folder: Path, notify: Notify = notify) -> ModelImport:
    """The model in a folder that glasslm or transformers wrote.

    `notify` receives a note where names of weights are changed. Raises InputError for a model that
    glasslm cannot compute, and DamagedError for files that are not what they claim.
    """
    values = read_values(folder / CONFIG_FILE)
    family = families.find_family(values)
    try:
        config = family.from_hf_config(values)
    except InputError as error:
        if str(values.path) in str(error):
            raise
        raise InputError(f"{values.path}: {error}") from None
    vocab_size = values.integer("vocab_size")
    table, paths = parameter_table(config, vocab_size), weight_files(folder)
    # First with arrays that take no memory: weights are read only after their names and shapes are
    # checked.
    shapes = read_shapes(paths)
    tied_to = family.TOP_LEVEL["embedding.weight"] if config.tie_embeddings else None
    prefix = wrapper_prefix(shapes)
    canonical = canonical_names(shapes, prefix, tied_to, notify)
    placeholders = {
        canonical[name]: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()
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
    hf_weights = {canonical[name]: array for name, array in read_weights(paths)}
    weights = family.from_hf_weights(config, hf_weights, list(table))
    tokenizer = hf_tokenizer.read_tokenizer(folder, vocab_size)
    settings = read_settings(folder, values.values, hf_tokenizer.token_ids(tokenizer))
    end = settings.get("eos_token")
    if end and not tokenizer.special_tokens and not settings.get("split_special_tokens"):
        tokenizer = tokenizer.with_special_tokens([end])
    return ModelImport(
        values.string("model_type"), config.resolve(), tokenizer, weights, settings, prefix
    )


def compare_import(imported: ModelImport, folder: Path, notify: Notify = notify) -> None:
    """Compare the logits of an import with those of transformers from the same folder.

    A note says so where they are not compared: transformers is not installed, or the memory is too
    small for a second copy of the model. Raises InputError where the logits differ, or transformers
    cannot load the folder.
    """
    free = free_memory_bytes()
    needed = COPIES_TO_COMPARE * sum(array.nbytes for array in imported.weights.values())
    if free is not None and needed > free:
        notify(
            "note: logits not compared with transformers: that takes "
            f"{format_bytes(needed)} of memory, and {format_bytes(free)} are free"
        )
        return
    T = min(imported.config.block_size, MAX_IMPORT_PROBE_TOKENS)
    vocab_size = imported.tokenizer.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, (1, T))
    try:
        # No kernels are fetched, whatever attention the file asks for.
        mapping = {f"^{re.escape(imported.prefix)}": ""} if imported.prefix else None
        model = load_model(
            folder, use_safetensors=True, attn_implementation="eager", key_mapping=mapping
        )
        theirs = model_logits(model, tokens)
    except InputError as error:
        notify(f"note: logits not compared: {error}")
        return
    except Exception as error:  # The library raises any type for a bad config.
        raise_if_exhausted(error, folder)
        raise InputError(
            f"transformers cannot load {folder} ({to_one_line(str(error))}), so the import cannot "
            "be compared with it: repair the folder"
        ) from error
    del model
    ours = compute_logits(imported.config, vocab_size, imported.weights, tokens)
    difference = largest_difference(theirs, ours)
    if not difference <= IMPORT_TOLERANCE:
        raise InputError(
            f"the logits differ from those of transformers for {folder} (relative difference "
            f"{difference:.1e}, allowed {IMPORT_TOLERANCE:.0e}): glasslm misreads this model, and "
            "nothing was imported. Please report its config.json"
        )
