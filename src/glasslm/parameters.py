"""The parameter table: every weight of the model, named, shaped and given its initial value once, for both engines.

A name is the module path that a PyTorch reader would expect (`blocks.0.attention.q.weight`); matrices are (out, in).
How many parameters there are, what a checkpoint holds, what decays and which optimizer moves a weight all follow from
the table. Shapes: V vocabulary, D width (d_model), H heads, K key-value heads, Q head size, F inner width (d_ff).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config import ModelConfig

Table = dict[str, "Row"]


@dataclass(frozen=True)
class Row:
    """One weight. `std` is the deviation of its normal initial values; None starts at `fill` throughout."""

    shape: tuple[int, ...]
    std: float | None = None
    fill: float = 0.0
    decay: bool = False
    group: Literal["adamw", "muon"] = "adamw"

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
    return rows


def _block(c: ModelConfig) -> Table:
    D, F, HQ, KQ = c.d_model, c.d_ff, c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    residual_std = STD / (2 * c.n_layers) ** 0.5
    into = ("gate", "up") if c.gated else ("up",)

    def matrices(prefix: str, names: tuple[str, ...], shapes: tuple[tuple[int, int], ...], std: float) -> Table:
        return {
            f"{prefix}.{name}.weight": Row(shape, std, decay=True, group="muon") for name, shape in zip(names, shapes)
        }

    rows = _norm(c, "attention_norm")
    rows |= matrices("attention", ("q", "k", "v"), ((HQ, D), (KQ, D), (KQ, D)), STD)
    if c.bias:
        rows |= {"attention.q.bias": Row((HQ,)), "attention.v.bias": Row((KQ,))}
    if c.qk_norm:
        rows |= {f"attention.{name}_norm.weight": Row((c.head_size,), fill=1.0) for name in ("q", "k")}
    rows |= matrices("attention", ("o",), ((D, HQ),), residual_std)
    if c.bias:
        rows["attention.o.bias"] = Row((D,))
    rows |= _norm(c, "feedforward_norm")
    rows |= matrices("feedforward", into, ((F, D),) * len(into), STD)
    if c.bias:
        rows |= {f"feedforward.{name}.bias": Row((F,)) for name in into}
    rows |= matrices("feedforward", ("down",), ((D, F),), residual_std)
    if c.bias:
        rows["feedforward.down.bias"] = Row((D,))
    return rows


def _norm(c: ModelConfig, name: str) -> Table:
    rows: Table = {f"{name}.weight": Row((c.d_model,), fill=1.0)}
    if c.norm == "layernorm" and c.bias:
        rows[f"{name}.bias"] = Row((c.d_model,))
    return rows


def initial_weights(rows: Table, seed: int, dtype: DTypeLike = np.float32) -> Iterator[tuple[str, NDArray[Any]]]:
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
    """Parameters three ways: all; without embeddings and positions; those that multiply activations (head included)."""
    total = sum(row.size for row in rows.values())
    tables = sum(rows[name].size for name in ("embedding.weight", "position.weight") if name in rows)
    matmul = sum(row.size for name, row in rows.items() if len(row.shape) == 2 and not name.startswith("position"))
    if "head.weight" in rows:  # untied: the embedding is only looked up
        matmul -= rows["embedding.weight"].size
    head = rows["head.weight"].size if "head.weight" in rows else 0
    return {"total": total, "non_embedding": total - tables - head, "matmul": matmul}
