"""The parameter table: the name, shape and initial value of every weight, for both engines.

A name is a module path of PyTorch, such as `blocks.0.attention.q.weight`; matrices are (out, in).
The table determines the parameter counts, the entries of a checkpoint, weight decay, and the
optimizer of each weight.
Letters: V vocabulary, D width (d_model), H heads, K key-value heads, Q head size, F inner width
(d_ff), r adapter rank, O and I the output and input size of a matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterSpec:
    """One weight: a row of the table."""

    shape: tuple[int, ...]
    std: float | None = None  # of normal initial values; None: all values are `fill`
    fill: float = 0.0
    decay: bool = False  # whether weight decay applies
    group: Literal["adamw", "muon"] = "adamw"  # the optimizer of a run with --optimizer muon
    trained: bool = True  # a frozen weight has no gradient and no moments, and is in no checkpoint
    active: float = 1.0  # fraction of the tokens that it computes: below 1 for an expert

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


Specs = dict[str, ParameterSpec]


class ParameterTable(dict[str, ParameterSpec]):
    """The weights of a model by name, in the order of the forward pass, and their counts."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(spec.size for spec in self.values())

    @property
    def non_embedding(self) -> int:
        """All parameters except the embedding, learned positions and an untied head."""
        lookups = ("embedding.weight", "position.weight", "head.weight", "head.bias")
        return self.total - sum(self[name].size for name in lookups if name in self)

    @property
    def active(self) -> int:
        """The parameters that compute one token: a mixture of experts uses a part of them."""
        return round(sum(spec.size * spec.active for spec in self.values()))

    @property
    def matmul(self) -> int:
        """The active parameters that multiply activations, the head included."""
        matrices = (spec for name, spec in self.items() if self.is_multiplied(name))
        return round(sum(spec.size * spec.active for spec in matrices))

    @property
    def trained(self) -> int:
        """The parameters that are not frozen."""
        return sum(spec.size for spec in self.values() if spec.trained)

    def counts(self) -> dict[str, int]:
        """The five counts by name, as in run.json under `parameters`."""
        return {
            "total": self.total,
            "non_embedding": self.non_embedding,
            "active": self.active,
            "matmul": self.matmul,
            "trained": self.trained,
        }

    def is_multiplied(self, name: str) -> bool:
        """Whether a weight multiplies activations, as matrices do that are not only looked up."""
        if name == "position.weight" or (name == "embedding.weight" and "head.weight" in self):
            return False
        return len(self[name].shape) == 2


# The initial standard deviation. Matrices that write into the residual stream have
# INIT_STD / sqrt(2 n_layers). GPT-2, section 2.3.
INIT_STD = 0.02


def parameter_table(config: ModelConfig, vocab_size: int) -> ParameterTable:
    """The table of a model.

    >>> parameter_table(ModelConfig(position="none", d_ff=341), 65).total
    795392
    """
    c = config.resolve()
    table: Specs = {"embedding.weight": ParameterSpec((vocab_size, c.d_model), INIT_STD)}
    if c.position == "learned":
        table["position.weight"] = ParameterSpec((c.block_size, c.d_model), INIT_STD)
    block = _block(c)  # all blocks are alike
    for i in range(c.n_layers):
        table |= {f"blocks.{i}.{name}": spec for name, spec in block.items()}
    if c.has_final_norm:
        table |= _norm(c, "norm")
    if not c.tie_embeddings:
        table["head.weight"] = ParameterSpec((vocab_size, c.d_model), INIT_STD)
    if "head" in c.biased_modules:
        table["head.bias"] = ParameterSpec((vocab_size,))
    return ParameterTable(_with_adapters(table, c) if c.lora_rank else table)


def _block(c: ModelConfig) -> Specs:
    D, HQ, KQ = c.d_model, c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    specs = _norm(c, "attention_norm")
    heights = {"q": HQ, "k": KQ, "v": KQ}
    for name, height in heights.items():
        specs[f"attention.{name}.weight"] = _matrix(height, D)
    for name, height in heights.items():
        if name in c.biased_modules:
            specs[f"attention.{name}.bias"] = ParameterSpec((height,))
    if c.qk_norm:
        specs |= {
            f"attention.{name}_norm.weight": ParameterSpec((c.head_size,), fill=_unit_gain(c))
            for name in ("q", "k")
        }
    specs["attention.o.weight"] = _matrix(D, HQ, _residual_std(c))
    if "o" in c.biased_modules:
        specs["attention.o.bias"] = ParameterSpec((D,))
    if c.norm_position == "sandwich":
        specs |= _norm(c, "attention_output_norm")
    if c.residual != "parallel_one_norm":
        specs |= _norm(c, "feedforward_norm")
    specs |= _feedforward_rows(c)
    if c.norm_position == "sandwich":
        specs |= _norm(c, "feedforward_output_norm")
    return specs


