"""glasslm.ops: gradients, types, and inputs and outputs that nothing else holds."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from op_calls import CALLS, LEADS, Array, Call, loss, upstream

from glasslm import ops
from glasslm.errors import InputError
from glasslm.lab.checks.finite_differences import check_gradients

NAMES = [call.name for call in CALLS]
each_call = pytest.mark.parametrize("call", CALLS, ids=NAMES)


def test_every_function_with_a_gradient_has_a_call_here_and_a_heading_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    modules = {path.stem for path in Path(ops.__file__).parent.glob("*.py")}
    assert modules.isdisjoint(ops.__all__), "the page would show the module"
    for name in ops.__all__:
        function = getattr(ops, name)
        assert f"\n::: glasslm.ops.{name}\n" in page, name
        assert inspect.getdoc(function), name
        assert "Raises" in (inspect.getdoc(function) or ""), name
        if "backward" in (inspect.getdoc(function) or ""):
            assert name in NAMES, name


@pytest.mark.parametrize(
    ("call", "lead"),
    [(call, lead) for call in CALLS for lead in (LEADS if call.has_leading_axes else [()])],
    ids=lambda value: value.name if isinstance(value, Call) else str(value),
)
def test_gradients_equal_finite_differences(call: Call, lead: tuple[int, ...]) -> None:
    inputs = call.draw(lead)
    y, backward = call.run(inputs)
    result = check_gradients(
        call.name,
        inputs,
        lambda: loss(call.run(inputs)[0]),
        lambda: call.run(inputs)[1](upstream(y)),
        np.random.default_rng(1),
        kinks=True,
        sample=6,
    )
    assert result.passed, result
    for name, gradient in backward(upstream(y)).items():
        assert gradient.shape == inputs[name].shape, name


@each_call
def test_float32_stays_float32_and_agrees_with_float64(call: Call) -> None:
    single, double = call.draw((2, 3), np.float32), call.draw((2, 3))
    y, backward = call.run(single)
    expected, expected_back = call.run(double)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)
    gradients = backward(upstream(y))
    for name, gradient in expected_back(upstream(expected)).items():
        assert gradients[name].dtype == np.float32, name
        assert gradient.dtype == np.float64, name
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-3, atol=1e-3)


@each_call
def test_strided_and_read_only_inputs_give_the_same_bits_and_stay_the_same(call: Call) -> None:
    inputs = call.draw((2, 3))
    y, backward = call.run(inputs)
    strided = {}
    for name, array in inputs.items():
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]) if array.ndim else (2,))
        view = wide[..., ::-2] if array.ndim else wide[0:1].reshape(())
        view[...] = array
        view.flags.writeable = False
        strided[name] = view
    other, other_back = call.run(strided)
    assert np.array_equal(y, other)
    dy = upstream(y)
    dy.flags.writeable = False
    gradients = backward(dy)
    for name, gradient in other_back(dy[...]).items():
        assert np.array_equal(gradient, gradients[name]), name
        assert np.array_equal(strided[name], call.draw((2, 3))[name]), name


@each_call
def test_changes_of_arrays_after_the_call_do_not_change_the_gradient(call: Call) -> None:
    """What backward needs is its own: neither the inputs, nor the output, nor other gradients."""
    inputs = call.draw((2, 3))
    y, backward = call.run(inputs)
    expected = call.run(call.draw((2, 3)))[1](upstream(y))
    for array in inputs.values():
        array[...] = np.nan
    dy = upstream(y)
    y[...] = np.nan
    gradients = backward(dy)
    for name, gradient in gradients.items():
        assert np.array_equal(gradient, expected[name]), name
    assert np.array_equal(dy, upstream(y))
    if call.name == "transformer":
        with pytest.raises(InputError, match="call transformer again"):
            backward(dy)
        return
    for gradient in gradients.values():
        gradient[...] = np.nan
    for name, gradient in backward(dy).items():
        assert np.array_equal(gradient, expected[name]), name


@each_call
def test_results_share_no_memory(call: Call) -> None:
    inputs = call.draw((2, 3))
    y, backward = call.run(inputs)
    arrays = [*inputs.values(), y, *backward(upstream(y)).values()]
    for index, array in enumerate(arrays):
        assert not any(np.shares_memory(array, other) for other in arrays[:index])


@each_call
def test_backward_refuses_gradients_that_do_not_fit(call: Call) -> None:
    y, backward = call.run(call.draw((2, 3), np.float32))
    for wrong, message in (
        (np.zeros((*y.shape, 1), np.float32), r"has the shape \(.*\): expected \("),
        (np.zeros(y.shape), "is float64: expected float32, the type of the output"),
        (np.zeros(y.shape, int), "expected an array of float32 or float64"),
    ):
        with pytest.raises(InputError, match=message):
            backward(wrong)


NEW: list[tuple[str, Callable[..., Any]]] = [
    ("linear", lambda x, new: ops.linear(x, np.ones((2, 4), np.float32), new=new)),
    ("softmax", lambda x, new: ops.softmax(x, new=new)),
    ("attention", lambda x, new: ops.attention(*3 * [x[:, None]], new=new)),
    ("cross_entropy", lambda x, new: ops.cross_entropy(x, np.zeros(3, int), new=new)),
]


@pytest.mark.parametrize(("name", "call"), NEW, ids=[name for name, _ in NEW])
def test_new_allocates_and_its_arrays_must_have_the_type(
    name: str, call: Callable[..., Any]
) -> None:
    x = np.ones((3, 4), np.float32)
    shapes: list[tuple[int, ...]] = []

    def new(shape: tuple[int, ...]) -> Array:
        shapes.append(shape)
        return np.full(shape, np.nan, np.float32)

    y, _ = call(x, new)
    assert shapes
    assert np.array_equal(y, call(x, partial(np.empty, dtype=np.float32))[0])
    assert np.isfinite(y).all()
    with pytest.raises(InputError, match=r"new\(.*\) returned float64 .*: expected float32"):
        call(x, np.empty)


def test_numbers_and_lists_are_arrays() -> None:
    y, backward = ops.silu(0.5)
    assert y.shape == ()
    assert backward(1.0).shape == ()
    assert ops.softmax([[1.0, 2.0], [3.0, 3.0]])[0].shape == (2, 2)


def test_the_module_loads_without_torch_and_on_first_use() -> None:
    program = (
        "import sys, glasslm\n"
        "assert 'numpy' not in sys.modules\n"
        "assert glasslm.ops.softmax([0.0])[0] == 1\n"
        "from glasslm import ops\n"
        "import glasslm.ops\n"
        "slow = {'torch', 'scipy', 'matplotlib', 'transformers', 'requests'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
