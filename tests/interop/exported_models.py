"""Models to export in which every weight matters, and a reader of their GGUF files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doubles import make_record
from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.data.tokenizers import CharTokenizer, Tokenizer
from glasslm.interop.model_export import ModelExport
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs.run_folder import Run

ALPHABET = "".join(map(chr, range(48, 48 + 37)))
SMALL = ModelConfig(d_model=32, n_layers=2, n_heads=4, block_size=24)


def small_config(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


VARIANT_FIELDS = ("norm", "norm_position", "feedforward", "position")
GPT2: dict[str, Any] = {"norm": "layernorm", "feedforward": "gelu", "position": "learned"}
MODELS = {
    "llama": small_config(),
    "llama, untied": small_config(tie_embeddings=False),
    "llama, shared keys": small_config(n_kv_heads=2),
    "llama, one key": small_config(n_kv_heads=1, d_ff=50),
    "llama, biases": small_config(bias=True),
    "llama, scaled embeddings": small_config(scale_embeddings=True),
    "llama, longer by linear": small_config(rope_scaling="linear", rope_factor=4.0),
    "llama, longer by ntk": small_config(rope_scaling="ntk", rope_factor=4.0, n_kv_heads=2),
    "llama, other numbers": small_config(rope_base=500.0, norm_eps=1e-2),
    "llama, a window as wide as the context": small_config(window=24, bias=True),
    "llama, experts": small_config(n_experts=4, experts_per_token=2, n_kv_heads=2),
    "llama, all experts": small_config(n_experts=3, experts_per_token=3, tie_embeddings=False),
    "qwen3": small_config(qk_norm=True, n_kv_heads=2),
    "qwen3, longer by linear": small_config(qk_norm=True, rope_scaling="linear", rope_factor=2.0),
    "qwen3, wide heads": small_config(
        qk_norm=True, d_model=256, n_heads=2, n_kv_heads=1, n_layers=1, d_ff=64
    ),
    "qwen3moe": small_config(qk_norm=True, n_experts=4, experts_per_token=2),
    "qwen3moe, wide experts": small_config(
        qk_norm=True, n_experts=3, experts_per_token=2, d_ff=768
    ),
    "gpt2": small_config(**GPT2),
    "gpt2, untied": small_config(**GPT2, tie_embeddings=False, bias=True),
    "gpt2, sinusoids": small_config(**GPT2 | {"position": "sinusoidal"}, d_ff=70),
    "gpt2, no positions": small_config(**GPT2 | {"position": "none"}, bias=True, norm_eps=1e-2),
    "gpt2, scaled embeddings": small_config(**GPT2, scale_embeddings=True),
    "gpt2, of its length": small_config(**GPT2, bias=True, block_size=1024),
}


def make_export(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer | None = None
) -> ModelExport:
    """A model with random weights, norms and biases too: exchanged names change its logits."""
    tokenizer = tokenizer or CharTokenizer(ALPHABET)
    rng = np.random.default_rng(3)
    weights = {
        name: (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in initial_weights(parameter_table(config, tokenizer.vocab_size), 3)
    }
    run = folder / "phi3-faust"  # llama.cpp takes a model of such a name for Phi-3
    run.mkdir(exist_ok=True)
    record = make_record(RunConfig(model=config.resolve()), tokenizer, "d" * 64)
    (run / "run.json").write_text(json.dumps({"format": 1, **record}), "utf-8")
    return ModelExport(Run(run), 7, config.resolve(), tokenizer, weights)


def value(path: Path, key: str) -> Any:
    """The value of a key of a GGUF file; None if the file lacks it."""
    import gguf

    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def llama_cpp() -> Any:
    """The module llama_cpp; the test is skipped where it is not installed."""
    return pytest.importorskip("llama_cpp", reason="llama.cpp is an extra")