def _feedforward_rows(c: ModelConfig) -> Specs:
    """The feed-forward of a block, or its experts with their router."""
    if not c.n_experts:
        return _feedforward(c, "feedforward")
    router = ParameterSpec((c.n_experts, c.d_model), INIT_STD, decay=True)
    specs: Specs = {"feedforward.router.weight": router}
    for expert in range(c.n_experts):
        specs |= _feedforward(c, f"feedforward.experts.{expert}", c.experts_per_token / c.n_experts)
    return specs | _feedforward(c, "feedforward.shared") if c.shared_expert else specs


def _feedforward(c: ModelConfig, prefix: str, active: float = 1.0) -> Specs:
    D, F = c.d_model, c.d_ff
    inputs = ("gate", "up") if c.is_gated else ("up",)
    specs: Specs = {}
    for name in inputs:
        specs[f"{prefix}.{name}.weight"] = _matrix(F, D, active=active)
    if "mlp" in c.biased_modules:
        specs |= {f"{prefix}.{name}.bias": ParameterSpec((F,), active=active) for name in inputs}
    specs[f"{prefix}.down.weight"] = _matrix(D, F, _residual_std(c), active)
    if "mlp" in c.biased_modules:
        specs[f"{prefix}.down.bias"] = ParameterSpec((D,), active=active)
    return specs


def _matrix(height: int, width: int, std: float = INIT_STD, active: float = 1.0) -> ParameterSpec:
    return ParameterSpec((height, width), std, decay=True, group="muon", active=active)


def _residual_std(c: ModelConfig) -> float:
    return INIT_STD / (2 * c.n_layers) ** 0.5


def _norm(c: ModelConfig, name: str) -> Specs:
    if c.norm == "none":
        return {}
    specs: Specs = {f"{name}.weight": ParameterSpec((c.d_model,), fill=_unit_gain(c))}
    if c.norm == "layernorm" and "norm" in c.biased_modules:
        specs[f"{name}.bias"] = ParameterSpec((c.d_model,))
    return specs


def _unit_gain(c: ModelConfig) -> float:
    """The weight of a norm whose gain is 1."""
    return 0.0 if c.norm == "rmsnorm1p" else 1.0


def _with_adapters(table: Specs, c: ModelConfig) -> Specs:
    """All weights frozen, and for each adapted matrix W (O, I) a lora_a (r, I) and a lora_b (O, r).

    W x becomes W x + alpha / r B A x. B starts at zero, so that the adapters change nothing at
    first. A has the standard deviation of uniform values in +-1 / sqrt(I). arXiv:2106.09685,
    section 4.1.
    """
    adapted: Specs = {}
    for name, spec in table.items():
        adapted[name] = replace(spec, trained=False)
        module, _, kind = name.rpartition(".")
        if (
            kind == "weight"
            and module.startswith("blocks.")
            and module.rpartition(".")[2] in c.adapted_matrices
        ):
            height, width = spec.shape
            a = ParameterSpec((c.lora_rank, width), std=(3 * width) ** -0.5, active=spec.active)
            adapted |= {
                f"{module}.lora_a": a,
                f"{module}.lora_b": ParameterSpec((height, c.lora_rank), active=spec.active),
            }
    return adapted


def initial_weights(
    table: Mapping[str, ParameterSpec], seed: int, dtype: DTypeLike = np.float32
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and initial values, in the shapes of the table, one at a time.

    Each value is drawn from its own generator, keyed by (seed, name). So two variants of a model
    have the same initial values in the weights that they share.
    """
    for name, spec in table.items():
        if spec.std is None:
            yield name, np.full(spec.shape, spec.fill, dtype)
        else:
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            draw = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
            yield name, (draw.standard_normal(spec.shape) * spec.std).astype(dtype)
