"""What is foretold before a run starts: FLOPs against a count by hand, memory against what tracemalloc sees."""

import gc
import tracemalloc
from typing import Any

import numpy as np
import pytest

from glasslm.config import ComputeConfig, ModelConfig, RunConfig, with_flags
from glasslm.engines import Batch, make_engine
from glasslm.engines.numpy.engine import micro_batch_size
from glasslm.estimate import flops_per_token, memory_bytes
from glasslm.parameters import initial_weights, table
from glasslm.presets import PRESETS

V = 65


def test_flops_by_hand() -> None:
    """A block multiplies by 4 D² + 3 D F weights, the head by V D; scores and mixtures take 2 D each a position."""
    D, F, T, L = 128, 352, 128, 4
    weights = L * (4 * D * D + 3 * D * F) + V * D
    forward = 2 * weights + L * 2 * (2 * D * T)
    assert flops_per_token(ModelConfig(), V) == 3 * forward


def test_grouped_queries_save_their_projections_and_no_scores() -> None:
    saved = flops_per_token(ModelConfig(), V) - flops_per_token(ModelConfig(n_kv_heads=1), V)
    assert saved == 6 * 4 * 2 * 128 * 96  # layers x (k and v) x D x the rows that went


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "wide, AdamW, GELU, dropout, untied, two threads": {
        "d_model": 192, "n_layers": 2, "n_heads": 6, "block_size": 64, "dropout": 0.1, "attention_dropout": 0.1,
        "feedforward": "gelu", "position": "learned", "norm": "layernorm", "tie_embeddings": False, "bias": True,
        "optimizer": "adamw", "threads": 2,
    },
    "long, grouped, post, qk-norm, SGD": {
        "d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 1, "block_size": 256, "batch_size": 8,
        "norm_position": "post", "qk_norm": True, "position": "alibi", "optimizer": "sgd",
    },
    "large vocabulary": {"d_model": 64, "n_layers": 1, "block_size": 64, "batch_size": 32, "vocab": 2000},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_peak_memory_is_what_was_foretold(name: str) -> None:
    flags = dict(SHAPES[name])
    threads, vocab = flags.pop("threads", 1), flags.pop("vocab", V)
    config = with_flags(PRESETS["tiny"](), flags).resolved()
    peak = peak_of_three_steps(config, vocab, threads)
    rows = micro_batch_size(config)
    assert 0.4 <= peak / memory_bytes(config, vocab, rows, threads) <= 1.5


def peak_of_three_steps(config: RunConfig, vocab: int, threads: int) -> int:
    draw = np.random.default_rng(0)
    shape = (config.train.batch_size, config.model.block_size)
    tokens = draw.integers(0, vocab, shape)
    gc.collect()
    tracemalloc.start()
    try:
        engine = make_engine(config, vocab, ComputeConfig(engine="numpy", threads=threads))
        engine.load(initial_weights(table(config.model, vocab), 0))
        for step in range(3):
            batch = Batch(tokens, np.roll(tokens, -1, 1), step, np.arange(len(tokens)))
            engine.accumulate(batch, 1 / tokens.size)
            engine.update(1e-3)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
