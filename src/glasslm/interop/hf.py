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

from glasslm import files, strict_json
from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.errors import DamagedError, InputError, raise_if_exhausted
from glasslm.interop import families, hf_tokenizer
from glasslm.interop.family import Family
from glasslm.interop.hf_special_tokens import (
    GENERATION_FILE,
    TokenSettings,
    read_settings,
    role_ids,
)
from glasslm.interop.hf_weights import (
    HEAD,
    WEIGHTS_FILE,
    HFWeights,
    canonical_names,
    require_equal_head,
    weight_files,
    wrapper_prefix,
)
from glasslm.interop.model_export import ModelExport, compute_logits, largest_difference
from glasslm.interop.untrusted_json import CONFIG_FILE, read_values
from glasslm.interop.weight_names import WeightNames
from glasslm.model.parameters import parameter_table
from glasslm.runs.tensor_file import safetensors_chunks
from glasslm.text import Notify, format_bytes, notify, to_one_line
from glasslm.training.memory import free_memory_bytes, release_freed_memory

Array = NDArray[Any]

# Of logits in float32, as a share of the largest one. Imports have more layers than exports.
TOLERANCE, IMPORT_TOLERANCE = 1e-5, 1e-4
MAX_IMPORT_PROBE_TOKENS = 256
COPIES_TO_COMPARE = 2  # of the weights: theirs as a file and in memory, and then the engine's


@dataclass(frozen=True)
class ModelImport:
    """A model from another program.

    `weights` are float32, named and shaped as in the parameter table, and read when asked for.
    """

    model_type: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: LazyArrays
    token_settings: TokenSettings
    prefix: str = ""  # of all names in the files: a wrapper's of PyTorch


def write(export: ModelExport, out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into the new folder `out`.

    Raises InputError where no architecture of transformers computes this model, or `out` is not
    empty.
    """
    family = export.family
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
    contents[CONFIG_FILE] = strict_json.json_bytes(values)
    generation = {"do_sample": True, "temperature": 0.8, **ids}
    contents[GENERATION_FILE] = strict_json.json_bytes(generation)
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
    weights, prefix = _find_weights(folder, family, config.resolve(), vocab_size, notify)
    tokenizer = hf_tokenizer.read_tokenizer(folder, vocab_size)
    settings = read_settings(
        folder,
        values.values,
        hf_tokenizer.token_ids(tokenizer),
        hf_tokenizer.post_processor(tokenizer, folder),
    )
    end = settings.get("eos_token")
    if end and not tokenizer.special_tokens and not settings.get("split_special_tokens"):
        tokenizer = tokenizer.with_special_tokens([end])
    return ModelImport(
        values.string("model_type"), config.resolve(), tokenizer, weights, settings, prefix
    )


def _find_weights(
    folder: Path, family: Family, c: ModelConfig, vocab_size: int, notify: Notify
) -> tuple[LazyArrays, str]:
    """The weights of a model folder by glasslm's names, and the prefix of the names in its files.

    Names and shapes are checked before any weight is read. Raises InputError for a missing weight
    and for one that glasslm has no place for, and DamagedError for another shape.
    """
    table, names = parameter_table(c, vocab_size), family.names(c)
    tensors = HFWeights(weight_files(folder))
    prefix = wrapper_prefix(tensors)
    tied_to = names.hf_name("embedding.weight") if c.tie_embeddings else None
    canonical = canonical_names(tensors, prefix, tied_to, notify)
    tensors.rename({name: _full_name(names, new, canonical) for name, new in canonical.items()})
    places = {name: names.place(c, name) for name in table}
    for name, place in places.items():
        if place.hf_name not in tensors:
            raise InputError(
                f"the model lacks the weight {place.hf_name}, which its config.json asks for"
            )
        shape = place.take(np.broadcast_to(np.float32(0), tensors.shapes[place.hf_name])).shape
        if shape != table[name].shape:
            raise DamagedError(
                f"the weight {name} of {folder} has the shape {shape}: {CONFIG_FILE} asks for "
                f"{table[name].shape}"
            )
    unused = tensors.shapes.keys() - {place.hf_name for place in places.values()}
    head = names.hf_name("head.weight")
    if c.tie_embeddings and head in unused:
        unused -= {head}
        require_equal_head(tensors[head], tensors[places["embedding.weight"].hf_name])
    if c.position != "rope":  # softmax cancels the bias of keys
        key_biases = {names.hf_name(f"blocks.{i}.attention.k.bias") for i in range(c.n_layers)}
        unused -= key_biases
    if unused:
        raise InputError(
            f"{folder} has the weight {min(unused)[:100]}, which glasslm has no place for"
        )

    def read_weight(name: str) -> Array:
        array = places[name].take(tensors[places[name].hf_name])
        return np.ascontiguousarray(array, np.float32)

    return LazyArrays({name: row.shape for name, row in table.items()}, read_weight), prefix


def _full_name(names: WeightNames, name: str, canonical: dict[str, str]) -> str:
    """A name with the prefix of the whole model, which files of the model without its head lack.

    Newer files of GPT-NeoX call its head lm_head.
    """
    head = names.hf_name("head.weight")
    if name == HEAD and head not in canonical.values():
        return head
    base = names.top["embedding"].partition(".")[0] + "."
    is_whole = name in (head, "lm_head.bias") or any(
        other.startswith(base) for other in canonical.values()
    )
    return name if is_whole else base + name


def compare_import(imported: ModelImport, folder: Path, notify: Notify = notify) -> None:
    """Compare the logits of an import with those of transformers from the same folder.

    A note says so where they are not compared: transformers is not installed, or the memory is too
    small for a second copy of the model. Raises InputError where the logits differ, or transformers
    cannot load the folder.
    """
    free = free_memory_bytes()
    needed = COPIES_TO_COMPARE * imported.weights.nbytes
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
    release_freed_memory()  # a second copy of the weights follows
    ours = compute_logits(imported.config, vocab_size, imported.weights, tokens)
    release_freed_memory()
    difference = largest_difference(theirs, ours)
    if not difference <= IMPORT_TOLERANCE:
        raise InputError(
            f"the logits differ from those of transformers for {folder} (relative difference "
            f"{difference:.1e}, allowed {IMPORT_TOLERANCE:.0e}): glasslm misreads this model, and "
            "nothing was imported. Please report its config.json"
        )
