"""Compares the paths of attention: every position with every mask, sharing of heads and engine.

Each path of an engine computes positions and masks by itself: plain attention, flash attention, the
KV cache, and fused kernels. A gradient check cannot find a path that leaves one out, because the
gradient of such a path is right. So the losses and gradients of each path are compared with those
of NumPy's plain attention. A position or window that changes no loss is reported, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import (
    AttentionName,
    ModelConfig,
    OptimizerConfig,
    Position,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.engines.resources import is_torch_installed
from glasslm.lab.checks import parity
from glasslm.lab.checks.parity import LocatedError
from glasslm.lab.short_training import mean_weight
from glasslm.model.parameters import initial_weights, parameter_table

Array = NDArray[Any]

HEADS = 4
KV_HEADS = (4, 2, 1)  # a key-value head for each head, for two (GQA), for all (MQA)
WINDOWS = (0, 3)  # 0: the causal mask
MIN_EFFECT = 1e-6  # nats of the largest change of a loss, in float64, by a position or a window
B, T, V = 2, 11, 13  # rows, positions, vocabulary: T is prime and less than the context


@dataclass(frozen=True)
class PathResult:
    """The largest difference of any path from NumPy's plain attention, for one model."""

    case: str
    paths: int
    error: float  # relative to the largest entry of its tensor
    where: str
    missing_effect: str = ""  # the setting that changes no loss

    @property
    def passed(self) -> bool:
        return self.error <= parity.TOLERANCE["fp64"] and not self.missing_effect


def check_attention_paths(seed: int = 0) -> Iterator[PathResult]:
    """Compare all paths for each position, window and number of key-value heads, in float64."""
    for kv_heads in KV_HEADS:
        losses: dict[tuple[Position, int], Array] = {}
        for position in sorted(get_args(Position), key=lambda name: name != "none"):
            for window in WINDOWS:
                config = ModelConfig(
                    d_model=16, n_layers=2, n_heads=HEADS, n_kv_heads=kv_heads, d_ff=12,
                    block_size=T + 1, position=position, window=window, attention="plain",
                )  # fmt: skip
                case = f"{position}, {kv_heads} key-value heads, {config.mask} mask"
                result, losses[position, window] = _compare_paths(case, config, seed)
                missing = _missing_effect(losses, position, window)
                yield dataclasses.replace(result, missing_effect=missing)


def _missing_effect(
    losses: dict[tuple[Position, int], Array], position: Position, window: int
) -> str:
    """The setting that leaves the losses (B, T) of all tokens as they are without it, or ""."""
    without = {f"--position {position}": ("none", window), f"--window {window}": (position, 0)}
    for setting, other in without.items():
        change = np.abs(losses[position, window] - losses[other]).max()
        if other != (position, window) and not change > MIN_EFFECT:
            return setting
    return ""


def _compare_paths(case: str, config: ModelConfig, seed: int) -> tuple[PathResult, Array]:
    """The comparison of all paths for a model, and the losses (B, T) of plain attention."""
    rng = np.random.default_rng(seed)  # the same tokens in every case
    tokens, targets = rng.integers(0, V, (2, B, T))
    batch = Batch(tokens, targets, step=0, rows=np.arange(B))
    (_, reference), *others = engines = list(_make_engines(config, seed))
    losses = reference.losses(tokens, targets)
    gradients = reference.gradients(batch, mean_weight(batch))
    scale, paths = np.abs(losses).max(), 0
    errors: list[LocatedError] = []
    for name, engine in others:
        error = parity.max_relative_error(engine.losses(tokens, targets), losses, scale)
        errors.append(LocatedError(error, f"losses of {name}"))
        errors += [
            LocatedError(error, f"{where}, {name}")
            for error, where in parity.tensor_errors(
                engine.gradients(batch, mean_weight(batch)), gradients
            )
        ]
        paths += 1
    for name, engine in engines:
        for use, logits in parity.cached_logits(engine, tokens).items():
            rows, positions = logits.shape[:2]
            nats = parity.cross_entropies(logits, targets[:rows, -positions:])
            error = parity.max_relative_error(nats, losses[:rows, -positions:], scale)
            errors.append(LocatedError(error, f"cache of {name}: {use}"))
            paths += 1
    worst = parity.largest_error(errors)
    return PathResult(case, paths, worst.error, worst.where), losses


def _make_engines(config: ModelConfig, seed: int) -> Iterator[tuple[str, Any]]:
    """The engines of each algorithm of attention, NumPy's plain one first, with equal weights."""
    table = parameter_table(config.resolve(), V)
    weights = [  # the same in every case, wherever models share a weight
        (name, w + 0.3 * np.random.default_rng([seed, *name.encode()]).standard_normal(w.shape))
        for name, w in initial_weights(table, seed)
    ]
    names = sorted(get_args(AttentionName), key=lambda name: name != "plain")
    for engine_name in ("NumPy", "PyTorch") if is_torch_installed() else ("NumPy",):
        for attention in names:
            run = RunConfig(
                dataclasses.replace(config, attention=attention),
                optimizer=OptimizerConfig(),
                train=TrainConfig(batch_size=B, micro_batch_size=B),
            ).resolve()
            engine = _make_engine(engine_name, run)
            engine.load(iter(weights))
            yield f"{engine_name} {attention}", engine


def _make_engine(name: str, run: RunConfig) -> Any:
    if name == "NumPy":
        return NumpyEngine(run, V, threads=1, dtype=np.float64)
    from glasslm.engines.torch.engine import TorchEngine

    return TorchEngine(run, V, device="cpu", precision="fp64", threads=1)
