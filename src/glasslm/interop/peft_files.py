"""Adapters as PEFT's files, both ways: adapter_config.json and adapter_model.safetensors, for a model of transformers.

Where a matrix there is one of ours, an adapter is the same two arrays under other names. GPT-2 keeps q, k and v in one
matrix, c_attn: adapters of some of them are one adapter of it, whose A stacks theirs and whose B has theirs as blocks.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from glasslm import files
from glasslm.config.schema import ADAPTABLE, ModelConfig
from glasslm.errors import DamagedError, InputError
from glasslm.interop import families, gpt2, hf, llama, peft_settings
from glasslm.interop.model_export import Leaving
from glasslm.interop.peft_settings import SETTINGS, Settings, names_of
from glasslm.interop.untrusted_json import read_shapes, read_weights
from glasslm.model.adapters import without_adapters
from glasslm.model.parameters import parameter_table
from glasslm.runs.checkpoint import Checkpoint
from glasslm.runs.run_folder import Run

Array = NDArray[Any]
Adapters = dict[
    str, Array
]  # by the table's names: blocks.0.attention.q.lora_a (r, in) and .lora_b (out, r)

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model."  # PEFT's name for the model that it wraps


def write(run: Run, held: Checkpoint, out: Path, base: str) -> None:
    """Write the adapters of a run at a checkpoint into the folder `out`, which is made, for PeftModel.from_pretrained.

    `base` is where the model that they stand beside is, a path or a name on the hub; `base_of` is that model. Raises
    InputError where the run has no adapters, has them on experts, or is of no architecture of transformers.
    """
    c = run.config.model
    if not c.lora_rank:
        raise InputError(
            f"{run.path} has no adapters: fine-tune with `glasslm finetune {run.path} --text-file PATH --lora-rank 8`, "
            "or export the whole model with --to hf"
        )
    places = _places(without_adapters(c).resolved())
    if c.n_experts and (inside := [word for word in c.adapted_matrices if word in ("gate", "up", "down")]):
        raise InputError(
            f"the adapters of {run.path} are inside experts ({','.join(inside)}), which transformers holds as one "
            "array and PEFT adapts in another form: fine-tune with --lora-targets q,k,v,o, or export with --to hf"
        )
    hf.require_empty(out)
    weights = held.weights()
    arrays: dict[str, Array] = {}
    parts: dict[str, int] = {}
    for path, modules in places.items():
        if adapted := [module for module in modules if module.rpartition(".")[2] in c.adapted_matrices]:
            a, b = _stacked(weights, modules, adapted)
            arrays |= {f"{ROOT}{path}.lora_A.weight": a, f"{ROOT}{path}.lora_B.weight": b}
            parts[_target(path)] = len(adapted)
    files.make_folder(out)
    files.write_atomic(out / WEIGHTS, safetensors.numpy.save(arrays, {"format": "pt"}))
    files.write_atomic(out / "README.md", _card(c, held.step, base).encode("utf-8"))
    files.write_json(out / SETTINGS, _settings_of(c, parts, base))


def base_of(run: Run, held: Checkpoint) -> Leaving:
    """The model that the adapters of a run stand beside, as hf.write takes it."""
    frozen = {name: array.astype(np.float32, copy=False) for name, array in held.weights().items()
              if ".lora_" not in name}  # fmt: skip
    step = run.record.get("base", {}).get("step", 0)
    return Leaving(run, step, without_adapters(run.config.model).resolved(), run.tokenizer, frozen)


def _stacked(
    weights: dict[str, Array], modules: tuple[str, ...], adapted: list[str]
) -> tuple[Array, Array]:
    """A (R, in) and B (out, R) that do to a matrix made of `modules` what the adapters of some of them do to those."""
    a = np.concatenate([weights[f"{module}.lora_a"] for module in adapted]).astype(
        np.float32, copy=False
    )
    rank, blocks = len(a) // len(adapted), []
    for module in modules:
        block = np.zeros((len(weights[f"{module}.weight"]), len(a)), np.float32)
        if module in adapted:
            start = adapted.index(module) * rank
            block[:, start : start + rank] = weights[f"{module}.lora_b"]
        blocks.append(block)
    return a, np.concatenate(blocks)


def _settings_of(c: ModelConfig, parts: dict[str, int], base: str) -> dict[str, Any]:
    """adapter_config.json. `parts` is how many of our matrices are adapted in each of theirs."""
    alpha = int(c.lora_alpha) if c.lora_alpha.is_integer() else c.lora_alpha
    several = {target: count for target, count in parts.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(parts),
        "r": c.lora_rank,
        "lora_alpha": alpha,
        "rank_pattern": {target: count * c.lora_rank for target, count in several.items()},
        "alpha_pattern": {target: count * alpha for target, count in several.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": "gpt2"
        in families.of(c).MODEL_TYPES,  # which has its matrices as (in, out)
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _card(c: ModelConfig, step: int, base: str) -> str:
    shown = json.dumps(
        base, ensure_ascii=False
    )  # which YAML and Python read alike, and which stays in its line
    return f"""---
