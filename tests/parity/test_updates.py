"""Updates of the weights and moments by both engines, for every switch and optimizer."""

import pytest

torch = pytest.importorskip("torch")

from both_engines import (  # noqa: E402 - need PyTorch
    CASES,
    DROPPING,
    OPTIMIZERS,
    TOLERANCE,
    assert_losses_near,
    assert_near,
    copy_arrays,
    make_batch,
    make_pair,
)

from glasslm.config.schema import ModelConfig, Precision  # noqa: E402

# Dropout changes gradients, which each optimizer gets: one is enough for its keys of each step.
UPDATED = [
    *[(*case, optimizer) for case in CASES for optimizer in OPTIMIZERS],
    *[(name, model, "fp64", "adamw") for name, model in DROPPING],
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_without_moments_are_updated_by_the_number_of_the_update(optimizer: str) -> None:
    """AdamW divides by 1 - beta^t: a state without moments keeps its t in both engines."""
    engines = make_pair(CASES[0][1], "fp64", optimizer=optimizer)
    weights = {name: array.copy() for name, array in engines[0].weights.arrays.items()}
    for engine in engines:
        engine.load(((name, weights[name]) for name in engine.table), 100)
        engine.accumulate(make_batch(0), 0.1)
        engine.update(1e-2)
    states = [copy_arrays(engine.state()) for engine in engines]
    assert_near(states[1], states[0], TOLERANCE["fp64"])


@pytest.mark.parametrize(("name", "model", "precision", "optimizer"), UPDATED)
def test_updates_are_the_same(
    name: str, model: ModelConfig, precision: Precision, optimizer: str
) -> None:
    """Three steps, the first clipped and the second not: weights, moments and the reported norm.

    Then each engine continues from the state of the other.
    """
    by_numpy, by_torch = make_pair(
        model, precision, optimizer=optimizer, weight_decay=0.3, grad_clip=1.0
    )
    tolerance, clipped = TOLERANCE[precision], []
    for step, weight in enumerate((10.0, 1e-3, 0.1)):
        assert_losses_near(
            by_torch.accumulate(make_batch(step), weight),
            by_numpy.accumulate(make_batch(step), weight),
            tolerance,
        )
        update, expected = by_torch.update(1e-2 / (step + 1)), by_numpy.update(1e-2 / (step + 1))
        assert update.norm == pytest.approx(expected.norm, rel=tolerance)
        assert update[1:] == expected[1:] == (True, True)
        clipped.append(expected.norm > 1)
    assert clipped[:2] == [True, False]
    states = copy_arrays(by_numpy.state()), copy_arrays(by_torch.state())
    assert_near(states[1], states[0], tolerance)
    assert by_torch.updates == by_numpy.updates == 3
    frozen = {
        name: array
        for name, array in by_numpy.weights.arrays.items()
        if not by_numpy.table[name].trained
    }
    for engine, state in zip((by_torch, by_numpy), states):
        engine.load((frozen | state).items(), 3)
        engine.accumulate(make_batch(3), 0.1)
        engine.update(1e-2)
    assert_near(dict(by_torch.state()), dict(by_numpy.state()), tolerance)
