"""The parameter table: every weight of the model, named, shaped and given its initial value once, for both engines.

A name is the module path that a PyTorch reader would expect (`blocks.0.attention.q.weight`); matrices are (out, in).
How many parameters there are, what a checkpoint holds, what decays and which optimizer moves a weight all follow from
the table. Shapes: V vocabulary, D width (d_model), H heads, K key-value heads, Q head size, F inner width (d_ff).
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
    """One weight. `std` is the deviation of its normal initial values; None starts at `fill` throughout."""

    shape: tuple[int, ...]
    std: float | None = None
    fill: float = 0.0
    decay: bool = False
    group: Literal["adamw", "muon"] = "adamw"
    trained: bool = (
        True  # else it stays as it was loaded: no gradient, no moments, not in checkpoints
    )
    active: float = 1.0  # share of the tokens that it computes: experts compute some

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


Specs = dict[str, ParameterSpec]


class ParameterTable(dict[str, ParameterSpec]):
    """The weights of a model by name, in the order of the forward pass, and how many parameters they are."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(spec.size for spec in self.values())

    @property
    def non_embedding(self) -> int:
        """All but the embedding, the learned positions and the untied head."""
        lookups = ("embedding.weight", "position.weight", "head.weight")
        return self.total - sum(self[name].size for name in lookups if name in self)

    @property
    def active(self) -> int:
        """The parameters that compute one token: a mixture of experts uses some of its experts."""
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
        """The five totals by name, as run.json has them under `parameters`."""
        return {
            "total": self.total,
            "non_embedding": self.non_embedding,
            "active": self.active,
            "matmul": self.matmul,
            "trained": self.trained,
        }

    def is_multiplied(self, name: str) -> bool:
        """Whether a weight is a matrix that multiplies activations; an untied embedding is looked up."""
        if name == "position.weight" or (name == "embedding.weight" and "head.weight" in self):
            return False
        return len(self[name].shape) == 2


STD = 0.02  # GPT-2, section 2.3; matrices that write into the residual stream start at STD / sqrt(2 n_layers)


def parameter_table(config: ModelConfig, vocab_size: int) -> ParameterTable:
    """The rows of a model, in the order of the forward pass.

    >>> sum(row.size for row in parameter_table(ModelConfig(position="none", d_ff=341), 65).values())
    795392
    """
    c = config.resolved()
    rows: Specs = {"embedding.weight": ParameterSpec((vocab_size, c.d_model), STD)}
    if c.position == "learned":
        rows["position.weight"] = ParameterSpec((c.block_size, c.d_model), STD)
    for i in range(c.n_layers):
        rows |= {f"blocks.{i}.{name}": row for name, row in _block(c).items()}
    if c.norm_position == "pre":  # in post position every block already ends in a norm
        rows |= _norm(c, "norm")
    if not c.tie_embeddings:
        rows["head.weight"] = ParameterSpec((vocab_size, c.d_model), STD)
    return ParameterTable(_with_adapters(rows, c) if c.lora_rank else rows)


def _block(c: ModelConfig) -> Specs:
    D, HQ, KQ = c.d_model, c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    rows = _norm(c, "attention_norm")
    for name, height in (("q", HQ), ("k", KQ), ("v", KQ)):
        rows[f"attention.{name}.weight"] = _matrix(height, D)
    if c.bias:
        rows |= {"attention.q.bias": ParameterSpec((HQ,)), "attention.v.bias": ParameterSpec((KQ,))}
    if c.qk_norm:
        rows |= {
            f"attention.{name}_norm.weight": ParameterSpec((c.head_size,), fill=1.0) for name in ("q", "k")
        }
    rows["attention.o.weight"] = _matrix(D, HQ, _residual_std(c))
    if c.bias:
        rows["attention.o.bias"] = ParameterSpec((D,))
    rows |= _norm(c, "feedforward_norm")
    if not c.n_experts:
        return rows | _feedforward(c, "feedforward")
    rows["feedforward.router.weight"] = ParameterSpec((c.n_experts, D), STD, decay=True)
    for expert in range(c.n_experts):
        rows |= _feedforward(c, f"feedforward.experts.{expert}", c.experts_per_token / c.n_experts)
    return rows | _feedforward(c, "feedforward.shared") if c.shared_expert else rows


def _feedforward(c: ModelConfig, prefix: str, active: float = 1.0) -> Specs:
    D, F = c.d_model, c.d_ff
    into = ("gate", "up") if c.gated else ("up",)
    rows: Specs = {}
    for name in into:
        rows[f"{prefix}.{name}.weight"] = _matrix(F, D, active=active)
    if c.bias:
        rows |= {f"{prefix}.{name}.bias": ParameterSpec((F,), active=active) for name in into}
    rows[f"{prefix}.down.weight"] = _matrix(D, F, _residual_std(c), active)
    if c.bias:
        rows[f"{prefix}.down.bias"] = ParameterSpec((D,), active=active)
    return rows


def _matrix(height: int, width: int, std: float = STD, active: float = 1.0) -> ParameterSpec:
    return ParameterSpec((height, width), std, decay=True, group="muon", active=active)


def _residual_std(c: ModelConfig) -> float:
    return STD / (2 * c.n_layers) ** 0.5


def _norm(c: ModelConfig, name: str) -> Specs:
    if c.norm == "none":
        return {}
    rows: Specs = {f"{name}.weight": ParameterSpec((c.d_model,), fill=1.0)}
    if c.norm == "layernorm" and c.bias:
        rows[f"{name}.bias"] = ParameterSpec((c.d_model,))
    return rows


def _with_adapters(rows: Specs, c: ModelConfig) -> Specs:
    """All rows frozen, and beside each adapted matrix W (O, I) its lora_a (r, I) and lora_b (O, r).

    W x becomes W x + alpha / r B A x. B starts at zero, so that the adapted model starts as the one it adapts; A from
    the deviation of a uniform start in +-1 / sqrt(I). arXiv:2106.09685, section 4.1.
    """
    adapted: Specs = {}
    for name, row in rows.items():
        adapted[name] = replace(row, trained=False)
        module, _, kind = name.rpartition(".")
        if (
            kind == "weight"
            and module.startswith("blocks.")
            and module.rpartition(".")[2] in c.adapted_matrices
        ):
            height, width = row.shape
            a = ParameterSpec((c.lora_rank, width), std=(3 * width) ** -0.5, active=row.active)
            adapted |= {
                f"{module}.lora_a": a,
                f"{module}.lora_b": ParameterSpec((height, c.lora_rank), active=row.active),
            }
    return adapted


def initial_weights(
    rows: Mapping[str, ParameterSpec], seed: int, dtype: DTypeLike = np.float32
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each row's initial value, one at a time, drawn from a generator of its own.

    The generator is keyed by (seed, name): adding or removing a row moves no other, so that two variants of a model
    start from the same values wherever they share a weight.
    """
    for name, row in rows.items():
        if row.std is None:
            yield name, np.full(row.shape, row.fill, dtype)
        else:
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            draw = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
            yield name, (draw.standard_normal(row.shape) * row.std).astype(dtype)
