"""Edits of activations, and the readout: causal, equal in both engines, and exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_inspection import SMALL, VARIANTS, B, T, build_engine, make_batch, make_config

from glasslm.config.schema import ModelConfig
from glasslm.engines.inspection import Edit, forward_names
from glasslm.engines.protocol import Engine
from glasslm.errors import InputError

FIXED = (".scores", ".weights", ".preactivation")
ENGINES = ["numpy", "torch"]


def editable_names(c: ModelConfig) -> list[str]:
    return [
        name
        for name in forward_names(c)
        if not name.endswith(FIXED) and ".experts." not in name and name not in ("norm", "logits")
    ]


def build(engine: str, variant: str, precision: str = "fp64") -> Engine:
    if engine == "torch":
        pytest.importorskip("torch")
    return build_engine(engine, make_config(VARIANTS[variant]), precision)


def some_edits(arrays: dict[str, Any], c: ModelConfig) -> list[Edit]:
    """An edit of every kind, each in its own row and position; shapes as in `arrays`."""
    generator = np.random.default_rng(3)
    edits = []
    for i, name in enumerate(editable_names(c)):
        row, position = i % B, i % T
        value = generator.standard_normal(arrays[name].shape[2:])
        edits.append(Edit(name, (row, position), 0.0 if i % 3 == 0 else value))
    return [*edits, Edit("blocks.1.attention.heads", np.s_[0, :, 1], 0.5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_engines_edit_alike(variant: str) -> None:
    ours, theirs = (build(name, variant) for name in ENGINES)
    c, batch = make_config(VARIANTS[variant]).model, make_batch()
    names = forward_names(c)
    edits = some_edits(ours.inspect(batch, names), c)
    a, b = (engine.inspect(batch, names, edits) for engine in (ours, theirs))
    plain = ours.inspect(batch, names)
    assert np.abs(a["logits"] - plain["logits"]).max() > 1e-3
    for name in names:
        hidden = np.isneginf(a[name])
        x, y = a[name][~hidden], b[name][~hidden]
        scale = max(1e-3, np.abs(y).max(initial=0))
        np.testing.assert_allclose(x, y, atol=1e-10 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", ["default", "post", "experts", "flash"])
def test_writing_what_is_there_changes_nothing(engine: str, variant: str) -> None:
    machine, c = build(engine, variant, "fp32"), make_config(VARIANTS[variant]).model
    batch, names = make_batch(), forward_names(c)
    plain = machine.inspect(batch, names)
    edits = [Edit(name, np.s_[:], plain[name]) for name in editable_names(c)]
    edited = machine.inspect(batch, names, edits)
    assert all(edited[name].tobytes() == plain[name].tobytes() for name in names)
    again = machine.inspect(batch, names)  # and edits leave nothing behind
    assert all(again[name].tobytes() == plain[name].tobytes() for name in names)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_changes_its_row_from_its_position_on(engine: str) -> None:
    machine, batch = build(engine, "default"), make_batch()
    plain = machine.inspect(batch, ["logits"])["logits"]
    for name in editable_names(SMALL):
        edited = machine.inspect(batch, ["logits"], [Edit(name, (1, 4), 0.7)])["logits"]
        changed = np.abs(edited - plain).max(-1) > 0
        assert changed[1, 4], name
        changed[1, 4:] = False
        assert not changed.any(), name


@pytest.mark.parametrize("engine", ENGINES)
def test_a_removed_sublayer_is_missing_in_the_stream(engine: str) -> None:
    machine, batch = build(engine, "default"), make_batch()
    names = ["embedding", "blocks.0.attention", "blocks.0.feedforward", "blocks.0"]
    edits = [Edit("blocks.0.attention", np.s_[:], 0.0), Edit("blocks.0.feedforward", np.s_[:], 0.0)]
    arrays = machine.inspect(batch, names, edits)
    np.testing.assert_array_equal(arrays["blocks.0"], arrays["embedding"])
    # Heads and neurons are what their matrices read: without them the sublayer writes nothing.
    for inner in ("attention.heads", "feedforward.activation"):
        arrays = machine.inspect(batch, names, [Edit(f"blocks.0.{inner}", np.s_[:], 0.0)])
        assert not arrays[f"blocks.0.{inner.partition('.')[0]}"].any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_readout_of_the_last_stream_gives_the_logits(engine: str, variant: str) -> None:
    machine = build(engine, variant)
    arrays = machine.inspect(make_batch(), ["blocks.1", "logits"])
    stream = arrays["blocks.1"].reshape(-1, SMALL.d_model)
    before = stream.copy()
    logits = machine.readout(stream)
    np.testing.assert_allclose(logits, arrays["logits"].reshape(len(logits), -1), atol=1e-10)
    np.testing.assert_array_equal(stream, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_edited_is_refused_by_name(engine: str) -> None:
    machine, batch = build(engine, "experts"), make_batch()
    for name in (
        "logits",
        "blocks.0.attention.weights",
        "blocks.0.feedforward.experts.0.activation",
    ):
        with pytest.raises(InputError, match="cannot be edited"):
            machine.inspect(batch, ["logits"], [Edit(name, np.s_[:], 0.0)])
    with pytest.raises(InputError, match=r"did you mean .*blocks\.0\.attention"):
        machine.inspect(batch, ["logits"], [Edit("blocks.0.atention", np.s_[:], 0.0)])
    with pytest.raises(InputError, match="no gradients"):
        machine.inspect(batch, ["gradient/blocks.0"], [Edit("blocks.0", np.s_[:], 0.0)])
