"""Compares the paths of attention: every position with every mask, sharing of heads and engine.

Each path of an engine computes positions and masks by itself: plain attention, flash attention, the
KV cache, and fused kernels. A gradient check cannot find a path that leaves one out, because the
gradient of such a path is right. So the losses and gradients of each path are compared with those
of NumPy's plain attention. A position or window that changes no loss is reported, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
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
from glasslm.engines.numpy import attention, flash, key_blocks
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
# Queries and keys of a tile, and keys of a block of the cache. With the engine's own sizes, T would
# be a single tile, and no path would join two.
TILE = 4
END_ID = 1  # the token that ends a document, in the middle of each row
# Further settings that change what a query attends to
VARIANTS: dict[str, dict[str, Any]] = {
    "--document-attention": {"document_attention": True, "document_end_id": END_ID},
    "--attention-pattern wf": {"attention_pattern": "wf", "window": 3},
    "--attention-softcap 0.5": {"attention_softcap": 0.5},
}
VARIANT_POSITIONS: tuple[Position, ...] = ("rope", "alibi")


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
    """Compare all paths for each position, window and number of key-value heads, in float64.

    Documents, patterns of layers and soft caps follow, with the positions of VARIANT_POSITIONS.
    """
    losses: dict[ModelConfig, Array] = {}
    for case, config, without in _list_cases():
        with _small_tiles():
            result, losses[config] = _compare_paths(case, config, seed)
        missing = (
            setting
            for setting, other in without.items()
            if not np.abs(losses[config] - losses[other]).max() > MIN_EFFECT
        )
        yield dataclasses.replace(result, missing_effect=next(missing, ""))


def _list_cases() -> Iterator[tuple[str, ModelConfig, dict[str, ModelConfig]]]:
    """The name and config of each model, and the models before it that lack one of its settings."""
    for kv_heads in KV_HEADS:
        for position in sorted(get_args(Position), key=lambda name: name != "none"):
            for window in WINDOWS:
                config = _make_config(kv_heads, position, window)
                without = {
                    f"--position {position}": _make_config(kv_heads, "none", window),
                    f"--window {window}": _make_config(kv_heads, position, 0),
                }
                case = f"{position}, {kv_heads} key-value heads, {config.mask} mask"
                yield case, config, {k: other for k, other in without.items() if other != config}
    for setting, fields in VARIANTS.items():
        for position in VARIANT_POSITIONS:
            other = _make_config(KV_HEADS[-1], position, fields.get("window", 0))
            config = dataclasses.replace(other, **fields)
            yield f"{position}, {setting}", config, {setting: other}


def _make_config(kv_heads: int, position: Position, window: int) -> ModelConfig:
    return ModelConfig(
        d_model=16, n_layers=2, n_heads=HEADS, n_kv_heads=kv_heads, d_ff=12, block_size=T + 1,
        position=position, window=window, attention="plain",
    )  # fmt: skip


@contextmanager
def _small_tiles() -> Iterator[None]:
    """A context in which attention of the NumPy engine has tiles that T positions cross."""
    sizes = attention.TILE_QUERIES, flash.TILE_LENGTH, key_blocks.KEY_BLOCK
    attention.TILE_QUERIES = flash.TILE_LENGTH = key_blocks.KEY_BLOCK = TILE
    try:
        yield
    finally:
        attention.TILE_QUERIES, flash.TILE_LENGTH, key_blocks.KEY_BLOCK = sizes


def _compare_paths(case: str, config: ModelConfig, seed: int) -> tuple[PathResult, Array]:
    """The comparison of all paths for a model, and the losses (B, T) of plain attention."""
    rng = np.random.default_rng(seed)  # the same tokens in every case
    tokens, targets = rng.integers(0, V, (2, B, T))
    tokens[:, T // 2] = END_ID
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
    if config.attention_softcap:
        names.remove("flash")  # it has no soft cap
    for engine_name in ("NumPy", "PyTorch") if is_torch_installed() else ("NumPy",):
        for name in names:
            run = RunConfig(
                dataclasses.replace(config, attention=name),
                optimizer=OptimizerConfig(),
                train=TrainConfig(batch_size=B, micro_batch_size=B),
            ).resolve()
            engine = _make_engine(engine_name, run)
            engine.load(iter(weights))
            yield f"{engine_name} {name}", engine


def _make_engine(name: str, run: RunConfig) -> Any:
    if name == "NumPy":
        return NumpyEngine(run, V, threads=1, dtype=np.float64)
    from glasslm.engines.torch.engine import TorchEngine

    return TorchEngine(run, V, device="cpu", precision="fp64", threads=1)
