"""The ops: float32 in every intermediate, known values, dropout's mask, and the arena that gives them memory.

That their gradients are right is the business of tests/lab/test_check.py.
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
from glasslm.engines.dropout import EMBEDDING_SITE, row_keys, site, threshold
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.arena import Arena
from glasslm.lab.checks import gradient_check
from glasslm.lab.checks.gradient_check import OPS

Array = np.ndarray[Any, Any]


@contextmanager
def wide_variables() -> Iterator[list[str]]:
    """The names of all local variables that hold float64 when a function of the engine returns."""
    found: list[str] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "return" and "engines" in code.co_filename:
            found.extend(
                f"{code.co_qualname}: {name}"
                for name, value in frame.f_locals.items()
                if isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float64
            )

    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(None)


class Draw32:
    """A generator of float32 in place of float64, for the cases of lab.check."""

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
    """Also in its intermediates, which an output of the right type would hide."""
    tables = positions.rope_tables
    monkeypatch.setattr(gradient_check, "new", lambda shape: np.full(shape, np.nan, np.float32))
    monkeypatch.setattr(
        positions, "rope_tables", lambda T, heads, Q, dtype: tables(T, heads, Q, np.float32)
    )
    inputs, run = OPS[name](Draw32(np.random.default_rng(0)))  # type: ignore[arg-type]
    with wide_variables() as wide:
        y, backward = run()
        gradients = backward(np.ones_like(y))
    assert {array.dtype for array in inputs.values()} == {np.dtype(np.float32)}
    for array in (y, *(gradients if isinstance(gradients, tuple) else (gradients,))):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    assert wide == []


def test_the_float64_of_one_intermediate_would_be_found() -> None:
    """The trap: np.sqrt(2 / np.pi) is a float64 scalar and widens what it multiplies."""
    source = "def op(x, np):\n    k = np.sqrt(2 / np.pi)\n    return (x * k).astype(np.float32)"
    scope: dict[str, Any] = {}
    exec(compile(source, "glasslm/engines/numpy/careless.py", "exec"), scope)
    with wide_variables() as wide:
        scope["op"](np.ones(3, np.float32), np)
    assert wide == ["op: k"]


# -- known values -----------------------------------------------------------------------------------------------------


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
    rms, _ = ops.rms_norm(x, np.ones(64), np.empty)
    np.testing.assert_allclose(np.sqrt((rms**2).mean(1)), 1, rtol=1e-5)
    layer, _ = ops.layer_norm(x, np.full(64, 2.0), np.full(64, 0.5), np.empty)
    np.testing.assert_allclose(layer.mean(1), 0.5, atol=1e-12)
    np.testing.assert_allclose(layer.std(1), 2, rtol=1e-5)
    np.testing.assert_allclose(ops.rms_norm(100 * x, np.ones(64), np.empty)[0], rms, rtol=1e-5)


def test_cross_entropy_of_large_logits_of_uniform_ones_and_of_ignored_targets() -> None:
    logits = np.zeros((4, 7), np.float32)
    logits[1, 3], logits[2, 3] = 1e4, -1e4
    nats, backward = ops.cross_entropy(logits, np.array([0, 3, 3, -1]), Arena(np.float32))
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


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    n = 200_000
    x = np.ones((8, n // 8), np.float32)
    y, backward = ops.dropout(x, p, row_keys(7, 3, np.arange(8), 1), np.empty)
    dropped = float((y == 0).mean())
    assert abs(dropped - p) < 5 * math.sqrt(
        p * (1 - p) / n
    )  # five deviations of the binomial distribution
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - p)], rtol=1e-6)
    np.testing.assert_array_equal(backward(x), y)  # the same elements on the way back


def test_neighbours_are_dropped_independently() -> None:
    """Of elements, rows, steps, sites and seeds: the masks of two agree as often as chance has it."""
    n, shape = 100_000, (1, 100_000)

    def mask(seed: int = 1, step: int = 1, row: int = 1, place: int = 1) -> Array:
        return (
            ops.dropout_mask(shape, 0.5, row_keys(seed, step, np.array([row]), place), np.empty) > 0
        )

    base = mask()
    for other in (
        np.roll(base, 1),
        mask(seed=2),
        mask(step=2),
        mask(row=2),
        mask(place=2),
        mask(seed=1 + 2**32),
    ):
        assert abs(float((base == other).mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)
    np.testing.assert_array_equal(base, mask())


@given(
    rows=st.lists(st.integers(0, 2**20), min_size=2, max_size=6),
    cut=st.integers(1, 5),
    step=st.integers(0, 2**40),
)
def test_a_row_keeps_its_mask_whatever_is_computed_beside_it(
    rows: list[int], cut: int, step: int
) -> None:
    def mask(part: list[int]) -> Array:
        keys = row_keys(5, step, np.array(part, np.int64), 2)
        return ops.dropout_mask((len(part) * 3, 8), 0.4, keys, np.empty).reshape(len(part), 24)

    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    np.testing.assert_array_equal(mask(rows), np.concatenate([mask(part) for part in parts]))


def test_every_place_of_a_model_has_a_number_of_its_own() -> None:
    places = [site(layer, place) for layer in range(50) for place in (1, 2, 3)]
    assert len({EMBEDDING_SITE, *places}) == 151


def test_the_threshold_is_a_share_of_all_hashes() -> None:
    assert threshold(0.0) == 0
    assert threshold(0.5) == 2**31


# -- the arena --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "view", "drop"]), st.integers(1, 4)), max_size=60)
)
def test_memory_is_not_handed_out_while_a_view_of_it_lives(story: list[tuple[str, int]]) -> None:
    new = Arena(np.float32)
    held: list[
        tuple[Array, float]
    ] = []  # arrays, or views of dropped ones, and the number each was filled with
    for number, (act, size) in enumerate(story):
        if act == "take":
            array = new((size, 3))
            array[...] = number
            held.append((array, number))
        elif held and act == "view":
            array, filled = held.pop(size % len(held))
            held.append((array.T[1:], filled))  # the array itself goes
            del array
        elif held:
            held.pop(size % len(held))
        for array, filled in held:
            assert (array == filled).all()


def test_memory_comes_back() -> None:
    new = Arena(np.float32)
    pointers = set()
    for _ in range(5):
        array = new((10, 10))
        pointers.add(array.ctypes.data)
        view = array.reshape(-1)[3:7]
        del array
        other = new((100,))
        assert not np.shares_memory(view, other)
        del view, other
    assert new.bytes == 2 * (400 + 64)
    assert len(pointers) <= 2
    assert all(pointer % 64 == 0 for pointer in pointers)


def test_an_arena_serves_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    new = Arena(np.float32)

    def work(number: int) -> bool:
        whole = True
        for _ in range(300):
            arrays = [new((50,)) for _ in range(3)]
            for array in arrays:
                array[...] = number
            whole = whole and all((array == number).all() for array in arrays)
        return whole

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert new.bytes <= 8 * 3 * (200 + 64)


def test_the_ops_that_end_a_sublayer_leave_the_gradient_alone() -> None:
    """The residual connection needs the same gradient."""
    dy = np.random.default_rng(0).standard_normal((6, 4))
    before = dy.copy()
    ops.linear(np.ones((6, 3)), np.ones((4, 3)), np.empty)[1](dy)
    ops.dropout(dy, 0.5, row_keys(0, 0, np.arange(2), 0), np.empty)[1](dy)
    np.testing.assert_array_equal(dy, before)
