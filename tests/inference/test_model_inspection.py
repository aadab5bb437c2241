"""Model.inspect and its shortcuts: the numbers are those that the model itself computes with."""

from pathlib import Path

import numpy as np
import pytest

from doubles import make_run
from glasslm.errors import InputError
from glasslm.inference.trained_model import Model, load_model

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
TEXT = "To be, or not"


@pytest.fixture(scope="module", params=["numpy", "torch"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    if request.param == "torch":
        pytest.importorskip("torch")
    run = make_run(tmp_path_factory.mktemp("run"), ALPHABET)
    return load_model(run, engine=request.param, precision="fp64")


def test_attention_is_causal_and_sums_to_one(model: Model) -> None:
    weights = model.attention(TEXT)
    c = model.config.model
    assert weights.shape == (c.n_layers, c.n_heads, len(TEXT), len(TEXT))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-12)
    assert (np.triu(weights, 1) == 0).all()


def test_the_stream_adds_up_and_ends_in_the_logits(model: Model) -> None:
    found = model.inspect(TEXT)
    stream = model.activations(TEXT)
    assert stream.shape == (model.config.model.n_layers + 1, len(TEXT), model.config.model.d_model)
    for layer in range(model.config.model.n_layers):
        added = found[f"blocks.{layer}.attention"] + found[f"blocks.{layer}.feedforward"]
        np.testing.assert_allclose(stream[layer + 1], stream[layer] + added, atol=1e-12)
    np.testing.assert_allclose(found["logits"][-1], model.logits(TEXT), atol=1e-5)


def test_gradients_predict_the_change_of_the_loss(model: Model) -> None:
    """A small step along the gradient of each weight changes the loss by its squared norm."""
    gradients = model.gradients(TEXT)
    assert set(gradients) == {name for name, spec in model.parameters.items() if spec.trained}
    state = {name: np.array(array) for name, array in model.engine.state() if name in gradients}
    before, step = model.losses(TEXT).mean(), 1e-6
    for name in (next(iter(gradients)), "blocks.0.attention.q.weight"):
        changed = state | {name: state[name] + step * gradients[name]}
        model.engine.load(iter(changed.items()))
        change = (model.losses(TEXT).mean() - before) / step
        assert change == pytest.approx((gradients[name] ** 2).sum(), rel=1e-3)
    model.engine.load(iter(state.items()))


def test_what_cannot_be_inspected_is_named(model: Model) -> None:
    for text in ("", "T"):
        with pytest.raises(InputError, match="at least two"):
            model.inspect(text)
    with pytest.raises(InputError, match=r"did you mean blocks\.0\.attention\.weights"):
        model.inspect(TEXT, ["blocks.0.attention.weight"])


def test_of_a_long_text_the_newest_tokens_are_read(model: Model, tmp_path: Path) -> None:
    long = TEXT * 10
    block_size = model.config.model.block_size
    np.testing.assert_array_equal(model.activations(long), model.activations(long[-block_size:]))


def test_heads_are_switched_off_by_edits(
    model: Model,
) -> None:
    """Switching off all heads of a layer removes what its attention adds."""
    heads = model.inspect(TEXT, ["blocks.0.attention.heads"])["blocks.0.attention.heads"]
    c = model.config.model
    assert heads.shape == (len(TEXT), c.n_heads, c.d_model // c.n_heads)
    same = model.inspect(TEXT, ["logits"], [("blocks.0.attention.heads", np.s_[:], heads)])
    np.testing.assert_array_equal(same["logits"], model.inspect(TEXT, ["logits"])["logits"])
    edits = [("blocks.0.attention.heads", np.s_[:, :, h], 0.0) for h in range(c.n_heads)]
    assert not model.inspect(TEXT, ["blocks.0.attention"], edits)["blocks.0.attention"].any()
