"""GPT-2 in transformers: LayerNorm, no gate, positions that are added to the embeddings.

transformers stores GPT-2's linear layers as (in, out), the transpose of glasslm's, with q, k and v
side by side in one. Sinusoidal positions, and none, are written as learned positions with these
values. The bias of the keys is dropped: it adds the same number to all scores of a query, and
softmax ignores that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import FeedForward, ModelConfig
from glasslm.engines.positions import sinusoids
from glasslm.interop.config_keys import known_values
from glasslm.interop.family import Family
from glasslm.interop.support import ATTENTION, Support
from glasslm.interop.untrusted_json import Values, require_supported
from glasslm.interop.weight_names import QKV, WeightNames
from glasslm.model.parameters import INIT_STD

Array = NDArray[Any]

ACTIVATION_FUNCTIONS: dict[str, str] = {
    "gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
# Activations of a config.json that glasslm computes, by their names in transformers.
ACTIVATIONS: dict[str, FeedForward] = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu",
    "relu2": "relu2",
}  # fmt: skip
BIASES = ATTENTION - {"k"} | {"norm", "mlp"}
BIAS_SLOTS = frozenset(
    {*QKV, "attention.o", "attention_norm", "feedforward_norm", "norm", "feedforward.up",
     "feedforward.down"}
)  # fmt: skip


def read_activation(values: Values, key: str, default: str) -> FeedForward:
    """The feed-forward without a gate that a config.json names.

    Raises InputError for an activation that glasslm does not have.
    """
    activation = values.string(key, default)
    require_supported(activation in ACTIVATIONS, key, activation[:100], ", ".join(ACTIVATIONS))
    return ACTIVATIONS[activation]


def read_config(values: Values) -> ModelConfig:
    """The model that a config.json describes.

    Raises InputError for an option that glasslm does not have.
    """
    values = known_values(values)
    for name, supported in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
    ):
        value = values.boolean(name, supported)
        require_supported(value == supported, name, value, str(supported).lower())
    width = values.integer("n_embd", 768)
    return ModelConfig(
        d_model=width,
        n_layers=values.integer("n_layer", 12),
        n_heads=values.integer("n_head", 12),
        d_ff=values.integer("n_inner", 0) or 4 * width,
        block_size=values.integer("n_positions", 1024),
        dropout=values.number("resid_pdrop", 0.1),
        attention_dropout=values.number("attn_pdrop", 0.1),
        norm="layernorm",
        norm_eps=values.number("layer_norm_epsilon", 1e-5),
        feedforward=read_activation(values, "activation_function", "gelu_new"),
        position="learned",
        tie_embeddings=values.boolean("tie_word_embeddings", True),
        bias=True,
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """The values of config.json."""
    return {
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.d_ff,
        "n_positions": c.block_size,
        "activation_function": ACTIVATION_FUNCTIONS[c.feedforward],
        "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
    }


# glasslm's names -> transformers' names, of modules outside the blocks and inside them.
TOP_LEVEL = {"embedding": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head",
             "position": "transformer.wpe"}  # fmt: skip
NORMS = {"attention_norm": "ln_1", "feedforward_norm": "ln_2"}
LINEARS = {
    "attention.o": "attn.c_proj",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}
FUSED = {"attn.c_attn": QKV}


def names(c: ModelConfig) -> WeightNames:
    """The names of a model's weights."""
    return WeightNames(
        TOP_LEVEL, "transformer.h", NORMS | LINEARS, FUSED,
        transposed=frozenset({*FUSED, *LINEARS.values()}), bias_slots=BIAS_SLOTS,
    )  # fmt: skip


@dataclass(frozen=True)
class GPT2Family(Family):
    """GPT-2, whose files always have learned positions."""

    def to_hf_weights(self, c: ModelConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
        """Family.to_hf_weights, with the positions that are added to the embeddings."""
        if c.position == "learned":
            return super().to_hf_weights(c, weights)
        positions = np.zeros((c.block_size, c.d_model), np.float32)
        if c.position == "sinusoidal":
            positions = sinusoids(c.block_size, c.d_model, INIT_STD, np.float32)
        return super().to_hf_weights(c, {**weights, "position.weight": positions})


FAMILIES = (
    GPT2Family(
        "gpt2",
        "GPT2LMHeadModel",
        Support(
            norms=("layernorm",),
            feedforwards=("gelu", "gelu_exact", "relu", "relu2"),
            positions=("learned", "sinusoidal", "none"),
            biases=BIASES,
            shares_keys=False,
            has_head_dim=False,
            scaled_embeddings=(False, True),
        ),
        read_config,
        write_config,
        names,
    ),
)
