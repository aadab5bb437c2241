"""Measures a model's signals, gradients, attention, logits and units by `Engine.inspect`.

Letters: L layers, H heads, B rows, T positions, F inner width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.inspection import GRADIENT_PREFIX, feedforward_names, forward_names
from glasslm.engines.protocol import Batch, Engine
from glasslm.model.parameters import ParameterTable

Array = NDArray[Any]


@dataclass(frozen=True)
class Measurement:
    """The measured values of a model on one batch, small enough to keep for each checkpoint."""

    step: int
    loss: float  # nats per token
    # The loss if the logit of the token just read were the mean of the logits at its position
    loss_without_copy: float
    stream_rms: Array  # (L + 1,) of the residual stream before the first block and after each block
    added_rms: Array  # (L, 2) of the outputs of attention and feed-forward, before a norm after it
    stream_gradient: Array  # (L + 1,) L2 norm of the gradient at the same places of the stream
    gradient_norms: dict[str, float]  # L2 norm of the gradient of each trained weight
    entropy: Array  # (L, H) of attention, divided by the entropy of uniform attention
    max_score: Array  # (L, H) the largest attention logit
    logit_mean: float
    logit_std: float
    logit_max: float  # the largest magnitude
    log_z: float  # mean over positions of the logarithm of the softmax's sum


def measure_model(
    engine: Engine, batch: Batch, c: ModelConfig, table: ParameterTable, step: int
) -> Measurement:
    """The measurement of the engine's weights on a batch: one forward and one backward pass."""
    blocks = [f"blocks.{i}" for i in range(c.n_layers)]
    streams = ["embedding", *blocks]
    weights = [name for name, row in table.items() if row.trained]
    names = [name for name in forward_names(c) if not name.endswith("preactivation")]
    gradients = [GRADIENT_PREFIX + name for name in (*streams, *weights)]
    arrays = engine.inspect(batch, [*names, *gradients])
    attention = [
        _attention_statistics(
            arrays[f"{block}.attention.scores"], arrays[f"{block}.attention.weights"]
        )
        for block in blocks
    ]
    logits = np.asarray(arrays["logits"], np.float64)
    without_copy = logits.copy()
    np.put_along_axis(without_copy, batch.tokens[..., None], logits.mean(-1, keepdims=True), -1)
    return Measurement(
        step=step,
        loss=_mean_loss(logits, batch.targets),
        loss_without_copy=_mean_loss(without_copy, batch.targets),
        stream_rms=np.array([rms(arrays[name]) for name in streams]),
        added_rms=np.array(
            [
                [rms(arrays[f"{block}.{part}"]) for part in ("attention", "feedforward")]
                for block in blocks
            ]
        ),
        stream_gradient=np.array([l2_norm(arrays[GRADIENT_PREFIX + name]) for name in streams]),
        gradient_norms={name: l2_norm(arrays[GRADIENT_PREFIX + name]) for name in weights},
        entropy=np.array([shares for shares, _ in attention]),
        max_score=np.array([score for _, score in attention]),
        logit_mean=float(logits.mean()),
        logit_std=float((logits - logits.mean(-1, keepdims=True)).std()),
        logit_max=float(np.abs(logits).max()),
        log_z=float(np.logaddexp.reduce(logits, -1).mean()),
    )


def _mean_loss(logits: Array, targets: Array) -> float:
    """logits (B, T, V), targets (B, T) -> nats per target."""
    hit = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return float((np.logaddexp.reduce(logits, -1) - hit)[targets >= 0].mean())


def _attention_statistics(scores: Array, weights: Array) -> tuple[Array, Array]:
    """The mean relative entropy (H,) and the largest score (H,) of each head.

    scores and weights (B, H, T, T); the entropy is a share of the largest possible one.
    """
    visible = np.isfinite(scores).sum(-1)
    share = entropy(weights) / np.log(np.maximum(visible, 2))
    several = (visible > 1).sum((0, 2))
    return (share * (visible > 1)).sum((0, 2)) / np.maximum(several, 1), scores.max((0, 2, 3))


def rms(x: Array) -> float:
    """The root mean square of an array of any shape, in float64."""
    return math.sqrt(float(np.square(x, dtype=np.float64).mean()))


def l2_norm(*arrays: Array) -> float:
    """The L2 norm of all arrays, of any shapes, together, in float64."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))


def entropy(p: Array) -> NDArray[np.float64]:
    """Entropy in nats of the distributions p (..., n): (...)."""
    p = np.asarray(p, np.float64)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


def block_gradient_norms(measurement: Measurement, c: ModelConfig) -> Array:
    """(L,) the L2 norm of the gradient of each block's weights."""
    norms = measurement.gradient_norms.items()
    return np.array(
        [
            math.sqrt(sum(g * g for name, g in norms if name.startswith(f"blocks.{i}.")))
            for i in range(c.n_layers)
        ]
    )


@dataclass(frozen=True)
class UnitStatistics:
    """Statistics over a text of the preactivations of the F units of a feed-forward or expert."""

    highest: Array  # (F,)
    std: Array  # (F,)
    scale: float  # rms over all units

    def dead_share(self, threshold: float) -> float:
        """The share of units whose preactivation never exceeds the threshold."""
        return float((self.highest <= threshold).mean())

    @property
    def constant_share(self) -> float:
        """The share of units whose preactivation is the same for every token."""
        return float((self.std <= 1e-3 * self.scale).mean())


def opening_threshold(feedforward: str) -> float:
    """The preactivation below which a unit is dead: 0 for ReLU, -3 for smooth activations."""
    return 0.0 if feedforward in ("relu", "relu2") else -3.0


def measure_units(
    engine: Engine, batches: Iterable[Batch], c: ModelConfig
) -> tuple[dict[str, UnitStatistics], int]:
    """The unit statistics of every feed-forward or expert by name, and the number of tokens.

    It stops when every unit has exceeded its threshold once, because further batches add nothing.
    """
    mlps = [mlp for i in range(c.n_layers) for mlp in feedforward_names(c, i)]
    names = [f"{mlp}.preactivation" for mlp in mlps]
    threshold = opening_threshold(c.feedforward)
    # By feed-forward: maximum (F,), count (1,), sum (F,), sum of squares (F,)
    sums: dict[str, list[Array]] = {}
    tokens = 0
    for batch in batches:
        tokens += batch.tokens.size
        for mlp, x in zip(mlps, engine.inspect(batch, names).values()):
            x = x.reshape(-1, x.shape[-1])
            if not len(x):
                continue
            highest, *further = (
                x.max(0),
                np.full(1, float(len(x))),
                x.sum(0, dtype=np.float64),
                np.square(x, dtype=np.float64).sum(0),
            )
            if mlp in sums:
                highest = np.maximum(sums[mlp][0], highest)
                further = [a + b for a, b in zip(sums[mlp][1:], further)]
            sums[mlp] = [highest, *further]
        if all((highest > threshold).all() for highest, *_ in sums.values()):
            break
    units = {}
    for mlp, (highest, count, total, squares) in sums.items():
        variance = np.maximum(squares / count - (total / count) ** 2, 0.0)
        scale = math.sqrt(float((squares / count).mean()))
        units[mlp] = UnitStatistics(highest, np.sqrt(variance), scale)
    return units, tokens
