"""The ops: float32 in every intermediate, known values, the mask of dropout, and the buffer pool.

tests/lab/test_check.py checks their gradients.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasslm.engines import positions
from glasslm.engines.dropout import EMBEDDING_SITE, drop_threshold, row_keys, site_number
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.buffer_pool import BufferPool
from glasslm.lab.checks import op_cases
from glasslm.lab.checks.op_cases import OPS

Array = np.ndarray[Any, Any]


@contextmanager
def float64_variables() -> Iterator[list[str]]:
    """The names of all local variables of the engine that hold float64 when a function returns."""
    names: list[str] = []

    def record_float64(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "return" and "engines" in code.co_filename:
            names.extend(
                f"{code.co_qualname}: {name}"
                for name, value in frame.f_locals.items()
                if isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float64
            )

    sys.setprofile(record_float64)
    try:
        yield names
    finally:
        sys.setprofile(None)


class Float32Generator:
    """A generator of float32 instead of float64, for the cases of lab.checks."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def standard_normal(self, shape: Any) -> Array:
        return np.asarray(self.rng.standard_normal(shape, np.float32))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)


@pytest.mark.parametrize("name", OPS)
def test_every_op_keeps_float32_forward_and_backward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intermediates are checked as well, because an output of the right type would hide them."""
    cos_sin = positions.rope_cos_sin
    monkeypatch.setattr(op_cases, "new", lambda shape: np.full(shape, np.nan, np.float32))
    monkeypatch.setattr(
        positions,
        "rope_cos_sin",
        lambda at, heads, Q, dtype, *scaling: cos_sin(at, heads, Q, np.float32, *scaling),
    )
    inputs, run = OPS[name](Float32Generator(np.random.default_rng(0)))  # type: ignore[arg-type]
    with float64_variables() as wide:
        y, backward = run()
        gradients = backward(np.ones_like(y))
    assert {array.dtype for array in inputs.values()} == {np.dtype(np.float32)}
    for array in (y, *(gradients if isinstance(gradients, tuple) else (gradients,))):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    assert wide == []


def test_the_float64_of_one_intermediate_would_be_found() -> None:
    """np.sqrt(2 / np.pi) is a float64 scalar, which promotes the array that it multiplies."""
    source = "def op(x, np):\n    k = np.sqrt(2 / np.pi)\n    return (x * k).astype(np.float32)"
    scope: dict[str, Any] = {}
    exec(compile(source, "glasslm/engines/numpy/careless.py", "exec"), scope)
    with float64_variables() as wide:
        scope["op"](np.ones(3, np.float32), np)
    assert wide == ["op: k"]


# -- known values ----------------------------------------------------------------------------------


def test_gelu_is_the_normal_distribution_within_its_approximation() -> None:
    x = np.linspace(-5, 5, 1001)
    y, _ = ops.gelu(x, np.empty)
    exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert np.abs(y - exact).max() < 5e-4


def test_silu_is_x_times_the_sigmoid_also_far_out() -> None:
    x = np.array([-1000.0, -20.0, -1.0, 0.0, 1.0, 20.0, 1000.0])
    y, backward = ops.silu(x, np.empty)
    expected = [
        0.0,
        -20 / (1 + math.exp(20)),
        -1 / (1 + math.e),
        0.0,
        1 / (1 + math.exp(-1)),
        20.0,
        1000.0,
    ]
    np.testing.assert_allclose(y, expected, atol=1e-14)
    np.testing.assert_allclose(backward(np.ones(7))[[0, 3, 6]], [0, 0.5, 1], atol=1e-14)


def test_relu_and_its_square() -> None:
    x = np.array([-2.0, 0.0, 3.0])
    np.testing.assert_array_equal(ops.relu(x, np.empty)[0], [0, 0, 3])
    np.testing.assert_array_equal(ops.relu2(x, np.empty)[0], [0, 0, 9])


def test_norms_give_what_they_promise() -> None:
    x = np.random.default_rng(0).normal(3, 10, (20, 64))
    rms, _ = ops.rms_norm(x, np.ones(64), np.empty, 1e-5)
    np.testing.assert_allclose(np.sqrt((rms**2).mean(1)), 1, rtol=1e-5)
    layer, _ = ops.layer_norm(x, np.full(64, 2.0), np.full(64, 0.5), np.empty, 1e-5)
    np.testing.assert_allclose(layer.mean(1), 0.5, atol=1e-12)
    np.testing.assert_allclose(layer.std(1), 2, rtol=1e-5)
    np.testing.assert_allclose(
        ops.rms_norm(100 * x, np.ones(64), np.empty, 1e-5)[0], rms, rtol=1e-5
    )


def test_cross_entropy_of_large_logits_of_uniform_ones_and_of_ignored_targets() -> None:
    logits = np.zeros((4, 7), np.float32)
    logits[1, 3], logits[2, 3] = 1e4, -1e4
    nats, backward = ops.cross_entropy(logits, np.array([0, 3, 3, -1]), BufferPool(np.float32))
    np.testing.assert_allclose(nats, [math.log(7), 0, 1e4 + math.log(6), 0], rtol=1e-6)
    dlogits = backward(1.0)
    assert np.isfinite(dlogits).all()
    np.testing.assert_allclose(dlogits.sum(1), 0, atol=1e-6)
    np.testing.assert_array_equal(dlogits[3], 0)


def test_the_gradient_of_an_embedding_sums_the_rows_of_a_token() -> None:
    draw = np.random.default_rng(0)
    tokens, dout = draw.integers(0, 5, 40), draw.standard_normal((40, 3))
    _, backward = ops.embedding(tokens, np.zeros((6, 3)), np.empty)
    expected = np.zeros((6, 3))
    np.add.at(expected, tokens, dout)
    np.testing.assert_allclose(backward(dout), expected, atol=1e-14)


# -- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    n = 200_000
    x = np.ones((8, n // 8), np.float32)
    y, backward = ops.dropout(x, p, row_keys(7, 3, np.arange(8), 1), np.empty)
    dropped = float((y == 0).mean())
    deviation = math.sqrt(p * (1 - p) / n)  # of the binomial distribution
    assert abs(dropped - p) < 5 * deviation
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - p)], rtol=1e-6)
    np.testing.assert_array_equal(backward(x), y)  # the same elements are dropped in backward


def test_neighbours_are_dropped_independently() -> None:
    """Masks of two elements, rows, steps, sites or seeds agree as often as by chance."""
    n, shape = 100_000, (1, 100_000)

    def mask(seed: int = 1, step: int = 1, row: int = 1, place: int = 1) -> Array:
        return (
            ops.dropout_mask(shape, 0.5, row_keys(seed, step, np.array([row]), place), np.empty) > 0
        )

    base = mask()
    for second in (
        np.roll(base, 1),
        mask(seed=2),
        mask(step=2),
        mask(row=2),
        mask(place=2),
        mask(seed=1 + 2**32),
    ):
        assert abs(float((base == second).mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)
    np.testing.assert_array_equal(base, mask())


@given(
    rows=st.lists(st.integers(0, 2**20), min_size=2, max_size=6),
    cut=st.integers(1, 5),
    step=st.integers(0, 2**40),
)
def test_the_mask_of_a_row_does_not_depend_on_other_rows(
    rows: list[int], cut: int, step: int
) -> None:
    def mask(part: list[int]) -> Array:
        keys = row_keys(5, step, np.array(part, np.int64), 2)
        return ops.dropout_mask((len(part) * 3, 8), 0.4, keys, np.empty).reshape(len(part), 24)

    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    np.testing.assert_array_equal(mask(rows), np.concatenate([mask(part) for part in parts]))


def test_every_place_of_a_model_has_a_number_of_its_own() -> None:
    places = [site_number(layer, place) for layer in range(50) for place in (1, 2, 3)]
    assert len({EMBEDDING_SITE, *places}) == 151


def test_the_threshold_is_a_share_of_all_hashes() -> None:
    assert drop_threshold(0.0) == 0
    assert drop_threshold(0.5) == 2**31


# -- the buffer pool -------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "view", "drop"]), st.integers(1, 4)), max_size=60)
)
def test_memory_is_not_handed_out_while_a_view_of_it_lives(story: list[tuple[str, int]]) -> None:
    new = BufferPool(np.float32)
    # Arrays, or views of arrays that were dropped, and the number that fills each of them.
    arrays: list[tuple[Array, float]] = []
    for number, (act, size) in enumerate(story):
        if act == "take":
            array = new((size, 3))
            array[...] = number
            arrays.append((array, number))
        elif arrays and act == "view":
            array, filled = arrays.pop(size % len(arrays))
            arrays.append((array.T[1:], filled))  # the array itself goes
            del array
        elif arrays:
            arrays.pop(size % len(arrays))
        for array, filled in arrays:
            assert (array == filled).all()


def test_memory_comes_back() -> None:
    new = BufferPool(np.float32)
    pointers = set()
    for _ in range(5):
        array = new((10, 10))
        pointers.add(array.ctypes.data)
        view = array.reshape(-1)[3:7]
        del array
        second = new((100,))
        assert not np.shares_memory(view, second)
        del view, second
    assert new.allocated_bytes == 2 * (400 + 64)
    assert len(pointers) <= 2
    assert all(pointer % 64 == 0 for pointer in pointers)


def test_a_buffer_pool_serves_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    new = BufferPool(np.float32)

    def work(number: int) -> bool:
        is_intact = True
        for _ in range(300):
            arrays = [new((50,)) for _ in range(3)]
            for array in arrays:
                array[...] = number
            is_intact = is_intact and all((array == number).all() for array in arrays)
        return is_intact

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert new.allocated_bytes <= 8 * 3 * (200 + 64)


def test_the_ops_that_end_a_sublayer_leave_the_gradient_alone() -> None:
    """The residual connection reads the same gradient."""
    dy = np.random.default_rng(0).standard_normal((6, 4))
    before = dy.copy()
    ops.linear(np.ones((6, 3)), np.ones((4, 3)), np.empty)[1](dy)
    ops.dropout(dy, 0.5, row_keys(0, 0, np.arange(2), 0), np.empty)[1](dy)
    np.testing.assert_array_equal(dy, before)
