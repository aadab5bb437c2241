"""Hand-written gradients against autograd, losses and dropout, for every switch."""

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from both_engines import (  # noqa: E402 - need PyTorch
    TOLERANCE,
    TRAINED,
    assert_losses_near,
    assert_near,
    copy_arrays,
    make_batch,
    make_pair,
)

from glasslm.config.schema import ModelConfig, Position, Precision  # noqa: E402
from glasslm.engines.dropout import mix_bits, row_keys  # noqa: E402
from glasslm.engines.numpy import ops  # noqa: E402
from glasslm.engines.torch import layers  # noqa: E402
from glasslm.errors import InputError  # noqa: E402
from glasslm.lab.checks.gradient_check import V  # noqa: E402

cases = pytest.mark.parametrize(("name", "model", "precision"), TRAINED)


@cases
def test_gradients_by_hand_are_those_of_autograd(
    name: str, model: ModelConfig, precision: Precision
) -> None:
    by_hand, by_autograd = make_pair(model, precision)
    weight = 1 / np.count_nonzero(make_batch().targets >= 0)
    expected = copy_arrays(by_hand.gradients(make_batch(), weight))
    assert_near(by_autograd.gradients(make_batch(), weight), expected, TOLERANCE[precision])
    losses = (engine.accumulate(make_batch(), weight) for engine in (by_autograd, by_hand))
    assert_losses_near(*losses, TOLERANCE[precision])


@pytest.mark.parametrize("bad", [-1, -V, V, V + 1, 1 << 40, -(1 << 40)])
def test_ids_outside_the_vocabulary_are_refused_alike(bad: int) -> None:
    """NumPy would clip or wrap them; one bad id is enough, in tokens or in targets."""
    tokens, targets = make_batch().tokens.copy(), make_batch().targets.copy()
    tokens[-1, -1] = targets[-1, -1] = bad
    for engine in make_pair(ModelConfig(d_model=16, n_layers=1, n_heads=2, block_size=8), "fp64"):
        good, message = make_batch(), f"token {bad} is not in the vocabulary.* 0 to {V - 1}"
        for call in (
            lambda: engine.losses(tokens, good.targets),  # noqa: B023 - called at once
            lambda: engine.accumulate(good._replace(tokens=tokens), 1.0),  # noqa: B023
            lambda: engine.logits(tokens, engine.new_cache(*tokens.shape), np.full(len(tokens), 1)),  # noqa: B023
            lambda: engine.inspect(good._replace(tokens=tokens), ["embedding"]),  # noqa: B023
        ):
            with pytest.raises(InputError, match=message):
                call()
        if bad == -1:  # a target that is not predicted
            assert engine.losses(good.tokens, targets)[-1, -1] == 0
            continue
        with pytest.raises(InputError, match=f"target {bad} is not in the vocabulary"):
            engine.losses(good.tokens, targets)
        with pytest.raises(InputError, match=f"target {bad} is not in the vocabulary"):
            engine.accumulate(good._replace(targets=targets), 1.0)


@cases
def test_losses_are_the_same_and_zero_where_nothing_is_predicted(
    name: str, model: ModelConfig, precision: Precision
) -> None:
    by_numpy, by_torch = make_pair(model, precision)
    tokens, targets = make_batch().tokens, make_batch().targets
    expected, actual = by_numpy.losses(tokens, targets), by_torch.losses(tokens, targets)
    assert actual.shape == targets.shape
    assert_near({"nats": actual}, {"nats": expected}, TOLERANCE[precision])
    np.testing.assert_array_equal(actual[targets < 0], 0)
    assert (actual[targets >= 0] > 0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
def test_a_model_of_a_usual_size_in_float32(position: Any, dropout: float) -> None:
    """Attention is computed in blocks, and sums are long enough for rounding to matter."""
    model = ModelConfig(
        d_model=96,
        n_layers=3,
        n_heads=6,
        n_kv_heads=3,
        block_size=80,
        position=position,
        dropout=dropout,
    )
    model = dataclasses.replace(model, attention_dropout=dropout)
    by_hand, by_autograd = make_pair(model, "fp32", vocab_size=65)
    data = make_batch(vocab_size=65, width=80)
    expected = copy_arrays(by_hand.gradients(data, 1 / data.targets.size))
    assert_near(by_autograd.gradients(data, 1 / data.targets.size), expected, TOLERANCE["fp32"])


def test_every_position_is_compared_with_dropout_and_without() -> None:
    """Dropout of the attention probabilities takes another path through the engine."""
    for dropping in (False, True):
        positions = {
            model.position for _, model, _ in TRAINED if bool(model.attention_dropout) == dropping
        }
        assert positions == set(get_args(Position))


# -- dropout ---------------------------------------------------------------------------------------

SHAPES = [(3, 4, 5), (2, 300, 257)]  # the second has more than 65,536 elements


def masks(p: float, shape: tuple[int, ...], dtype: str, mask_of: Any) -> tuple[Any, Any]:
    """The masks of PyTorch and NumPy, of this shape."""
    keys = row_keys(seed=42, step=7, rows=np.arange(shape[0]) + 3, site=2)
    assert (keys >= 2**31).any(), "a key that is negative in PyTorch's integers"
    expected = ops.dropout_mask(shape, p, keys, lambda shape: np.full(shape, np.nan, dtype))
    element = torch.arange(expected[0].size).view(shape[1:])
    actual = mask_of(element, p, torch.from_numpy(keys.view(np.int32)), getattr(torch, dtype))
    return actual.numpy(), expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1e-12, 0.1, 0.3, 0.5, 0.75, 0.999])
def test_dropout_removes_the_same_elements_bit_for_bit(
    p: float, shape: tuple[int, ...], dtype: str
) -> None:
    actual, expected = masks(p, shape, dtype, layers.dropout_mask)
    assert actual.dtype == expected.dtype
    assert actual.tobytes() == expected.tobytes()
    if expected.size > 10_000:
        assert (actual == 0).mean() == pytest.approx(p, abs=0.005)


def test_an_element_whose_hash_is_the_threshold_is_kept() -> None:
    keys = row_keys(seed=1, step=2, rows=np.arange(2), site=0)
    hashes = mix_bits(np.arange(12, dtype=np.uint32) ^ keys[:, None])
    p = float(hashes[1, 5]) / 2**32
    element = torch.arange(12)
    actual = layers.dropout_mask(
        element, p, torch.from_numpy(keys.view(np.int32)), torch.float64
    ).numpy()
    np.testing.assert_array_equal(actual > 0, hashes >= hashes[1, 5])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch warns of its own compiler's parts
def test_dropout_removes_the_same_elements_where_it_is_compiled() -> None:
    """A compiler may assume that signed integers do not overflow; those of a hash do."""
    compiled = torch.compile(layers.dropout_mask)
    for p in (0.1, 0.5):
        for shape in SHAPES:
            actual, expected = masks(p, shape, "float32", compiled)
            assert actual.tobytes() == expected.tobytes()
