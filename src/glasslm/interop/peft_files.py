"""Write and read LoRA adapters as PEFT's adapter_config.json and adapter_model.safetensors.

Where a matrix of transformers is one matrix of glasslm, an adapter is the same two arrays under
other names. Some families have q, k and v in one matrix, such as GPT-2's c_attn: adapters of some
of them become one adapter of c_attn, whose A stacks their A and whose B has their B as blocks.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm import files
from glasslm.config.schema import ADAPTABLE_MATRICES, ModelConfig
from glasslm.errors import DamagedError, InputError
from glasslm.interop import hf, peft_settings
from glasslm.interop.families import choose_family
from glasslm.interop.family import Family
from glasslm.interop.hf_weights import HFWeights
from glasslm.interop.import_source import is_hub_name
from glasslm.interop.model_export import ModelExport, imported_model_type
from glasslm.interop.peft_matrices import AdaptableMatrix, adaptable_matrices
from glasslm.interop.peft_settings import SETTINGS_FILE, LoraSettings, module_names
from glasslm.interop.untrusted_json import CONFIG_FILE, read_values
from glasslm.model.adapters import without_adapters
from glasslm.model.parameters import parameter_table
from glasslm.runs.checkpoint import Checkpoint
from glasslm.runs.protection import open_run
from glasslm.runs.run_folder import Run
from glasslm.runs.tensor_file import safetensors_chunks
from glasslm.text import plural

Array = NDArray[Any]
# By the parameter table's names: blocks.0.attention.q.lora_a (r, in) and .lora_b (out, r).
Adapters = dict[str, Array]

WEIGHTS_FILE, PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"
PEFT_PREFIX = "base_model.model."  # PEFT's name for the model that it wraps


def write(run: Run, checkpoint: Checkpoint, out: Path, base: str | None) -> None:
    """Write the adapters of a run's checkpoint into the new folder `out`, as PEFT reads them.

    `base` is the model that the adapters belong to, which `base_export` gives. The files name it
    only if it is a name on the Hub: a folder of this machine could be somebody's name there.
    Raises InputError where the run has no adapters, has adapters that PEFT has no place for, or its
    model has no architecture in transformers.
    """
    c = run.config.model
    if not c.lora_rank:
        raise InputError(
            f"{run.path} has no adapters: fine-tune with `glasslm finetune {run.path} --text-file "
            "PATH --lora-rank 8`, or export the whole model with --to hf"
        )
    plain = without_adapters(c).resolve()
    family = choose_family(plain, _base_model_type(run, base))
    matrices = adaptable_matrices(plain, family)
    _require_adaptable(run, matrices)
    hf.require_empty(out)
    hub_name = base if base and is_hub_name(base) else None
    weights = checkpoint.weights()
    arrays: dict[str, Array] = {}
    part_counts: dict[str, int] = {}
    for path, matrix in matrices.items():
        words = c.adapted_matrices
        if adapted := [module for module in matrix.modules if _last_word(module) in words]:
            a, b = _stack_adapters(weights, matrix, adapted)
            arrays |= {
                f"{PEFT_PREFIX}{path}.lora_A.weight": a,
                f"{PEFT_PREFIX}{path}.lora_B.weight": b,
            }
            part_counts[matrix.target] = len(adapted)
    files.make_folder(out)
    files.write_stream(out / WEIGHTS_FILE, safetensors_chunks(arrays, {"format": "pt"}))
    files.write_atomic(out / "README.md", _adapter_card(c, checkpoint.step, hub_name).encode())
    files.write_json(out / SETTINGS_FILE, _adapter_config(c, family, part_counts, hub_name))


def _require_adaptable(run: Run, matrices: dict[str, AdaptableMatrix]) -> None:
    """Raise InputError where PEFT has no place for an adapter of the run."""
    c = run.config.model
    places = {_last_word(module) for matrix in matrices.values() for module in matrix.modules}
    outside = [word for word in c.adapted_matrices if word not in places]
    if not outside:
        return
    allowed = ",".join(word for word in ADAPTABLE_MATRICES if word in places)
    if c.n_experts:
        raise InputError(
            f"the adapters of {run.path} are inside experts ({','.join(outside)}), which "
            f"transformers stores as one array: fine-tune with --lora-targets {allowed}, or export "
            "with --to hf"
        )
    raise InputError(
        f"the adapters of {run.path} are on matrices that transformers does not have "
        f"({','.join(outside)}): fine-tune with --lora-targets {allowed}, or export with --to hf"
    )


def base_export(run: Run, checkpoint: Checkpoint) -> ModelExport:
    """The frozen model that the adapters of a run belong to, for hf.write."""
    frozen = {
        name: array.astype(np.float32, copy=False)
        for name, array in checkpoint.weights().items()
        if ".lora_" not in name
    }
    step = run.record.get("base", {}).get("step", 0)
    config = without_adapters(run.config.model).resolve()
    settings = run.record["tokenizer"].get("transformers")
    model_type = _base_model_type(run, None)
    return ModelExport(run, step, config, run.tokenizer, frozen, settings, model_type)


def _base_model_type(run: Run, base: str | None) -> str:
    """The model type in transformers of the model that the adapters of a run belong to.

    That is the type of the folder `base`, or the one that the run's base was imported as; empty
    where there is none.
    """
    if base and Path(base, CONFIG_FILE).is_file():
        return read_values(Path(base, CONFIG_FILE)).string("model_type", "")
    source = run.record.get("base")
    if source is None:
        return ""
    try:
        return imported_model_type(open_run(source["run"]))
    except (InputError, DamagedError):  # the folder was moved, deleted or changed
        return ""


def _stack_adapters(
    weights: dict[str, Array], matrix: AdaptableMatrix, adapted: list[str]
) -> tuple[Array, Array]:
    """A (R, in) and B (out, R) of one adapter for a matrix, of whose modules some are `adapted`.

    R is the sum of the ranks of the adapted modules; B has a block for each and zeros elsewhere.
    """
    a = np.concatenate([weights[f"{module}.lora_a"] for module in adapted]).astype(
        np.float32, copy=False
    )
    rank = len(a) // len(adapted)
    b = np.zeros((matrix.height, len(a)), np.float32)
    for module, rows in zip(matrix.modules, matrix.rows):
        if module in adapted:
            start = adapted.index(module) * rank
            b[rows, start : start + rank] = weights[f"{module}.lora_b"]
    return a, b


def _adapter_config(
    c: ModelConfig, family: Family, part_counts: dict[str, int], base: str | None
) -> dict[str, Any]:
    """The values of adapter_config.json.

    `part_counts` has the number of adapted modules in each target module.
    """
    alpha = int(c.lora_alpha) if c.lora_alpha.is_integer() else c.lora_alpha
    stacked = {target: count for target, count in part_counts.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(part_counts),
        "r": c.lora_rank,
        "lora_alpha": alpha,
        "rank_pattern": {target: count * c.lora_rank for target, count in stacked.items()},
        "alpha_pattern": {target: count * alpha for target, count in stacked.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(family.names(c).transposed),  # GPT-2's matrices are (in, out)
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _adapter_card(c: ModelConfig, step: int, base: str | None) -> str:
    """README.md of a folder of adapters."""
    front_matter = f"base_model: {json.dumps(base)}\n" if base else ""
    return f"""---
{front_matter}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- glasslm
---

