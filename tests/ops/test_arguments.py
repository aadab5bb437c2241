"""glasslm.ops: wrong arguments are named, with their shape, what was expected, and a cure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import ops
from glasslm.config.schema import ModelConfig
from glasslm.errors import DamagedError, DivergedError, InputError


def ones(*shape: int) -> np.ndarray[Any, Any]:
    """An array of ones in float32."""
    return np.ones(shape, np.float32)


CONFIG = ModelConfig(d_model=8, n_heads=2, n_layers=1, d_ff=4, block_size=4)
DOCUMENTS = dataclasses.replace(CONFIG, document_attention=True)
WEIGHTS = ops.initial_weights(CONFIG, 5)
BLOCK = {
    name.removeprefix("blocks.0."): array
    for name, array in WEIGHTS.items()
    if name.startswith("blocks.0.")
}
HIDDEN = np.array([[True, False], [False, False]])


def change_weights(weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The weights with others instead, whose names have __ for a point; None removes one."""
    merged = weights | {name.replace("__", "."): array for name, array in changes.items()}
    return {name: array for name, array in merged.items() if array is not None}


SHAPES: dict[str, tuple[Callable[[], Any], str]] = {
    "axis of another size": (
        lambda: ops.linear(ones(2, 3), ones(4, 5)),
        r"w has the shape \(4, 5\): expected \(O, I\) with I = 3; reshape or slice it",
    ),
    "transposed": (
        lambda: ops.linear(ones(2, 3), ones(3, 5)),
        r"w has the shape \(3, 5\): expected \(O, I\) with I = 3; give np.swapaxes\(w, -1, -2\)",
    ),
    "too few axes": (
        lambda: ops.linear(np.float32(1), ones(2, 3)),
        r"x has the shape \(\): expected \(\.\.\., I\)",
    ),
    "too many axes": (
        lambda: ops.embedding(np.array([0]), ones(1, 2, 3)),
        r"table has the shape \(1, 2, 3\): expected \(V, D\)",
    ),
    "gain": (
        lambda: ops.rms_norm(ones(2, 3), ones(2)),
        r"gain has the shape \(2,\): expected \(D,\) with D = 3",
    ),
    "bias of a norm": (
        lambda: ops.layer_norm(ones(2, 3), ones(3), ones(1, 3)),
        r"bias has the shape \(1, 3\): expected \(D,\) with D = 3",
    ),
    "down": (
        lambda: ops.swiglu(ones(2), ones(3, 2), ones(3, 2), ones(3, 2)),
        r"w_down has the shape \(3, 2\): expected \(D, F\) .*; give np.swapaxes\(w_down, -1, -2\)",
    ),
    "up": (
        lambda: ops.geglu(ones(2), ones(3, 2), ones(4, 2), ones(2, 3)),
        r"w_up has the shape \(4, 2\): expected \(F, D\) with F = 3, D = 2",
    ),
    "targets": (
        lambda: ops.cross_entropy(ones(2, 3, 5), np.zeros((3, 2), int)),
        r"targets has the shape \(3, 2\): expected \(2, 3\), one id a position",
    ),
    "weight of the loss": (
        lambda: ops.cross_entropy(ones(2, 5), np.zeros(2, int))[1](ones(3)),
        r"weight has the shape \(3,\): expected \(2,\)",
    ),
    "leading axes": (
        lambda: ops.scaled_dot_product_attention(ones(2, 3, 4), ones(3, 3, 4), ones(2, 3, 4)),
        r"k has the shape \(3, 3, 4\): expected \(\.\.\., S, Q\) with \.\.\. = \(2,\), Q = 4",
    ),
    "values": (
        lambda: ops.attention(ones(3, 2, 4), ones(3, 2, 4), ones(4, 2, 4)),
        r"v has the shape \(4, 2, 4\): expected \(\.\.\., S, K, Q\) .*S = 3",
    ),
    "heads": (
        lambda: ops.attention(ones(3, 3, 4), ones(3, 2, 4), ones(3, 2, 4)),
        r"k has the shape \(3, 2, 4\): expected .* K heads that divide the H = 3 heads of q",
    ),
    "more keys without a mask": (
        lambda: ops.attention(ones(3, 2, 4), ones(5, 2, 4), ones(5, 2, 4)),
        r"k has the shape \(5, 2, 4\): expected S = T = 3 .*; give a mask \(T, S\)",
    ),
    "mask": (
        lambda: ops.attention(*3 * [ones(2, 4, 3, 8)], mask=np.ones((2, 1, 5, 4), bool)),
        r"mask has the shape \(2, 1, 5, 4\): expected one that broadcasts to \(2, 3, 4, 4\)",
    ),
    "mask of each text or of each head": (
        lambda: ops.attention(*3 * [ones(3, 4, 3, 8)], mask=np.ones((3, 4, 4), bool)),
        r"mask has the shape \(3, 4, 4\): expected \(T, S\), or all axes .*one mask per text",
    ),
    "mask with more axes": (
        lambda: ops.scaled_dot_product_attention(*3 * [ones(4, 8)], np.ones((2, 4, 4), bool)),
        r"mask has the shape \(2, 4, 4\): expected one that broadcasts to \(4, 4\)",
    ),
    "bias of attention": (
        lambda: ops.attention(*3 * [ones(4, 3, 8)], bias=ones(2, 4, 4)),
        r"bias has the shape \(2, 4, 4\): expected one that broadcasts to \(3, 4, 4\)",
    ),
    "tables of other positions": (
        lambda: ops.rope(ones(2, 5, 3, 8), *ops.rope_tables(np.arange(4), 8)),
        r"cos has the shape \(4, 4\): expected \(T, Q / 2\) = \(5, 4\).*np.arange\(5\), 8\)",
    ),
    "tables of more axes": (
        lambda: ops.rope(ones(5, 3, 8), *ops.rope_tables(np.zeros((2, 5), int), 8)),
        r"cos has the shape \(2, 5, 4\): expected",
    ),
    "odd head size": (lambda: ops.rope_tables(np.arange(3), 7), "Q is 7: expected an even"),
    "odd width": (lambda: ops.sinusoidal_positions(3, 7), "D is 7: expected an even"),
    "x of a block": (
        lambda: ops.block(ones(5, 8), BLOCK, CONFIG),
        r"x has the shape \(5, 8\): expected \(\.\.\., T, D\) with D = 8 and T up to 4",
    ),
    "tokens of a model": (
        lambda: ops.transformer(np.zeros((2, 5), int), WEIGHTS, CONFIG),
        r"tokens has the shape \(2, 5\): expected \(\.\.\., T\) with T up to 4",
    ),
    "weight of a block": (
        lambda: ops.block(
            ones(4, 8), change_weights(BLOCK, feedforward__up__weight=ones(8, 4)), CONFIG
        ),
        r"weights\['feedforward.up.weight'\] has the shape \(8, 4\): expected \(4, 8\), \(out, in",
    ),
    "missing weight": (
        lambda: ops.block(ones(4, 8), change_weights(BLOCK, attention__q__weight=None), CONFIG),
        r"weights lack 'attention.q.weight', with the shape \(8, 8\): expected attention_norm",
    ),
    "unknown weight": (
        lambda: ops.transformer([0], change_weights(WEIGHTS, head__weight=ones(5, 8)), CONFIG),
        "weights hold 'head.weight', which this config does not have",
    ),
    "no embedding": (
        lambda: ops.transformer([0], change_weights(WEIGHTS, embedding__weight=None), CONFIG),
        "weights lack 'embedding.weight'",
    ),
    "moment of another shape": (
        lambda: ops.adamw(ones(2, 3), ones(2, 3), ones(3, 2), ones(2, 3), t=1, lr=0.1),
        r"m is float32 \(3, 2\) and g is float32 \(2, 3\): expected one shape and type",
    ),
    "gradient of another shape": (
        lambda: ops.sgd(ones(2, 3), ones(3), ones(2, 3), lr=0.1),
        r"g is float32 \(3,\) and p is float32 \(2, 3\): expected one shape and type",
    ),
    "vector in muon": (
        lambda: ops.muon(ones(3), ones(3), ones(3), lr=0.1),
        r"p has the shape \(3,\): expected a matrix \(O, I\); update vectors with adamw",
    ),
    "too short a text": (
        lambda: ops.sample_batch(np.arange(4), 2, 4),
        r"tokens is int64 with the shape \(4,\): expected integers \(N,\) with N above the context",
    ),
    "no axis": (lambda: ops.softmax(1.0), r"axis is -1: x has the shape \(\), with 0 axes"),
    "no such axis": (lambda: ops.softmax(ones(2), 1), r"axis is 1: x has the shape \(2,\)"),
    "nothing": (
        lambda: ops.gelu(ones(0, 3)),
        r"x has the shape \(0, 3\): expected at least one element on each axis",
    ),
}
VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "id above": (
        lambda: ops.embedding([[0, 5]], ones(5, 2)),
        r"tokens\[0, 1\] is 5: expected ids from 0 to 4",
    ),
    "id below": (
        lambda: ops.embedding(-1, ones(5, 2)),
        r"tokens is -1: expected ids from 0 to 4",
    ),
    "target below": (
        lambda: ops.cross_entropy(ones(2, 5), [0, -2]),
        r"targets\[1\] is -2: expected ids from -1 to 4",
    ),
    "token of a model": (
        lambda: ops.transformer([0, 5], WEIGHTS, CONFIG),
        r"tokens\[1\] is 5: expected ids from 0 to 4; encode the text",
    ),
    "floats as ids": (
        lambda: ops.embedding([0.0], ones(5, 2)),
        r"tokens is float64, with the shape \(1,\): expected ids",
    ),
    "bools as ids": (lambda: ops.embedding([True], ones(5, 2)), "tokens is bool.*expected ids"),
    "floats as positions": (lambda: ops.rope_tables([0.5], 4), "positions is float64"),
    "floats as a mask": (
        lambda: ops.attention(*3 * [ones(2, 1, 4)], mask=ones(2, 2)),
        r"mask is float32, with the shape \(2, 2\): expected bool.*give mask.astype\(bool\)",
    ),
    "a query that sees nothing": (
        lambda: ops.attention(*3 * [ones(2, 1, 4)], mask=HIDDEN),
        r"mask hides every key from query \[0, 1\] of scores with the shape \(1, 2, 2\)",
    ),
    "a bias that hides everything": (
        lambda: ops.scaled_dot_product_attention(*3 * [ones(2, 4)], bias=-np.inf * ones(2, 2)),
        r"bias hides every key from query \[0\]",
    ),
    "mask and bias that hide everything": (
        lambda: ops.attention(
            *3 * [ones(2, 1, 4)], bias=np.array([[-np.inf, 0], [0, 0]], np.float32)
        ),
        r"hides every key from query \[0, 0\]",
    ),
    "a bias of nan": (
        lambda: ops.attention(*3 * [ones(2, 1, 4)], bias=np.nan * ones(2, 2)),
        "bias holds nan or inf",
    ),
    "a row of minus infinity": (
        lambda: ops.softmax(-np.inf * ones(2, 3)),
        r"x, with the shape \(2, 3\), is -inf all along axis -1",
    ),
    "two types": (
        lambda: ops.linear(ones(2, 3), np.ones((4, 3))),
        r"w is float64 and x is float32: expected one type; give w.astype\(np.float32\)",
    ),
    "tables of another type": (
        lambda: ops.rope(np.ones((2, 1, 4)), *ops.rope_tables(np.arange(2), 4)),
        r"cos is float32 and x is float64: expected one type; give cos.astype\(np.float64\)",
    ),
    "bias of another type": (
        lambda: ops.attention(*3 * [ones(2, 1, 4)], bias=np.zeros((2, 2))),
        "bias is float64 and q is float32",
    ),
    "weight of another type": (
        lambda: ops.block(np.ones((4, 8)), BLOCK, CONFIG),
        r"weights\['.*'\] is float32 and the input is float64",
    ),
    "type of a table": (lambda: ops.alibi_bias(2, 3, np.float16), "dtype is float16: expected"),
    "p": (lambda: ops.dropout(ones(2), 1.0, 0), "p is 1.0: expected a number, at least 0"),
    "seed": (lambda: ops.dropout(ones(2), 0.5, -1), "seed is -1: expected an integer, 0 or more"),
    "eps": (
        lambda: ops.rms_norm(ones(2), ones(2), -1.0),
        "eps is -1.0: expected a number, at least 0",
    ),
    "T": (lambda: ops.causal_mask(0), "T is 0: expected an integer, 1 or more"),
    "window": (lambda: ops.causal_mask(3, 1.5), "window is 1.5: expected an integer"),  # type: ignore[arg-type]
    "config": (lambda: ops.block(ones(4, 8), BLOCK, {}), "config is dict: expected a ModelConfig"),  # type: ignore[arg-type]
    "weights": (lambda: ops.transformer([0], [], CONFIG), "weights is list: expected a dictionary"),  # type: ignore[arg-type]
    "update 0": (
        lambda: ops.adamw(*matrices(4), t=0, lr=0.1),
        "t is 0: expected an integer, 1 or",
    ),
    "lr": (
        lambda: ops.sgd(*matrices(3), lr=np.nan),
        "lr is nan: expected a number, 0 or more",
    ),
    "betas": (
        lambda: ops.adamw(*matrices(4), t=1, lr=0.1, betas=(0.9, 1.0)),
        "each of betas is 1.0",
    ),
    "momentum": (
        lambda: ops.sgd(*matrices(3), lr=0.1, momentum=1.0),
        "momentum is 1.0: expected a number",
    ),
    "max_norm": (lambda: ops.clip_by_norm([ones(2)], 0.0), "max_norm is 0.0: expected a number"),
    "max_value": (lambda: ops.clip_by_value([ones(2)], -1.0), "max_value is -1.0: expected a num"),
    "schedule": (lambda: ops.learning_rate(0, 9, lr=1.0, schedule="step"), "schedule is step"),  # type: ignore[arg-type]
    "step": (lambda: ops.step_decay(-1, lr=1.0, every=2), "step is -1: expected an integer, 0"),
    "an array as a rate": (
        lambda: ops.sgd(*matrices(3), lr=ones(2)),  # type: ignore[arg-type]
        r"lr is \[1. 1.\]: expected a number, 0 or more, and finite",
    ),
    "a text as a bound": (
        lambda: ops.clip_by_value([ones(2)], "1"),  # type: ignore[arg-type]
        "max_value is 1: expected a number",
    ),
    "rows of two lengths": (
        lambda: ops.softmax([[1.0], [1.0, 2.0]]),
        "x is not an array .*: give rows of one length",
    ),
    "every": (lambda: ops.step_decay(1, lr=1.0, every=0), "every is 0: expected an integer, 1"),
    "factor": (
        lambda: ops.step_decay(1, lr=1.0, every=1, factor=2.0),
        "factor is 2.0: expected a num",
    ),
    "a layer above the model": (
        lambda: ops.block(ones(4, 8), BLOCK, CONFIG, layer=1),
        "layer is 1: expected below 1, the n_layers of the config",
    ),
    "documents in a block": (
        lambda: ops.block(ones(4, 8), BLOCK, DOCUMENTS),
        "config has document_attention, but a block gets no tokens .*document_attention=False",
    ),
    "documents without an end": (
        lambda: ops.transformer([0], WEIGHTS, DOCUMENTS),
        "document_end_id -1: expected a token from 0 to 4 that ends a document",
    ),
    "a negative seed of weights": (
        lambda: ops.initial_weights(CONFIG, 5, seed=-1),
        "seed is -1: expected an integer, 0 or more",
    ),
    "half a seed": (
        lambda: ops.initial_weights(CONFIG, 5, seed=1.5),  # type: ignore[arg-type]
        "seed is 1.5: expected an integer, 0 or more",
    ),
    "a seed of 65 bits": (
        lambda: ops.dropout(ones(2), 0.5, 2**64),
        r"seed is 18446744073709551616: expected below 2\*\*64",
    ),
    "a word as a type": (
        lambda: ops.initial_weights(CONFIG, 5, dtype="spam"),
        "dtype is spam: expected np.float32 or np.float64",
    ),
    "a list as a type": (
        lambda: ops.rope_tables(np.arange(3), 4, dtype=["x"]),
        r"dtype is \['x'\]: expected np.float32",
    ),
    "one beta": (
        lambda: ops.adamw(*matrices(4), t=1, lr=0.1, betas=0.9),  # type: ignore[arg-type]
        r"betas is 0.9: expected a pair, such as \(0.9, 0.95\)",
    ),
    "three betas": (
        lambda: ops.adamw(*matrices(4), t=1, lr=0.1, betas=(0.9, 0.9, 0.9)),  # type: ignore[arg-type]
        r"betas is \(0.9, 0.9, 0.9\): expected a pair",
    ),
    "a rate above all floats": (
        lambda: ops.sgd(*matrices(3), lr=10**309),
        "lr is 1000.*: expected a number, 0 or more, and finite",
    ),
    "a word as the weight of the loss": (
        lambda: ops.cross_entropy(ones(2, 5), [0, 1])[1]("x"),
        "weight is x: expected a number, finite",
    ),
    "nan as the weight of the loss": (
        lambda: ops.cross_entropy(ones(2, 5), [0, 1])[1](np.nan),
        "weight is nan: expected a number, finite",
    ),
    "rows of two lengths as a mask": (
        lambda: ops.attention(*3 * [ones(2, 1, 4)], mask=[[True], [True, True]]),
        "mask is not an array .*: give rows of one length",
    ),
    "a word as a flag": (
        lambda: ops.rope(ones(2, 1, 4), *ops.rope_tables([0, 1], 4), interleaved="no"),  # type: ignore[arg-type]
        "interleaved is no: expected True or False",
    ),
    "an allocator that is none": (
        lambda: ops.relu(ones(2), new=np.ones(2)),  # type: ignore[arg-type]
        r"new is \[1. 1.\]: expected a function new\(shape\)",
    ),
    "an allocator without an array": (
        lambda: ops.relu(ones(2), new=list),  # type: ignore[arg-type]
        r"new\(\(2,\)\) returned list: expected an array; leave",
    ),
    "a step above all integers": (
        lambda: ops.sample_batch(np.arange(9), 2, 4, step=2**64),
        r"step is 18446744073709551616: expected below 2\*\*63",
    ),
    "a list of schedules": (
        lambda: ops.learning_rate(0, 9, lr=1.0, schedule=np.array(["wsd", "cosine"])),  # type: ignore[arg-type]
        r"schedule is \['wsd' 'cosine'\]: expected one of",
    ),
    "no path": (lambda: ops.load_checkpoint(None), "path is None: expected the path of a file"),  # type: ignore[arg-type]
    "a path with a zero": (
        lambda: ops.save_checkpoint("a\0", {"w": ones(2)}),
        r"path is 'a\\x00': expected the path of a file",
    ),
}


