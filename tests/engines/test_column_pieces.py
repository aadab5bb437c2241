"""Products by pieces of columns: their results, their bits and their copies of the weights."""

from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import ModelConfig, RunConfig, TrainConfig
from glasslm.engines.numpy import engine as engine_module
from glasslm.engines.numpy.column_pieces import ColumnPieces
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.model.parameters import initial_weights

Array = np.ndarray[Any, Any]
V, ROWS = 11, 32
MODEL = ModelConfig(d_model=40, n_layers=2, n_heads=2, d_ff=72, block_size=8)
TOKENS = np.random.default_rng(0).integers(0, V, (3, ROWS, 1))


def build_engine(threads: int = 1, dtype: Any = np.float64) -> NumpyEngine:
    run = RunConfig(model=MODEL, train=TrainConfig(micro_batch_size=4)).resolve()
    engine = NumpyEngine(run, V, threads, dtype)
    engine.load(initial_weights(engine.table, 0))
    return engine


def read_single_tokens(engine: NumpyEngine, rows: int, active: list[int]) -> Array:
    """The logits of the rows `active` of a cache, after three tokens read one by one."""
    cache, counts = engine.new_cache(rows, 8), np.zeros(rows, np.int64)
    counts[active] = 1
    for tokens in TOKENS:
        logits = engine.logits(tokens[:rows], cache, counts)
    return logits[active]


@pytest.mark.parametrize(
    "shape", [(192, 48), (65, 30), (40, 2), (9, 70), (64, 1100), (20, 2000), (33, 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pieces_give_the_product(shape: tuple[int, int], dtype: Any) -> None:
    rng, pieces = np.random.default_rng(0), ColumnPieces()
    w = rng.standard_normal(shape).astype(dtype)
    for rows in (2, 5):
        x = rng.standard_normal((rows, shape[1])).astype(dtype)
        y = pieces.product(x, w)
        assert y.dtype == dtype
        assert y.flags.c_contiguous
        bound = 8 * np.finfo(dtype).eps * (np.abs(x) @ np.abs(w.T)).max()
        np.testing.assert_allclose(y, x.astype(np.float64) @ w.T, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_beside_any_number_of_rows(threads: int, dtype: Any) -> None:
    """With every kernel of BLAS: the size of a tile is the engine's."""
    engine = build_engine(threads, dtype)
    alone = read_single_tokens(engine, ROWS, [5])
    for active in ([4, 5], [5, 30], [1, *range(3, 12)], list(range(ROWS))):
        logits = read_single_tokens(engine, ROWS, active)
        np.testing.assert_array_equal(logits[active.index(5)], alone[0])
    tile = engine.row_tile
    tokens = TOKENS[:, 5 // tile * tile :][:, :tile]
    cache = engine.new_cache(tile, 8)
    for column in tokens:
        logits = engine.logits(column, cache, np.ones(tile, np.int64))
    np.testing.assert_array_equal(logits[5 % tile], alone[0])


@pytest.mark.parametrize("has_pieces", [False, True])
def test_new_weights_are_seen_after_load_and_update(
    monkeypatch: pytest.MonkeyPatch, has_pieces: bool
) -> None:
    """Pieces are copies; rows that are read together equal those read alone, without pieces."""
    monkeypatch.setattr(engine_module, "has_small_products", lambda *_: has_pieces)
    engine, rows = build_engine(), list(range(ROWS))

    def require_current_weights() -> None:
        fresh = build_engine()
        fresh.load(engine.state())
        cache = fresh.new_cache(1, 8)
        for tokens in TOKENS:
            alone = fresh.logits(tokens[7:8], cache, np.ones(1, np.int64))
        together = read_single_tokens(engine, ROWS, rows)
        np.testing.assert_allclose(together[7], alone[0], rtol=0, atol=1e-12)

    first = read_single_tokens(engine, ROWS, rows)
    require_current_weights()
    tokens = TOKENS[0].reshape(4, 8)
    engine.accumulate(Batch(tokens, tokens, step=0, rows=np.arange(4)), 1 / 32)
    engine.update(lr=0.1)
    require_current_weights()
    engine.load(initial_weights(engine.table, 1))
    require_current_weights()
    assert np.abs(read_single_tokens(engine, ROWS, rows) - first).max() > 1e-3