# LoRA adapters

Rank {c.lora_rank}, alpha {c.lora_alpha:g}, on the matrices {", ".join(c.adapted_matrices)} of \
every layer, trained with glasslm for {plural(step, "step")}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(base or "the folder of the base model")})
model = PeftModel.from_pretrained(base, "the folder of this file")
```
"""


def _last_word(name: str) -> str:
    return name.rpartition(".")[2]


# -- reading ---------------------------------------------------------------------------------------


def read(folder: Path, config: ModelConfig, model_type: str = "") -> tuple[ModelConfig, Adapters]:
    """The adapters in a folder of PEFT: `config` with its lora_* fields, and the arrays.

    `model_type` is that of the base in transformers, where it was imported. Dropout of the adapters
    is ignored. Raises InputError for adapters that glasslm does not have, and DamagedError for
    files that are not what they claim.
    """
    c = without_adapters(config).resolve()
    adaptable = adaptable_matrices(c, choose_family(c, model_type))
    settings = peft_settings.read(folder)
    matrices = {
        path: matrix for path, matrix in adaptable.items() if module_names(path) & settings.targets
    }
    patterns = settings.ranks.keys() | settings.alphas.keys()
    if not matrices or not patterns <= set().union(*map(module_names, matrices)):
        names = ", ".join(sorted({matrix.target for matrix in adaptable.values()}))
        raise InputError(
            f"{folder / SETTINGS_FILE} names matrices that this model does not have: expected some "
            f"of {names}"
        )
    settings.require_one_scale(matrices)
    arrays = _read_arrays(folder, c, matrices, settings)
    adapters = _split_adapters(c, matrices, arrays)
    ranks = {len(array) for name, array in adapters.items() if name.endswith(".lora_a")}
    if len(ranks) > 1:
        raise InputError(
            f"the adapters have the ranks {sorted(ranks)}: expected one rank, because glasslm has "
            "one lora_rank"
        )
    rank, adapted = ranks.pop(), {name.split(".")[3] for name in adapters}
    adapted_config = dataclasses.replace(
        config,
        lora_rank=rank,
        lora_alpha=settings.alpha_for_rank(rank),
        lora_targets=",".join(word for word in ADAPTABLE_MATRICES if word in adapted),
    )
    return adapted_config, adapters


def _read_arrays(
    folder: Path, c: ModelConfig, matrices: dict[str, AdaptableMatrix], settings: LoraSettings
) -> dict[str, tuple[Array, Array]]:
    """A (R, in) and B (out, R) of each matrix.

    Names and shapes are checked before an array is read.
    """
    path, table = folder / WEIGHTS_FILE, parameter_table(c, 1)
    expected: dict[str, tuple[int, ...]] = {}
    for name, matrix in matrices.items():
        width, rank = table[f"{matrix.modules[0]}.weight"].shape[1], settings.rank(name)
        expected |= {
            f"{PEFT_PREFIX}{name}.lora_A.weight": (rank, width),
            f"{PEFT_PREFIX}{name}.lora_B.weight": (matrix.height, rank),
        }
    file_shapes = _read_adapter_shapes(path)
    if unexpected := sorted(file_shapes.keys() - expected.keys()):
        raise InputError(
            f"{path} holds {unexpected[0][:150]!r}: expected adapters of matrices that "
            f"target_modules names and glasslm adapts ({', '.join(ADAPTABLE_MATRICES)})"
        )
    for name, shape in expected.items():
        if name not in file_shapes:
            raise DamagedError(
                f"{path} lacks {name}, which target_modules asks for: expected adapters in every "
                "layer, or in none"
            )
        if file_shapes[name] != shape:
            raise DamagedError(
                f"{path} holds {name} in the shape {file_shapes[name]}: expected {shape}"
            )
    arrays = dict(HFWeights([path]).items())
    return {
        matrix: (
            arrays[f"{PEFT_PREFIX}{matrix}.lora_A.weight"],
            arrays[f"{PEFT_PREFIX}{matrix}.lora_B.weight"],
        )
        for matrix in matrices
    }


def _read_adapter_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in a safetensors file, by name, from its header."""
    if not path.is_file():
        if (path.parent / PICKLE_FILE).exists():
            raise InputError(
                f"{path.parent} has its adapters as {PICKLE_FILE}, which runs code when it is "
                "read: save them again with PEFT, which writes safetensors"
            )
        raise InputError(
            f"{path.parent} holds no {WEIGHTS_FILE}: expected a folder as save_pretrained of PEFT "
            "writes it"
        )
    return HFWeights([path]).shapes


def _split_adapters(
    c: ModelConfig, matrices: dict[str, AdaptableMatrix], arrays: dict[str, tuple[Array, Array]]
) -> Adapters:
    """The adapters by glasslm's names, from A (R, in) and B (out, R) of each matrix.

    Raises InputError where layers have different adapters.
    """
    layers: dict[str, list[str]] = {}
    for path, matrix in matrices.items():
        layers.setdefault(matrix.target, []).append(path)
    adapters = {}
    for target, paths in layers.items():
        pairs = [arrays[path] for path in paths]
        if len(paths) != c.n_layers or len({a.shape for a, _ in pairs}) > 1:
            raise InputError(
                f"the adapters of {target} differ between layers: expected the same shapes in all "
                f"{c.n_layers} layers"
            )
        blocks = [matrices[path].split_rows(b) for path, (_, b) in zip(paths, pairs)]
        used = np.any([np.stack([rows.any(axis=0) for rows in layer]) for layer in blocks], axis=0)
        for part, columns in _part_columns(used).items():
            for path, (a, _), layer in zip(paths, pairs, blocks):
                module = matrices[path].modules[part]
                adapters[f"{module}.lora_a"] = np.ascontiguousarray(a[columns])
                adapters[f"{module}.lora_b"] = np.ascontiguousarray(layer[part][:, columns])
    return adapters


def _part_columns(used: NDArray[np.bool_]) -> dict[int, slice]:
    """The columns of B that belong to each part of a matrix.

    `used` (parts, R) says which columns a part uses. Where `_stack_adapters` wrote B, each adapted
    part has a block of its own. In any other B every part has all columns.
    """
    adapted = [int(part) for part in np.flatnonzero(used.any(axis=1))]
    width, rest = divmod(used.shape[1], max(1, len(adapted)))
    blocks = {part: slice(i * width, (i + 1) * width) for i, part in enumerate(adapted)}
    outside = used.copy()
    for part, columns in blocks.items():
        outside[part, columns] = False
    if adapted and not rest and not outside.any():
        return blocks
    return {part: slice(None) for part in range(len(used))}


# -- logits by PEFT --------------------------------------------------------------------------------


def logits(base: Path, adapter: Path, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> logits (B, T, V) in float32, computed by PEFT from two folders.

    Raises InputError where PEFT, transformers or PyTorch is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError("peft is not installed: pip install 'glasslm[interop]'") from None
    model = hf.load_model(base, use_safetensors=True)
    with (
        warnings.catch_warnings()
    ):  # peft 0.21 reads an attribute that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    return hf.model_logits(adapted, tokens)