def matrices(count: int) -> list[np.ndarray[Any, Any]]:
    """Arrays of their own for an optimizer."""
    return [ones(2, 3) for _ in range(count)]


@pytest.mark.parametrize(
    ("call", "message"), [*SHAPES.values(), *VALUES.values()], ids=[*SHAPES, *VALUES]
)
def test_wrong_arguments_are_named_with_a_cure(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        call()
    assert len(str(error.value)) < 400


ONE_ARRAY: list[tuple[str, Callable[[Any], Any]]] = [
    *((name, getattr(ops, name)) for name in ("softmax", "silu", "gelu", "relu", "relu2")),
    ("linear x", lambda x: ops.linear(x, ones(2, 3))),
    ("linear w", lambda x: ops.linear(ones(2, 3), x)),
    ("embedding", lambda x: ops.embedding([0], x)),
    ("rms_norm", lambda x: ops.rms_norm(x, ones(3))),
    ("layer_norm", lambda x: ops.layer_norm(x, ones(3), ones(3))),
    ("swiglu", lambda x: ops.swiglu(x, ones(2, 3), ones(2, 3), ones(3, 2))),
    ("dropout", lambda x: ops.dropout(x, 0.5, 0)),
    ("cross_entropy", lambda x: ops.cross_entropy(x, [0, 0])),
    ("rope", lambda x: ops.rope(x, ones(2, 1), ones(2, 1))),
    ("attention", lambda x: ops.attention(x, ones(2, 3, 2), ones(2, 3, 2))),
    ("scaled_dot_product_attention", lambda x: ops.scaled_dot_product_attention(x, x, x)),
    ("block", lambda x: ops.block(x, BLOCK, CONFIG)),
    ("adamw g", lambda x: ops.adamw(ones(2, 3), x, ones(2, 3), ones(2, 3), t=1, lr=0.1)),
    ("adamw p", lambda x: ops.adamw(x, *matrices(3), t=1, lr=0.1)),
    ("clip_by_norm", lambda x: ops.clip_by_norm(x, 1.0)),
    ("clip_by_norm of several", lambda x: ops.clip_by_norm({"w": x}, 1.0)),
    ("clip_by_value", lambda x: ops.clip_by_value([x], 1.0)),
]


@pytest.mark.parametrize(("name", "call"), ONE_ARRAY, ids=[name for name, _ in ONE_ARRAY])
@pytest.mark.parametrize(
    "array",
    [
        np.ones((2, 3), int),
        np.ones((2, 3), np.float16),
        np.ones((2, 3), bool),
        np.ones((2, 3), complex),
        np.ma.masked_less(np.ones((2, 3)), 2),
        None,
    ],
    ids=["int64", "float16", "bool", "complex", "masked", "None"],
)
def test_arrays_of_other_types_are_refused(
    name: str, call: Callable[[Any], Any], array: Any
) -> None:
    with pytest.raises(InputError, match="expected an array of float32 or float64"):
        call(array)


def test_arrays_that_cannot_be_updated_in_place_are_refused() -> None:
    p, m = ones(2, 3), ones(2, 3)
    p.flags.writeable = False
    with pytest.raises(InputError, match=r"p is read-only.*: give p.copy\(\)"):
        ops.sgd(p, ones(2, 3), m, lr=0.1)
    with pytest.raises(InputError, match="p is list: expected an array"):
        ops.sgd([[1.0]], ones(1, 1), ones(1, 1), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="v and m share memory"):
        ops.adamw(ones(2, 3), ones(2, 3), m, m, t=1, lr=0.1)
    assert np.array_equal(m, ones(2, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_are_not_clipped(value: float) -> None:
    with pytest.raises(DivergedError, match="the norm of the gradients is"):
        ops.clip_by_norm([ones(2), value * ones(3)], 1.0)
    with pytest.raises(DivergedError, match=r"hold nan, in an array with the shape \(3,\)"):
        ops.clip_by_value({"w": np.nan * ones(3)}, 1.0)


def test_checkpoints_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    for arrays, message in (
        ({"model": {"w": ones(2)}}, r"arrays\['model'\] is a dictionary.*'model/w'"),
        ({"w": "text"}, r"arrays\['w'\] is <U4"),
        ({"w": None}, r"arrays\['w'\] is object"),
        ({3: ones(2)}, "the name of an array is 3"),
        ([ones(2)], "arrays is list: expected a dictionary"),
    ):
        with pytest.raises(InputError, match=message):
            ops.save_checkpoint(path, arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is a folder"):
        ops.save_checkpoint(tmp_path, {"w": ones(2)})
    with pytest.raises(InputError, match="there is no file"):
        ops.load_checkpoint(path)
    ops.save_checkpoint(path, {"w": ones(1000)})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:5], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"c\.safetensors is not a whole safetensors file"):
            ops.load_checkpoint(path)
