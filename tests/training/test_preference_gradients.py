"""The weights of targets against autograd through the whole loss of DPO and of GRPO, in float64,
and against finite differences through the NumPy engine; the KL estimate against the exact one."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.permutation import items_at
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.training.preference.answer_rows import Answer, AnswerRows, answer_rows, token_nats
from glasslm.training.preference.dpo import pair_losses
from glasslm.training.preference.grpo import group_advantages, kl_estimates, nats_slopes
from glasslm.training.preference.objective import weighted_batch

Array = np.ndarray[Any, Any]
V, P, G = 13, 3, 4
BETA, KL = 0.7, 0.3


def make_config() -> RunConfig:
    flags = {"d_model": 16, "n_layers": 2, "n_heads": 2, "block_size": 12, "micro_batch_size": 2}
    return with_flags(PRESETS["tiny"](), flags).resolve()


def build_engine(name: str, seed: int) -> Any:
    """An engine in float64, with weights that depend on the seed."""
    config, draw = make_config(), np.random.default_rng(seed)
    compute = ComputeConfig(engine=name, device="cpu", precision="fp64", threads=1)  # type: ignore[arg-type]
    engine = make_engine(config, V, compute, training=True)
    start = initial_weights(parameter_table(config.model, V), 0, np.float64)
    engine.load((name, array + 0.2 * draw.standard_normal(array.shape)) for name, array in start)
    return engine


def make_rows(count: int) -> AnswerRows:
    """Prompts and answers of different lengths."""
    draw = np.random.default_rng(7)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(map(int, draw.integers(0, V, length)))

    return answer_rows([Answer(ids(1 + i % 4), ids(1 + (3 * i) % 5)) for i in range(count)])


def dpo_slopes(rows: AnswerRows, nats: Array, first_nats: Array) -> tuple[float, Array]:
    """The mean loss of the pairs, and its slope at each target."""
    losses = pair_losses(*np.split(nats.sum(1), 2), *np.split(first_nats.sum(1), 2), beta=BETA)
    slopes = np.concatenate([losses.slopes, -losses.slopes]) / P
    return float(losses.losses.mean()), slopes[:, None] * rows.is_answer


ADVANTAGES = group_advantages(np.array([[1.0, 0, 0, 1], [0, 0, 1, 0]])).reshape(-1)


def grpo_slopes(rows: AnswerRows, nats: Array, first_nats: Array) -> tuple[float, Array]:
    """The objective as a function of the nats (its ratio of probabilities is 1), and the slopes."""
    terms = ADVANTAGES[:, None] * nats + KL * kl_estimates(nats, first_nats)
    value = float(np.mean((terms * rows.is_answer).sum(1) / rows.lengths))
    return value, nats_slopes(ADVANTAGES, nats, first_nats, rows.is_answer, KL)


Slopes = Callable[[AnswerRows, Array, Array], tuple[float, Array]]
OBJECTIVES: dict[str, tuple[int, Slopes]] = {
    "dpo": (2 * P, dpo_slopes),
    "grpo": (2 * G, grpo_slopes),
}


def weighted_gradients(
    engine: Engine, rows: AnswerRows, first_nats: Array, slopes_of: Slopes
) -> dict[str, Array]:
    _, slopes = slopes_of(rows, token_nats(engine, rows), first_nats)
    batch = weighted_batch(rows, slopes, 0)
    weight = 1 / np.count_nonzero(rows.is_answer)
    gradients: dict[str, Array] = engine.gradients(batch, weight)  # type: ignore[attr-defined]
    return {name: array.copy() for name, array in gradients.items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_the_weighted_batch_has_the_gradient_of_the_whole_loss(objective: str, name: str) -> None:
    """The loss as the papers write it, from log-probabilities, differentiated by autograd."""
    torch = pytest.importorskip("torch")
    count, slopes_of = OBJECTIVES[objective]
    rows, policy = make_rows(count), build_engine("torch", seed=1)
    first_nats = token_nats(build_engine("numpy", seed=2), rows)
    tokens, targets = torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets)
    logits, _ = policy.model(tokens)
    logp = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    mask, first = torch.from_numpy(rows.is_answer), torch.from_numpy(-first_nats)
    if objective == "dpo":
        ratios = ((logp - first) * mask).sum(1)
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[:P] - ratios[P:])).mean()
    else:
        ratio = torch.exp(logp - logp.detach())  # of the current to the sampling weights
        d = first - logp
        terms = -ratio * torch.from_numpy(ADVANTAGES)[:, None] + KL * (torch.exp(d) - d - 1)
        loss = ((terms * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    expected = {name: p.grad.numpy().copy() for name, p in policy.model.named_parameters()}
    engine = build_engine(name, seed=1)
    for weight, array in weighted_gradients(engine, rows, first_nats, slopes_of).items():
        np.testing.assert_allclose(array, expected[weight], rtol=1e-9, atol=1e-12, err_msg=weight)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_weighted_batch_has_the_slope_of_the_loss(objective: str) -> None:
    """Finite differences through the NumPy engine, at some elements of each weight."""
    count, slopes_of = OBJECTIVES[objective]
    rows, engine = make_rows(count), build_engine("numpy", seed=1)
    first_nats = token_nats(build_engine("numpy", seed=2), rows)
    by_hand = weighted_gradients(engine, rows, first_nats, slopes_of)
    draw, h = np.random.default_rng(0), 1e-5
    for name, array in engine.weights.arrays.items():
        flat = array.reshape(-1)
        for index in draw.integers(0, flat.size, 2):
            before, values = flat[index], []
            for step in (h, -h):
                flat[index] = before + step
                values.append(slopes_of(rows, token_nats(engine, rows), first_nats)[0])
            flat[index] = before
            slope = (values[0] - values[1]) / (2 * h)
            assert by_hand[name].reshape(-1)[index] == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_engines_have_the_same_gradient(objective: str) -> None:
    pytest.importorskip("torch")
    count, slopes_of = OBJECTIVES[objective]
    rows = make_rows(count)
    first_nats = token_nats(build_engine("numpy", seed=2), rows)
    by_hand, by_autograd = (
        weighted_gradients(build_engine(name, seed=1), rows, first_nats, slopes_of)
        for name in ("numpy", "torch")
    )
    for name, array in by_hand.items():
        np.testing.assert_allclose(array, by_autograd[name], rtol=1e-10, atol=1e-13, err_msg=name)


# -- the formulas ----------------------------------------------------------------------------------


def test_the_loss_of_equal_weights_is_ln_2_whatever_beta_is() -> None:
    nats = np.random.default_rng(0).random((2, 5)) * 30
    for beta in (1e-3, 0.1, 10.0):
        losses = pair_losses(*nats, *nats, beta=beta)
        np.testing.assert_allclose(losses.losses, math.log(2), rtol=1e-15)
        np.testing.assert_allclose(losses.slopes, beta / 2, rtol=1e-15)


def test_huge_margins_do_not_overflow() -> None:
    zero = np.zeros(2)
    losses = pair_losses(np.array([0.0, 1e6]), np.array([1e6, 0.0]), zero, zero, beta=1.0)
    np.testing.assert_array_equal(losses.losses, [0.0, 1e6])
    np.testing.assert_array_equal(losses.slopes, [0.0, 1.0])


def test_advantages_of_a_group_sum_to_0_and_an_equal_group_has_none() -> None:
    rewards = np.random.default_rng(0).integers(0, 2, (20, 8)).astype(float)
    rewards[3], rewards[4] = 1.0, 0.0
    advantages = group_advantages(rewards)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-12)
    assert not advantages[3:5].any()
    mixed = rewards.std(1) > 0
    np.testing.assert_allclose(advantages[mixed].std(1), 1, atol=1e-3)
    assert (advantages[rewards == 1] >= 0).all()


def test_the_estimate_is_the_exact_divergence_in_the_mean_and_never_negative() -> None:
    """Over a vocabulary small enough to sum over, with p as the weights of the mean."""
    logits = np.random.default_rng(0).standard_normal((2, 6, 5))
    p, first = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    exact = (p * np.log(p / first)).sum(-1)
    estimates = kl_estimates(-np.log(p), -np.log(first))
    np.testing.assert_allclose((p * estimates).sum(-1), exact, rtol=1e-12)
    assert (estimates >= 0).all()
    assert not kl_estimates(-np.log(p), -np.log(p)).any()


def test_the_mean_of_the_estimates_slopes_is_the_slope_of_the_forward_divergence() -> None:
    """What docs/backward.md says of the KL term: sampled from p, it pulls towards KL(first | p)."""
    draw = np.random.default_rng(1)
    logits, first_logits = draw.standard_normal((2, 6))
    p, first = (np.exp(x) / np.exp(x).sum() for x in (logits, first_logits))
    slopes = np.expm1(-np.log(p) + np.log(first))  # of each symbol's nats
    nats_jacobian = p[None, :] - np.eye(6)  # d nats_v / d logits
    mean = (p * slopes) @ nats_jacobian
    np.testing.assert_allclose(mean, p - first, rtol=1e-10, atol=1e-13)


# -- rows and order --------------------------------------------------------------------------------


def test_targets_are_the_answers_and_nothing_sees_the_padding() -> None:
    short, long = Answer((1, 2), (3,)), Answer((4,), (5, 6, 7, 8))
    rows = answer_rows([short, long])
    assert rows.targets.tolist() == [[-1, 3, -1, -1], [5, 6, 7, 8]]
    assert rows.lengths.tolist() == [1, 4]
    engine = build_engine("numpy", seed=1)
    alone = token_nats(engine, answer_rows([short]))
    np.testing.assert_allclose(token_nats(engine, rows)[0, :2], alone[0], rtol=1e-12)


def test_each_item_comes_once_in_a_pass() -> None:
    steps = [items_at(5, 4 * step + np.arange(4), 10) for step in range(5)]
    order = np.concatenate(steps)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert items_at(5, np.arange(12, 16), 10).tolist() == steps[3].tolist()
    assert items_at(6, np.arange(4), 10).tolist() != steps[0].tolist()
    assert items_at(5, np.arange(6, 9), 1).tolist() == [0, 0, 0]
