"""The parameter table: every weight of the model, named, shaped and given its initial value once, for both engines.

A name is the module path that a PyTorch reader would expect (`blocks.0.attention.q.weight`); matrices are (out, in).
How many parameters there are, what a checkpoint holds, what decays and which optimizer moves a weight all follow from
the table. Shapes: V vocabulary, D width (d_model), H heads, K key-value heads, Q head size, F inner width (d_ff).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import ModelConfig

Table = dict[str, "Row"]


@dataclass(frozen=True)
class Row:
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
        return prod(self.shape)


STD = 0.02  # GPT-2, section 2.3; matrices that write into the residual stream start at STD / sqrt(2 n_layers)


def table(config: ModelConfig, vocab_size: int) -> Table:
    """The rows of a model, in the order of the forward pass.

    >>> sum(row.size for row in table(ModelConfig(position="none", d_ff=341), 65).values())
    795392
    """
    c = config.resolved()
    rows: Table = {"embedding.weight": Row((vocab_size, c.d_model), STD)}
    if c.position == "learned":
        rows["position.weight"] = Row((c.block_size, c.d_model), STD)
    for i in range(c.n_layers):
        rows |= {f"blocks.{i}.{name}": row for name, row in _block(c).items()}
    if c.norm_position == "pre":  # in post position every block already ends in a norm
        rows |= _norm(c, "norm")
    if not c.tie_embeddings:
        rows["head.weight"] = Row((vocab_size, c.d_model), STD)
    return _with_adapters(rows, c) if c.lora_rank else rows


def _block(c: ModelConfig) -> Table:
    D, HQ, KQ = c.d_model, c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    rows = _norm(c, "attention_norm")
    for name, height in (("q", HQ), ("k", KQ), ("v", KQ)):
        rows[f"attention.{name}.weight"] = _matrix(height, D)
    if c.bias:
        rows |= {"attention.q.bias": Row((HQ,)), "attention.v.bias": Row((KQ,))}
    if c.qk_norm:
        rows |= {
            f"attention.{name}_norm.weight": Row((c.head_size,), fill=1.0) for name in ("q", "k")
        }
    rows["attention.o.weight"] = _matrix(D, HQ, _residual_std(c))
    if c.bias:
        rows["attention.o.bias"] = Row((D,))
    rows |= _norm(c, "feedforward_norm")
    if not c.n_experts:
        return rows | _feedforward(c, "feedforward")
    rows["feedforward.router.weight"] = Row((c.n_experts, D), STD, decay=True)
    for expert in range(c.n_experts):
        rows |= _feedforward(c, f"feedforward.experts.{expert}", c.experts_per_token / c.n_experts)
    return rows | _feedforward(c, "feedforward.shared") if c.shared_expert else rows


def _feedforward(c: ModelConfig, prefix: str, active: float = 1.0) -> Table:
    D, F = c.d_model, c.d_ff
    into = ("gate", "up") if c.gated else ("up",)
    rows: Table = {}
    for name in into:
        rows[f"{prefix}.{name}.weight"] = _matrix(F, D, active=active)
    if c.bias:
        rows |= {f"{prefix}.{name}.bias": Row((F,), active=active) for name in into}
    rows[f"{prefix}.down.weight"] = _matrix(D, F, _residual_std(c), active)
    if c.bias:
        rows[f"{prefix}.down.bias"] = Row((D,), active=active)
    return rows


def _matrix(height: int, width: int, std: float = STD, active: float = 1.0) -> Row:
    return Row((height, width), std, decay=True, group="muon", active=active)


def _residual_std(c: ModelConfig) -> float:
    return STD / (2 * c.n_layers) ** 0.5


def _norm(c: ModelConfig, name: str) -> Table:
    if c.norm == "none":
        return {}
    rows: Table = {f"{name}.weight": Row((c.d_model,), fill=1.0)}
    if c.norm == "layernorm" and c.bias:
        rows[f"{name}.bias"] = Row((c.d_model,))
    return rows


def _with_adapters(rows: Table, c: ModelConfig) -> Table:
    """All rows frozen, and beside each adapted matrix W (O, I) its lora_a (r, I) and lora_b (O, r).

    W x becomes W x + alpha / r B A x. B starts at zero, so that the adapted model starts as the one it adapts; A from
    the deviation of a uniform start in +-1 / sqrt(I). arXiv:2106.09685, section 4.1.
    """
    adapted: Table = {}
    for name, row in rows.items():
        adapted[name] = replace(row, trained=False)
        module, _, kind = name.rpartition(".")
        if (
            kind == "weight"
            and module.startswith("blocks.")
            and module.rpartition(".")[2] in c.adapted
        ):
            height, width = row.shape
            a = Row((c.lora_rank, width), std=(3 * width) ** -0.5, active=row.active)
            adapted |= {
                f"{module}.lora_a": a,
                f"{module}.lora_b": Row((height, c.lora_rank), active=row.active),
            }
    return adapted


def initial_weights(
    rows: Table, seed: int, dtype: DTypeLike = np.float32
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


def count(rows: Table) -> dict[str, int]:
    """How many parameters there are, five ways.

    total; non_embedding, without embeddings, positions and head; active, those that compute a token, of which a
    mixture of experts has fewer; matmul, the active ones that multiply activations, the head included; trained, those
    that are not frozen.
    """
    total = sum(row.size for row in rows.values())
    outside = sum(
        rows[n].size for n in ("embedding.weight", "position.weight", "head.weight") if n in rows
    )
    matmul = sum(row.size * row.active for name, row in rows.items() if multiplies(name, rows))
    return {
        "total": total,
        "non_embedding": total - outside,
        "active": round(sum(row.size * row.active for row in rows.values())),
        "matmul": round(matmul),
        "trained": sum(row.size for row in rows.values() if row.trained),
    }


def multiplies(name: str, rows: Table) -> bool:
    """Whether a row is a matrix that activations are multiplied by; where it is untied, the embedding is looked up."""
    if name == "position.weight" or (name == "embedding.weight" and "head.weight" in rows):
        return False
    return len(rows[name].shape) == 2
