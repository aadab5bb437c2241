"""Small runs with random adapters, and changes of their PEFT files."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from doubles import make_record
from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.factory import make_engine
from glasslm.interop import peft_settings
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint import Checkpoint, TrainingPosition
from glasslm.runs.run_folder import Run

Array = np.ndarray[Any, Any]

TOKENIZER = CharTokenizer("".join(map(chr, range(48, 48 + 37))))
SMALL = ModelConfig(d_model=32, n_layers=2, n_heads=4, block_size=24, lora_rank=3, lora_alpha=7.5)
GPT2: dict[str, Any] = {"norm": "layernorm", "feedforward": "gelu", "position": "learned"}
ROPE: dict[str, Any] = {"norm": "layernorm", "feedforward": "gelu", "tie_embeddings": False}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tie_embeddings": False, "n_kv_heads": 2, "bias": True},
    "llama scaled": {
        "scale_embeddings": True,
        "n_kv_heads": 1,
        "rope_scaling": "linear",
        "rope_factor": 2.0,
    },
    "mistral": {"window": 5, "n_kv_heads": 2},
    "mixtral": {"n_experts": 3},
    "qwen3": {"qk_norm": True, "n_kv_heads": 2},
    "gpt2": GPT2 | {"bias": True},
    "gpt2 untied": GPT2 | {"tie_embeddings": False, "position": "sinusoidal"},
    "gpt_neo": GPT2 | {"attention_scale": 1.0, "window": 5, "attention_pattern": "fw"},
    "opt": GPT2 | {"feedforward": "relu", "norm_position": "post"},
    "gpt_neox": ROPE | {"residual": "parallel", "partial_rotary_factor": 0.5},
    "phi": ROPE | {"residual": "parallel_one_norm", "bias_targets": "norm,q,k,v,o,mlp,head"},
    "starcoder2": ROPE | {"n_kv_heads": 2},
    "stablelm": {"norm": "layernorm", "n_kv_heads": 2},
    "phi3": {"partial_rotary_factor": 0.5, "n_kv_heads": 2},
    "gemma2": {
        "norm": "rmsnorm1p", "norm_position": "sandwich", "feedforward": "geglu",
        "scale_embeddings": True,
    },
}  # fmt: skip


def make_config(kind: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **KINDS[kind] | changes)


def random_weights(config: ModelConfig, seed: int = 1) -> dict[str, Array]:
    """Random weights and adapters; the array of a name depends on that name and the seed alone."""
    weights = {}
    for name, array in initial_weights(parameter_table(config, TOKENIZER.vocab_size), seed):
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(
            array.shape
        )
        weights[name] = (array + 0.1 * noise).astype(np.float32)
    return weights


def make_run(
    folder: Path, config: ModelConfig, weights: dict[str, Array], **record: Any
) -> tuple[Run, Checkpoint]:
    """A run with these weights; `record` holds further keys of its run.json."""
    whole = RunConfig(model=config).resolve()
    run_folder.create_run(
        folder, {**make_record(whole, TOKENIZER, ""), **record}, TOKENIZER.to_json()
    )
    run = Run(folder)
    if config.lora_rank:
        checkpoint.save_base(
            folder, {name: array for name, array in weights.items() if ".lora_" not in name}
        )
    engine = make_engine(
        whole, TOKENIZER.vocab_size, ComputeConfig(engine="numpy", threads=1), training=True
    )
    engine.load(weights.items())
    checkpoint.save(folder, engine.state(), TrainingPosition(5, 5, 0, 0), run.identity)
    return run, checkpoint.load(folder, "best")


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / peft_settings.SETTINGS_FILE
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")
