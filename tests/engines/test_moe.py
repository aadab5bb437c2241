"""The mixture of experts by hand: gradients, routing, and independence of other sequences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_ops import float64_variables

from glasslm.engines.numpy import ops
from glasslm.engines.numpy.buffer_pool import BufferPool
from glasslm.engines.numpy.moe import Expert, Routing, mixture, round_up_sizes
from glasslm.lab.checks.finite_differences import check_gradients

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]

B, T, D, F, E = 4, 5, 6, 7, 5
N = B * T


class SmallMixture:
    """A mixture over small random weights, with GELU feed-forwards that all differ."""

    def __init__(
        self, k: int, seed: int = 0, dtype: Any = np.float64, E: int = E, rows: int = B
    ) -> None:
        draw, self.k, self.rows = np.random.default_rng(seed), k, rows
        self.inputs: Gradients = {"x": draw.standard_normal((rows * T, D)).astype(dtype)}
        self.inputs["logits"] = (2 * draw.standard_normal((rows * T, E))).astype(dtype)
        for e in range(E):
            self.inputs[f"up.{e}"] = draw.standard_normal((F, D)).astype(dtype)
            self.inputs[f"down.{e}"] = draw.standard_normal((D, F)).astype(dtype)
        self.upstream = draw.standard_normal((rows * T, D)).astype(dtype)
        self.E, self.new = E, lambda shape: np.full(shape, np.nan, dtype)

    def expert(self, e: int) -> Expert:
        def compute(x: Array) -> tuple[Array, Callable[[Array, Gradients], Array]]:
            inner, up_back = ops.linear(x, self.inputs[f"up.{e}"], self.new)
            h, gelu_back = ops.gelu(inner, self.new)
            y, down_back = ops.linear(h, self.inputs[f"down.{e}"], self.new)

            def backward(dy: Array, gradients: Gradients) -> Array:
                dh, gradients[f"down.{e}"] = down_back(dy)
                dx, gradients[f"up.{e}"] = up_back(gelu_back(dh))
                return dx

            return y, backward

        return compute

    def run(self) -> tuple[Array, Routing, Any]:
        experts = [self.expert(e) for e in range(self.E)]
        return mixture(
            self.inputs["x"], self.inputs["logits"], experts, self.k, self.rows, self.new
        )

    def value(self, balance_weight: float = 0.0, z_weight: float = 0.0) -> float:
        y, routing, _ = self.run()
        return (
            float(np.sum(y * self.upstream))
            + balance_weight * routing.balance
            + z_weight * routing.z
        )

    def gradients(self, balance_weight: float = 0.0, z_weight: float = 0.0) -> Gradients:
        gradients: Gradients = {}
        back = self.run()[2]
        gradients["x"], gradients["logits"] = back(
            self.upstream, gradients, balance_weight, z_weight
        )
        return gradients

    def with_rows(self, which: list[int]) -> "SmallMixture":
        """The same weights with the rows `which`, in that order."""
        small = SmallMixture(self.k, dtype=self.upstream.dtype, E=self.E, rows=len(which))
        tokens = np.arange(self.rows * T).reshape(self.rows, T)[which].reshape(-1)
        small.inputs = self.inputs | {name: self.inputs[name][tokens] for name in ("x", "logits")}
        small.upstream = self.upstream[tokens]
        return small


@pytest.mark.parametrize("k", [1, 2, 4, E])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (3.0, 0.0), (0.0, 0.7), (3.0, 0.7)], ids=str)
def test_gradients_against_finite_differences(k: int, weights: tuple[float, float]) -> None:
    small = SmallMixture(k, rows=2)
    finding = check_gradients(
        "mixture",
        small.inputs,
        lambda: small.value(*weights),
        lambda: small.gradients(*weights),
        np.random.default_rng(0),
        kinks=True,
    )
    assert finding.passed, finding


@pytest.mark.parametrize("k", [1, 2, 4, E])
def test_every_token_gets_its_k_most_probable_experts_and_no_other(k: int) -> None:
    """Against a loop over tokens, in the formulas of the papers."""
    small = SmallMixture(k)
    y, routing, _ = small.run()
    use, balance, z = np.zeros(E), 0.0, 0.0
    for row in range(B):
        share, mean = np.zeros(E), np.zeros(E)
        for n in range(row * T, (row + 1) * T):
            logits, x = small.inputs["logits"][n], small.inputs["x"][n : n + 1]
            p = np.exp(logits) / np.exp(logits).sum()
            best = sorted(range(E), key=lambda e, p=p: -p[e])[:k]
            gates = p[best] / p[best].sum() if k > 1 else p[best]
            expected = sum(gate * small.expert(e)(x)[0][0] for gate, e in zip(gates, best))
            np.testing.assert_allclose(y[n], expected, rtol=1e-12)
            use[best] += 1
            share[best] += 1 / (T * k)
            mean += p / T
            z += np.log(np.exp(logits).sum()) ** 2 / T
        balance += E * share @ mean
    np.testing.assert_array_equal(routing.use, use)
    np.testing.assert_allclose([routing.balance, routing.z], [balance, z], rtol=1e-12)


def test_of_equally_probable_experts_the_first_are_chosen() -> None:
    small = SmallMixture(2)
    small.inputs["logits"][...] = 0
    _, routing, _ = small.run()
    np.testing.assert_array_equal(routing.use, [N, N, 0, 0, 0])
    small.inputs["logits"][...] = [0, 1, 1, 2, 1]
    np.testing.assert_array_equal(small.run()[1].use, [0, N, 0, N, 0])
    small.inputs["logits"][...] = [-0.0, -0.0, 0, 0, 0]  # -0.0 equals 0.0
    np.testing.assert_array_equal(small.run()[1].use, [N, N, 0, 0, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_first_of_many_equal_experts_are_chosen(dtype: Any) -> None:
    """An unstable sort differs from a stable one only for more than 16 numbers."""
    small = SmallMixture(3, E=40, dtype=dtype)
    small.inputs["logits"][...] = np.arange(40) % 2
    np.testing.assert_array_equal(np.flatnonzero(small.run()[1].use), [1, 3, 5])


def test_a_whole_batch_may_go_to_one_expert_and_the_others_get_gradients_of_zero() -> None:
    small = SmallMixture(1)
    small.inputs["logits"][:, 3] = 50
    y, routing, _ = small.run()
    np.testing.assert_array_equal(routing.use, [0, 0, 0, N, 0])
    np.testing.assert_allclose(y, small.expert(3)(small.inputs["x"])[0], rtol=1e-12)
    gradients = small.gradients()
    assert set(gradients) == set(small.inputs)
    for e in range(E):
        for name in (f"up.{e}", f"down.{e}"):
            assert np.any(gradients[name]) == (e == 3)
            assert gradients[name].shape == small.inputs[name].shape


def test_an_even_router_has_balance_1_and_a_collapsed_one_e() -> None:
    small = SmallMixture(1)
    small.inputs["logits"][...] = 0
    rows = small.inputs["logits"].reshape(B, T, E)
    rows[:] = 1e-9 * np.eye(E)  # token t prefers expert t by a hair
    assert small.run()[1].balance == pytest.approx(B, rel=1e-6)
    rows[:] = [0, 0, 60, 0, 0]
    assert small.run()[1].balance == pytest.approx(B * E, rel=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_the_sequences_change_places_and_so_do_the_results(k: int) -> None:
    small, order = SmallMixture(k), [2, 0, 3, 1]
    permuted = small.with_rows(order)
    np.testing.assert_allclose(
        permuted.run()[0].reshape(B, T, D),
        small.run()[0].reshape(B, T, D)[order],
        rtol=1e-12,
        atol=1e-12,
    )
    before, after = small.gradients(2.0, 0.5), permuted.gradients(2.0, 0.5)
    for name, gradient in before.items():
        tokens = name in ("x", "logits")
        expected = gradient.reshape(B, T, -1)[order].reshape(gradient.shape) if tokens else gradient
        np.testing.assert_allclose(after[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]]], ids=str)
def test_it_does_not_matter_which_sequences_are_computed_together(parts: list[list[int]]) -> None:
    whole, pieces = SmallMixture(2), [SmallMixture(2).with_rows(rows) for rows in parts]
    _, routing, _ = whole.run()
    routings = [piece.run()[1] for piece in pieces]
    assert sum(r.balance for r in routings) == pytest.approx(routing.balance, rel=1e-12)
    assert sum(r.z for r in routings) == pytest.approx(routing.z, rel=1e-12)
    np.testing.assert_array_equal(sum(r.use for r in routings), routing.use)
    gradients = [piece.gradients(2.0, 0.5) for piece in pieces]
    for name, expected in whole.gradients(2.0, 0.5).items():
        before = [g[name] for g in gradients]
        together = np.concatenate(before) if name in ("x", "logits") else sum(before)
        np.testing.assert_allclose(together, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_float32_stays_float32_and_the_gradient_it_is_given_stays_as_it_was(k: int) -> None:
    small = SmallMixture(k, dtype=np.float32)
    before, gradients = small.upstream.copy(), {}
    with float64_variables() as wide:
        y, _, backward = small.run()
        arrays = [y, *backward(small.upstream, gradients, 0.1, 0.1), *gradients.values()]
    assert wide == []
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    assert all(np.isfinite(array).all() for array in arrays)
    np.testing.assert_array_equal(small.upstream, before)
    exact = SmallMixture(k)
    exact.inputs = {name: array.astype(np.float64) for name, array in small.inputs.items()}
    np.testing.assert_allclose(y, exact.run()[0], rtol=1e-4, atol=1e-4)


def test_large_logits_give_finite_gradients() -> None:
    small = SmallMixture(2)
    small.inputs["logits"] *= 1e4
    gradients = small.gradients(1.0, 1e-8)
    assert all(np.isfinite(array).all() for array in gradients.values())


def test_a_buffer_pool_gives_arrays_of_no_rows() -> None:
    small = SmallMixture(1)
    small.inputs["logits"][:, 3] = 50
    expected = small.run()[0]
    small.new = round_up_sizes(BufferPool(np.float64))
    np.testing.assert_array_equal(small.run()[0], expected)
    assert np.isfinite(small.gradients()["up.0"]).all()


def test_arrays_in_few_sizes_are_views_of_larger_ones() -> None:
    sizes: list[int] = []

    def new(shape: tuple[int, ...]) -> Array:
        sizes.append(int(np.prod(shape)))
        return np.empty(shape)

    for rows in range(300):
        assert round_up_sizes(new)((rows, 4)).shape == (rows, 4)
        assert 4 * rows <= sizes[-1] < max(4, 2 * 4 * rows)
    assert len(set(sizes)) < 12  # up to 2048


def test_memory_does_not_grow_with_every_new_routing() -> None:
    draw, pool = np.random.default_rng(0), BufferPool(np.float64)
    small = SmallMixture(2, rows=60)
    small.new = round_up_sizes(pool)
    allocated = []
    for _ in range(60):
        small.inputs["logits"] = draw.standard_normal(
            small.inputs["logits"].shape
        ) + draw.standard_normal(E)
        small.gradients()
        allocated.append(pool.allocated_bytes)
    # Without rounding the sizes up, it grows nearly 4 times.
    assert allocated[-1] < 1.5 * allocated[9]
