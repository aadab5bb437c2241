"""Why a token is likely: the direct contribution of each part of the model to its logit.

With norms before the sublayers the last stream is a sum: the embedding, what each head writes, what
each feed-forward writes, and biases. The last norm divides the stream by one number; with that
number held, the logit is linear in the stream, and each part has its share of it. A direct
contribution is not the whole effect of a part, because later parts read what it writes.

Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
Letters: P parts, C candidates, T positions, H heads, Q head size, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import RunConfig
from glasslm.errors import InputError
from glasslm.inference.microscope.recorded_pass import RecordedPass
from glasslm.model.adapters import effective_matrix

Array = NDArray[Any]
Weights = Mapping[str, Array]

MAX_RELATIVE_GAP = 1e-3  # between the sum of the parts and the logit; more is a fault


class Contributions(NamedTuple):
    """The shares of each part in the logits of candidates, at one position."""

    parts: list[str]  # P: embedding, 0.0 (layer.head), 0.feedforward, 0.bias, norm.bias, head.bias
    shares: NDArray[np.float64]  # (P, C), whose sum over the parts is `logits`
    logits: NDArray[np.float64]  # (C,) as the model computed them


def require_additive(config: RunConfig) -> None:
    """Raise InputError where the last stream is no sum of recorded parts."""
    position = config.model.norm_position
    if position == "post":
        raise InputError(
            "a norm follows each sum (--norm-position post), so the stream is no sum of what the "
            "parts write"
        )
    if position != "pre":
        raise InputError(
            f"a norm is applied to what each sublayer adds (--norm-position {position}), and its "
            "output is not divided among the heads"
        )
    if config.model.logit_softcap:
        raise InputError(
            "the logits are limited by a tanh (--logit-softcap), so they are no sum of what the "
            "parts add"
        )
    if config.operations.ops:
        raise InputError(
            f"operations of {config.operations.ops} compute this model: what they do to a sum is "
            "not known"
        )


def contributions(
    recorded: RecordedPass, weights: Weights, t: int, candidates: NDArray[np.int64]
) -> Contributions:
    """The contributions to the logits of `candidates` (C,) after position t.

    `weights` are those of the model by name. Raises InputError where the model has no additive
    parts, or where the parts do not add up to the logits.
    """
    require_additive(recorded.model.config)
    parts = written_parts(recorded, weights, t)
    vectors = np.stack(list(parts.values()))
    directions, constant = logit_directions(recorded, weights, t, candidates)
    shares = vectors @ directions.T
    names = list(parts)
    if constant.any():
        names, shares = [*names, "norm.bias"], np.vstack([shares, constant])
    if (bias := weights.get("head.bias")) is not None:
        names, shares = [*names, "head.bias"], np.vstack([shares, bias[candidates]])
    logits = recorded["logits"][t, candidates].astype(np.float64)
    _require_sum(shares, logits)
    return Contributions(names, shares, logits)


def _require_sum(shares: Array, logits: Array) -> None:
    gap = np.abs(shares.sum(0) - logits).max()
    if not gap <= MAX_RELATIVE_GAP * max(1.0, np.abs(shares).sum(0).max()):
        raise InputError(
            f"the parts differ from the logits by {gap:.2g}: this model computes something that is "
            "not a sum of its parts"
        )


def written_parts(recorded: RecordedPass, weights: Weights, t: int) -> dict[str, Array]:
    """What each part writes into the stream at position t: (D,) by name, in float64."""
    parts = {"embedding": recorded["embedding"][t].astype(np.float64)}
    for layer in range(recorded.config.n_layers):
        block = f"blocks.{layer}"
        outputs = head_outputs(recorded, weights, layer, recorded[f"{block}.attention.heads"][t])
        parts |= {f"{layer}.{head}": output for head, output in enumerate(outputs)}
        bias = weights.get(f"{block}.attention.o.bias")
        if bias is not None:
            parts[f"{layer}.bias"] = bias.astype(np.float64)
        parts[f"{layer}.feedforward"] = recorded[f"{block}.feedforward"][t].astype(np.float64)
    return parts


def head_outputs(recorded: RecordedPass, weights: Weights, layer: int, heads: Array) -> Array:
    """What the heads of a layer write, (H, D), from their means of values `heads` (H, Q)."""
    o = output_matrix(recorded, weights, layer)
    by_head = o.reshape(len(o), *heads.shape)  # (D, H, Q)
    return np.einsum("hq,dhq->hd", heads.astype(np.float64), by_head)


def output_matrix(recorded: RecordedPass, weights: Weights, layer: int) -> Array:
    """(D, H Q): the output matrix of attention, with its adapter, in float64."""
    return effective_matrix(weights, f"blocks.{layer}.attention.o", recorded.config)


def logit_directions(
    recorded: RecordedPass, weights: Weights, t: int, candidates: NDArray[np.int64]
) -> tuple[Array, Array]:
    """(C, D), (C,): logit = direction . stream + constant, with the scale of the last norm held."""
    c = recorded.config
    head = weights["embedding.weight" if c.tie_embeddings else "head.weight"]
    rows = head[candidates].astype(np.float64)
    stream = recorded[f"blocks.{c.n_layers - 1}"][t].astype(np.float64)
    if c.norm == "none":
        return rows, np.zeros(len(rows))
    bias = weights.get("norm.bias")
    constant = np.zeros(len(rows)) if bias is None else rows @ bias.astype(np.float64)
    rows = rows * norm_gain(recorded, weights, "norm")
    if c.norm == "layernorm":
        stream = stream - stream.mean()
        rows = rows - rows.mean(-1, keepdims=True)  # the mean of each part is taken away, too
    scale = 1 / np.sqrt((stream**2).mean() + c.norm_eps)
    return rows * scale, constant


def contributions_by_source(
    recorded: RecordedPass,
    weights: Weights,
    t: int,
    layer: int,
    head: int,
    candidates: NDArray[np.int64],
) -> NDArray[np.float64]:
    """(C, T): the contribution of a head, divided among the positions whose values it read.

    The sum over the positions is the head's contribution: values are mixed linearly. Raises
    InputError as `contributions` does.
    """
    require_additive(recorded.model.config)
    directions, _ = logit_directions(recorded, weights, t, candidates)
    o = output_matrix(recorded, weights, layer)
    H = recorded.config.n_heads
    Q = o.shape[1] // H
    read = directions @ o[:, head * Q : (head + 1) * Q]  # (C, Q)
    values = head_values(recorded, weights, layer, head)  # (T, Q)
    attended = recorded.weights(layer)[head, t].astype(np.float64)
    shares: NDArray[np.float64] = (read @ values.T) * attended
    mixed = recorded[f"blocks.{layer}.attention.heads"][t, head].astype(np.float64)
    _require_sum(shares.T, read @ mixed)
    return shares


def head_values(recorded: RecordedPass, weights: Weights, layer: int, head: int) -> Array:
    """(T, Q): the values that a head reads, from the norm of the stream before its block."""
    c, name = recorded.config, f"blocks.{layer}.attention"
    stream = recorded[f"blocks.{layer - 1}" if layer else "embedding"].astype(np.float64)
    x = apply_norm(recorded, weights, f"blocks.{layer}.attention_norm", stream)
    values = x @ effective_matrix(weights, f"{name}.v", c).T
    bias = weights.get(f"{name}.v.bias")
    if bias is not None:
        values = values + bias.astype(np.float64)
    kv_heads = c.n_kv_heads or c.n_heads
    group = head // (c.n_heads // kv_heads)
    by_head: Array = values.reshape(len(values), kv_heads, -1)[:, group]
    return by_head


def apply_norm(recorded: RecordedPass, weights: Weights, name: str, x: Array) -> Array:
    """x (T, D) -> (T, D): the norm `name` of the model, in float64."""
    c = recorded.config
    if c.norm == "none":
        return x
    if c.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
    y = y * norm_gain(recorded, weights, name)
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(np.float64)


def norm_gain(recorded: RecordedPass, weights: Weights, name: str) -> Array:
    """(D,): the gain of the norm `name`, in float64."""
    weight: Array = weights[f"{name}.weight"].astype(np.float64)
    return 1 + weight if recorded.config.norm == "rmsnorm1p" else weight
