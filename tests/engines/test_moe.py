"""The mixture of experts by hand: its gradients, what every token gets, and no influence of what is beside it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_ops import wide_variables

from glasslm.engines.numpy import ops
from glasslm.engines.numpy.arena import Arena
from glasslm.engines.numpy.moe import Expert, Routing, in_few_sizes, mixture
from glasslm.lab.checks.finite_differences import compare

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]

B, T, D, F, E = 4, 5, 6, 7, 5
N = B * T


class Part:
    """A mixture over small random weights. Its experts are gelu feed-forwards, and no two of them are alike."""

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

    def rows_only(self, which: list[int]) -> "Part":
        """The same weights with some of the rows, in that order."""
        part = Part(self.k, dtype=self.upstream.dtype, E=self.E, rows=len(which))
        tokens = np.arange(self.rows * T).reshape(self.rows, T)[which].reshape(-1)
        part.inputs = self.inputs | {name: self.inputs[name][tokens] for name in ("x", "logits")}
        part.upstream = self.upstream[tokens]
        return part


@pytest.mark.parametrize("k", [1, 2, 4, E])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (3.0, 0.0), (0.0, 0.7), (3.0, 0.7)], ids=str)
def test_gradients_against_finite_differences(k: int, weights: tuple[float, float]) -> None:
    part = Part(k, rows=2)
    finding = compare(
        "mixture",
        part.inputs,
        lambda: part.value(*weights),
        lambda: part.gradients(*weights),
        np.random.default_rng(0),
        kinks=True,
    )
    assert finding.passed, finding


@pytest.mark.parametrize("k", [1, 2, 4, E])
def test_every_token_gets_its_k_most_probable_experts_and_no_other(k: int) -> None:
    """Token by token, as the papers write it."""
    part = Part(k)
    y, routing, _ = part.run()
    use, balance, z = np.zeros(E), 0.0, 0.0
    for row in range(B):
        share, mean = np.zeros(E), np.zeros(E)
        for n in range(row * T, (row + 1) * T):
            logits, x = part.inputs["logits"][n], part.inputs["x"][n : n + 1]
            p = np.exp(logits) / np.exp(logits).sum()
            best = sorted(range(E), key=lambda e, p=p: -p[e])[:k]
            gates = p[best] / p[best].sum() if k > 1 else p[best]
            expected = sum(gate * part.expert(e)(x)[0][0] for gate, e in zip(gates, best))
            np.testing.assert_allclose(y[n], expected, rtol=1e-12)
            use[best] += 1
            share[best] += 1 / (T * k)
            mean += p / T
            z += np.log(np.exp(logits).sum()) ** 2 / T
        balance += E * share @ mean
    np.testing.assert_array_equal(routing.use, use)
    np.testing.assert_allclose([routing.balance, routing.z], [balance, z], rtol=1e-12)


def test_of_equally_probable_experts_the_first_are_chosen() -> None:
    part = Part(2)
    part.inputs["logits"][...] = 0
    _, routing, _ = part.run()
    np.testing.assert_array_equal(routing.use, [N, N, 0, 0, 0])
    part.inputs["logits"][...] = [0, 1, 1, 2, 1]
    np.testing.assert_array_equal(part.run()[1].use, [0, N, 0, N, 0])
    part.inputs["logits"][...] = [-0.0, -0.0, 0, 0, 0]  # zeros of either sign are equal
    np.testing.assert_array_equal(part.run()[1].use, [N, N, 0, 0, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_first_also_of_many(dtype: Any) -> None:
    """A sort that is not stable shows beyond 16 numbers."""
    part = Part(3, E=40, dtype=dtype)
    part.inputs["logits"][...] = np.arange(40) % 2
    np.testing.assert_array_equal(np.flatnonzero(part.run()[1].use), [1, 3, 5])


def test_a_whole_batch_may_go_to_one_expert_and_the_others_get_gradients_of_zero() -> None:
    part = Part(1)
    part.inputs["logits"][:, 3] = 50
    y, routing, _ = part.run()
    np.testing.assert_array_equal(routing.use, [0, 0, 0, N, 0])
    np.testing.assert_allclose(y, part.expert(3)(part.inputs["x"])[0], rtol=1e-12)
    gradients = part.gradients()
    assert set(gradients) == set(part.inputs)
    for e in range(E):
        for name in (f"up.{e}", f"down.{e}"):
            assert np.any(gradients[name]) == (e == 3)
            assert gradients[name].shape == part.inputs[name].shape


def test_an_even_router_has_balance_1_and_a_collapsed_one_e() -> None:
    part = Part(1)
    part.inputs["logits"][...] = 0
    rows = part.inputs["logits"].reshape(B, T, E)
    rows[:] = 1e-9 * np.eye(E)  # token t prefers expert t by a hair
    assert part.run()[1].balance == pytest.approx(B, rel=1e-6)
    rows[:] = [0, 0, 60, 0, 0]
    assert part.run()[1].balance == pytest.approx(B * E, rel=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_the_sequences_change_places_and_so_do_the_results(k: int) -> None:
    part, order = Part(k), [2, 0, 3, 1]
    moved = part.rows_only(order)
    np.testing.assert_allclose(
        moved.run()[0].reshape(B, T, D),
        part.run()[0].reshape(B, T, D)[order],
        rtol=1e-12,
        atol=1e-12,
    )
    here, there = part.gradients(2.0, 0.5), moved.gradients(2.0, 0.5)
    for name, gradient in here.items():
        tokens = name in ("x", "logits")
        expected = gradient.reshape(B, T, -1)[order].reshape(gradient.shape) if tokens else gradient
        np.testing.assert_allclose(there[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]]], ids=str)
def test_it_does_not_matter_which_sequences_are_computed_together(parts: list[list[int]]) -> None:
    whole, pieces = Part(2), [Part(2).rows_only(rows) for rows in parts]
    _, routing, _ = whole.run()
    found = [piece.run()[1] for piece in pieces]
    assert sum(r.balance for r in found) == pytest.approx(routing.balance, rel=1e-12)
    assert sum(r.z for r in found) == pytest.approx(routing.z, rel=1e-12)
    np.testing.assert_array_equal(sum(r.use for r in found), routing.use)
    gradients = [piece.gradients(2.0, 0.5) for piece in pieces]
    for name, expected in whole.gradients(2.0, 0.5).items():
        here = [g[name] for g in gradients]
        together = np.concatenate(here) if name in ("x", "logits") else sum(here)
        np.testing.assert_allclose(together, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_float32_stays_float32_and_the_gradient_it_is_given_stays_as_it_was(k: int) -> None:
    part = Part(k, dtype=np.float32)
    before, gradients = part.upstream.copy(), {}
    with wide_variables() as wide:
        y, _, backward = part.run()
        arrays = [y, *backward(part.upstream, gradients, 0.1, 0.1), *gradients.values()]
    assert wide == []
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    assert all(np.isfinite(array).all() for array in arrays)
    np.testing.assert_array_equal(part.upstream, before)
    exact = Part(k)
    exact.inputs = {name: array.astype(np.float64) for name, array in part.inputs.items()}
    np.testing.assert_allclose(y, exact.run()[0], rtol=1e-4, atol=1e-4)


def test_far_away_logits_do_no_harm() -> None:
    part = Part(2)
    part.inputs["logits"] *= 1e4
    gradients = part.gradients(1.0, 1e-8)
    assert all(np.isfinite(array).all() for array in gradients.values())


def test_an_arena_lends_arrays_of_no_rows() -> None:
    part = Part(1)
    part.inputs["logits"][:, 3] = 50
    expected = part.run()[0]
    part.new = in_few_sizes(Arena(np.float64))
    np.testing.assert_array_equal(part.run()[0], expected)
    assert np.isfinite(part.gradients()["up.0"]).all()


def test_arrays_in_few_sizes_are_views_of_larger_ones() -> None:
    lent: list[int] = []

    def new(shape: tuple[int, ...]) -> Array:
        lent.append(int(np.prod(shape)))
        return np.empty(shape)

    for rows in range(300):
        assert in_few_sizes(new)((rows, 4)).shape == (rows, 4)
        assert 4 * rows <= lent[-1] < max(4, 2 * 4 * rows)
    assert len(set(lent)) < 12  # up to 2048


def test_memory_does_not_grow_with_every_new_routing() -> None:
    draw, arena = np.random.default_rng(0), Arena(np.float64)
    part = Part(2, rows=60)
    part.new = in_few_sizes(arena)
    taken = []
    for _ in range(60):
        part.inputs["logits"] = draw.standard_normal(
            part.inputs["logits"].shape
        ) + draw.standard_normal(E)
        part.gradients()
        taken.append(arena.bytes)
    assert (
        taken[-1] < 1.5 * taken[9]
    )  # in arrays of exactly the size asked for it is nearly 4 times