base_model: {shown}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- glasslm
---

# LoRA adapters

Of rank {c.lora_rank} with alpha {c.lora_alpha:g}, for the matrices {", ".join(c.adapted_matrices)} of every layer, after \
{step:,} training steps with glasslm.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({shown})
model = PeftModel.from_pretrained(base, "the folder of this file")
```
"""


# -- where adapters stand ---------------------------------------------------------------------------------------------

GPT2_STACK = "attn.c_attn"  # q, k and v, one above the other as (out, in)


def _places(c: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The matrices there that may have adapters, by their paths, and which modules of ours lie in each.

    Raises InputError for a model that transformers does not know.
    """
    kinds = families.of(c).MODEL_TYPES
    words = [f"attention.{word}" for word in "qkvo"]
    if not c.n_experts:
        words += [
            f"feedforward.{word}" for word in ("gate", "up", "down") if c.gated or word != "gate"
        ]
    found: dict[str, tuple[str, ...]] = {}
    for i in range(c.n_layers):
        for word in words:
            if "gpt2" in kinds:
                path = f"transformer.h.{i}.{gpt2.LINEARS.get(word, GPT2_STACK)}"
            else:
                path = f"model.layers.{i}.{llama.MODULES[word]}"
            found[path] = (*found.get(path, ()), f"blocks.{i}.{word}")
    return found


def _target(path: str) -> str:
    """How target_modules names a matrix of every layer: the last word, or two of GPT-2's, which has c_proj twice."""
    return path.split(".", 3)[3] if path.startswith("transformer.") else path.rpartition(".")[2]


# -- reading ----------------------------------------------------------------------------------------------------------


def read(folder: Path, config: ModelConfig) -> tuple[ModelConfig, Adapters]:
    """The adapters in a folder that PEFT or glasslm wrote, for a model of this config: it with lora_*, and the arrays.

    Their dropout is ignored. Raises InputError for what glasslm has no adapters for, and DamagedError for files that
    are not what they seem.
    """
    c = without_adapters(config).resolved()
    known = _places(c)
    asked = peft_settings.read(folder)
    places = {path: ours for path, ours in known.items() if names_of(path) & asked.targets}
    if not places or not asked.ranks.keys() | asked.alphas.keys() <= set().union(
        *map(names_of, places)
    ):
        names = ", ".join(sorted({_target(path) for path in known}))
        raise InputError(
            f"{folder / SETTINGS} names matrices that this model has not: expected some of {names}"
        )
    asked.require_one_scale(places)
    arrays = _arrays(folder, c, places, asked)
    adapters = _apart(c, places, arrays)
    ranks = {len(array) for name, array in adapters.items() if name.endswith(".lora_a")}
    if len(ranks) > 1:
        raise InputError(
            f"the adapters have the ranks {sorted(ranks)}: expected one, because lora_rank is for all here"
        )
    rank, words = ranks.pop(), {name.split(".")[3] for name in adapters}
    alpha, targets = asked.alpha_at(rank), ",".join(word for word in ADAPTABLE if word in words)
    return dataclasses.replace(
        config, lora_rank=rank, lora_alpha=alpha, lora_targets=targets
    ), adapters


def _arrays(
    folder: Path, c: ModelConfig, places: dict[str, tuple[str, ...]], asked: Settings
) -> dict[str, tuple[Array, Array]]:
    """A (R, in) and B (out, R) of each place. Names and shapes are compared before any array is read."""
    path, rows = folder / WEIGHTS, parameter_table(c, 1)
    expected: dict[str, tuple[int, ...]] = {}
    for place, modules in places.items():
        shapes = [rows[f"{module}.weight"].shape for module in modules]
        rank, height = asked.rank_of(place), sum(shape[0] for shape in shapes)
        expected |= {
            f"{ROOT}{place}.lora_A.weight": (rank, shapes[0][1]),
            f"{ROOT}{place}.lora_B.weight": (height, rank),
        }
    found = _shapes(path)
    if strange := sorted(found.keys() - expected.keys()):
        raise InputError(
            f"{path} holds {strange[0][:150]!r}, which is no adapter of a matrix that target_modules names, or of one "
            f"that glasslm adapts ({', '.join(ADAPTABLE)})"
        )
    for name, shape in expected.items():
        if name not in found:
            raise DamagedError(
                f"{path} lacks {name}, which target_modules asks for: every layer has adapters, or none"
            )
        if found[name] != shape:
            raise DamagedError(f"{path} holds {name} in the shape {found[name]}: expected {shape}")
    arrays = dict(read_weights([path]))
    return {
        place: (arrays[f"{ROOT}{place}.lora_A.weight"], arrays[f"{ROOT}{place}.lora_B.weight"])
        for place in places
    }


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The arrays of a safetensors file, by name, from its header."""
    if not path.is_file():
        if (path.parent / PICKLE).exists():
            raise InputError(
                f"{path.parent} has its adapters as {PICKLE}, which runs code when it is read: save them again with "
                "PEFT, which writes safetensors"
            )
        raise InputError(
            f"{path.parent} holds no {WEIGHTS}: expected a folder as save_pretrained of PEFT writes it"
        )
    return read_shapes([path])


def _apart(
    c: ModelConfig, places: dict[str, tuple[str, ...]], arrays: dict[str, tuple[Array, Array]]
) -> Adapters:
    """By our names. Raises InputError where the layers are not alike."""
    layers: dict[str, list[str]] = {}
    for path in places:
        layers.setdefault(_target(path), []).append(path)
    adapters = {}
    for target, paths in layers.items():
        pairs = [arrays[path] for path in paths]
        if len(paths) != c.n_layers or len({a.shape for a, _ in pairs}) > 1:
            raise InputError(
                f"the adapters of {target} differ from layer to layer, or not every layer has one"
            )
        parts = len(places[paths[0]])
        used = np.any(
            [np.stack([rows.any(axis=0) for rows in np.split(b, parts)]) for _, b in pairs], axis=0
        )
        for part, columns in _columns(used).items():
            for path, (a, b) in zip(paths, pairs):
                module = places[path][part]
                adapters[f"{module}.lora_a"] = np.ascontiguousarray(a[columns])
                adapters[f"{module}.lora_b"] = np.ascontiguousarray(
                    np.split(b, parts)[part][:, columns]
                )
    return adapters


def _columns(used: NDArray[np.bool_]) -> dict[int, slice]:
    """For each part of a matrix the columns of B that are its own, from whether (parts, R) it uses a column.

    As we stack adapters, each adapted part has a block of them. In any other B every part has all.
    """
    taken = [int(part) for part in np.flatnonzero(used.any(axis=1))]
    width, rest = divmod(used.shape[1], max(1, len(taken)))
    blocks = {part: slice(i * width, (i + 1) * width) for i, part in enumerate(taken)}
    outside = used.copy()
    for part, columns in blocks.items():
        outside[part, columns] = False
    if taken and not rest and not outside.any():
        return blocks
    return {part: slice(None) for part in range(len(used))}


# -- the library's own answer -----------------------------------------------------------------------------------------


def logits(base: Path, adapter: Path, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> (B, T, V), as PEFT and transformers compute them from two folders, in float32."""
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError("peft is not installed: pip install 'glasslm[interop]'") from None
    model = hf.loaded(base, use_safetensors=True)
    with (
        warnings.catch_warnings()
    ):  # peft 0.21 looks at a name that transformers 5.23 would like to lose
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    return hf.logits_of(adapted, tokens)
