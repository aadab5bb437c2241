"""Correct engines agree, and an error planted in either is detected and named."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_check import HANDFUL, USED_BY, plant  # noqa: E402 - need PyTorch

from glasslm.config.schema import ModelConfig  # noqa: E402
from glasslm.engines.dropout import row_keys  # noqa: E402
from glasslm.engines.numpy import engine as numpy_engine  # noqa: E402
from glasslm.engines.numpy import inference, inference_norms  # noqa: E402
from glasslm.engines.numpy import optimizer as numpy_optimizer  # noqa: E402
from glasslm.engines.numpy import positions as numpy_positions  # noqa: E402
from glasslm.engines.numpy.engine import NumpyEngine  # noqa: E402
from glasslm.engines.torch import layers  # noqa: E402
from glasslm.engines.torch import optimizer as torch_optimizer  # noqa: E402
from glasslm.engines.torch.engine import TorchEngine  # noqa: E402
from glasslm.engines.torch.kv_cache import KVCache  # noqa: E402
from glasslm.lab.checks import gradient_check, parity  # noqa: E402
from glasslm.lab.checks.gradient_check import small_model  # noqa: E402
from glasslm.lab.checks.parity import COLUMNS, TOLERANCE, LocatedError, Parity, check_model  # noqa: E402

Array = np.ndarray[Any, Any]
Patch = pytest.MonkeyPatch


def compare_engines(precision: parity.ParityPrecision = "fp64", **switches: Any) -> Parity:
    """The errors between the engines for a model with these switches."""
    config = dataclasses.replace(small_model(), d_model=16, block_size=12, **switches)
    with Patch.context() as patch:
        patch.setattr(parity, "STEPS", 4)  # of each optimizer; more make a difference larger
        return check_model(str(switches), config, precision)


# -- correct engines -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    "config", HANDFUL, ids=lambda config: f"{config.feedforward} {config.position}"
)
def test_the_engines_agree(config: ModelConfig, precision: parity.ParityPrecision) -> None:
    result = check_model(
        "handful", dataclasses.replace(config, d_model=32, block_size=12), precision
    )
    assert result.failed_columns == [], result
    assert all(getattr(result, column).error > 0 for column in COLUMNS), (
        "rounding differs: something was compared"
    )


def test_every_switch_and_the_random_combinations_have_a_row(monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        parity, "check_model", lambda case, config, precision, seed, **_: (case, config, precision)
    )
    *rows, last = list[Any](parity.check_models("fp64", 7))
    cases = [*gradient_check.single_switches(), *gradient_check.combinations(7, 0)]
    assert last[0] == "weighted targets"
    assert [row[0] for row in rows] == [case for case, _ in cases]
    for (_, config, _), (_, small) in zip(rows, cases):
        assert {field: getattr(config, field) for field in gradient_check.SWITCHES} == {
            field: getattr(small, field) for field in gradient_check.SWITCHES
        }


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "combinations"), [("fp64", 25), ("fp32", 0)])
def test_all_switches_agree(
    precision: parity.ParityPrecision, combinations: int, monkeypatch: Patch
) -> None:
    """After three steps of each optimizer; the handful above takes all steps."""
    monkeypatch.setattr(parity, "STEPS", 3)
    assert [row for row in parity.check_models(precision, combinations) if row.failed_columns] == []


# -- planted in the NumPy engine -------------------------------------------------------------------


@pytest.mark.parametrize("name", USED_BY)
def test_a_turned_sign_in_any_op_is_found(name: str, monkeypatch: Patch) -> None:
    plant(monkeypatch, name)
    result = compare_engines(**USED_BY[name])
    in_steps_alone = name in ("smoothing", "z_loss")  # of one of the optimizers
    assert (
        result.failed_columns == ["gradients", "steps"][in_steps_alone:]
    )  # a forward pass has no sign to turn
    assert in_steps_alone or result.gradients.error > 0.1


@pytest.mark.parametrize(
    ("name", "part", "switches", "where"),
    [
        ("rms_norm", 1, {"norm_position": "pre"}, "norm.weight"),
        ("layer_norm", 2, {"norm": "layernorm", "bias": True}, "norm.bias"),
        ("embedding", 0, {"tie_embeddings": False}, "embedding.weight"),
        ("attention", 1, {}, "attention.k.weight"),
    ],
)
def test_the_weight_is_named_whose_gradient_is_wrong(
    name: str, part: int, switches: dict[str, Any], where: str, monkeypatch: Patch
) -> None:
    """In one block: there nothing below the op passes its error on."""
    plant(monkeypatch, name, part)
    assert compare_engines(n_layers=1, **switches).gradients.where.endswith(where)


def test_the_switch_is_named_that_is_wrong(monkeypatch: Patch) -> None:
    cases = [
        case for case in gradient_check.single_switches() if case[0].startswith("feedforward ")
    ]
    monkeypatch.setattr(gradient_check, "single_switches", lambda: cases)
    plant(monkeypatch, "relu2")
    assert [row.case for row in parity.check_models("fp64") if row.failed_columns] == [
        "feedforward relu2"
    ]


@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_constant_that_no_finite_difference_can_see_is_found(
    precision: parity.ParityPrecision, monkeypatch: Patch
) -> None:
    """The gradients are right, but those of another model.

    In float32 where the error is not smaller than rounding.
    """
    factor = 1.001 if precision == "fp64" else 100
    monkeypatch.setattr(numpy_positions, "INIT_STD", numpy_positions.INIT_STD * factor)
    assert compare_engines(precision, position="sinusoidal").failed_columns == [
        "gradients",
        "steps",
        "logits",
    ]
    assert compare_engines(precision).failed_columns == []


@pytest.mark.parametrize(
    ("norm", "kind"), [("rmsnorm", layers.RMSNorm), ("layernorm", layers.LayerNorm)]
)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_another_epsilon_of_a_norm_is_found(
    precision: parity.ParityPrecision, norm: str, kind: Any, monkeypatch: Patch
) -> None:
    right = kind.__init__
    factor = 1.001 if precision == "fp64" else 100
    monkeypatch.setattr(
        kind,
        "__init__",
        lambda self, width, eps, *arguments: right(self, width, factor * eps, *arguments),
    )
    assert compare_engines(precision, norm=norm).failed_columns == ["gradients", "steps", "logits"]


def test_another_dropout_key_is_found(monkeypatch: Patch) -> None:
    def next_site(seed: int, step: int, rows: Any, site: int) -> Any:
        return row_keys(seed, step, rows, site + 1)

    monkeypatch.setattr(numpy_engine, "row_keys", next_site)
    assert (
        compare_engines(dropout=0.3).failed_columns
        == compare_engines(attention_dropout=0.3).failed_columns
        == ["gradients", "steps"]
    )
    assert compare_engines().failed_columns == []


def test_a_dropout_key_that_forgets_the_step_or_the_row_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        numpy_engine, "row_keys", lambda seed, step, rows, site: row_keys(seed, 0, rows, site)
    )
    assert compare_engines(dropout=0.3).failed_columns == [
        "steps"
    ]  # the gradients are those of step 0
    monkeypatch.setattr(
        numpy_engine,
        "row_keys",
        lambda seed, step, rows, site: row_keys(seed, step, np.arange(len(rows)), site),
    )
    assert "gradients" in compare_engines(dropout=0.3).failed_columns


# -- planted in the PyTorch engine -----------------------------------------------------------------


def test_a_wrong_activation_in_pytorch_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setitem(
        layers.ACTIVATIONS, "gelu", torch.nn.functional.gelu
    )  # the exact form, without tanh
    assert compare_engines(feedforward="gelu").failed_columns == list(COLUMNS)
    assert compare_engines(feedforward="geglu").failed_columns == []


def test_a_wrong_norm_in_pytorch_is_found(monkeypatch: Patch) -> None:
    right = layers.RMSNorm.forward
    monkeypatch.setattr(layers.RMSNorm, "forward", lambda self, x: 1.00001 * right(self, x))
    assert compare_engines("fp64").failed_columns == list(COLUMNS)
    assert compare_engines("fp64", norm="layernorm").failed_columns == []


# -- planted in the optimizers ---------------------------------------------------------------------


@pytest.mark.parametrize("module", [numpy_optimizer, torch_optimizer])
def test_another_epsilon_of_adamw_is_found(module: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(module, "ADAM_EPS", 1.1e-8)
    result = compare_engines()
    assert result.failed_columns == ["steps"]
    assert result.steps.where.startswith("adamw, ")


@pytest.mark.parametrize("module", [numpy_optimizer, torch_optimizer])
def test_another_coefficient_of_muon_is_found(module: Any, monkeypatch: Patch) -> None:
    code = module.orthogonalize.__code__
    right, wrong = (3.4445, -4.7750, 2.0315), (3.4445, -4.7750, 2.0314)
    assert right in code.co_consts
    constants = tuple(wrong if constant == right else constant for constant in code.co_consts)
    monkeypatch.setattr(module.orthogonalize, "__code__", code.replace(co_consts=constants))
    result = compare_engines()
    assert result.failed_columns == ["steps"]
    assert result.steps.where.startswith("muon, ")


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_another_decay_is_found(kind: str, monkeypatch: Patch) -> None:
    right: Callable[..., None] = getattr(numpy_optimizer, kind)

    def wrong(*arrays: Array, decay: float, **options: Any) -> None:
        right(*arrays, decay=1.01 * decay, **options)

    monkeypatch.setattr(numpy_optimizer, kind, wrong)
    result = compare_engines()
    assert result.failed_columns == ["steps"]
    assert kind == "adamw" or result.steps.where.startswith(f"{kind}, ")


@pytest.mark.parametrize("moment", ["adamw.m", "adamw.v", "muon.m", "sgd.m"])
def test_a_wrong_moment_is_found_and_named(moment: str, monkeypatch: Patch) -> None:
    right, name = TorchEngine.state, f"{moment}/blocks.0.attention.k.weight"

    def state(self: TorchEngine) -> Any:
        return ((key, array * 1.001 if key == name else array) for key, array in right(self))

    monkeypatch.setattr(TorchEngine, "state", state)
    result = compare_engines()
    assert result.failed_columns == ["steps"]
    assert result.steps.where == f"{moment[:-2]}, {name}"


# -- planted in the caches -------------------------------------------------------------------------


def test_a_wrong_rotation_in_the_cache_is_found(monkeypatch: Patch) -> None:
    right = inference.AttentionContext.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        right(self, *arguments)
        self.rotations = {kind: (cos, -sin) for kind, (cos, sin) in self.rotations.items()}

    monkeypatch.setattr(inference.AttentionContext, "__init__", wrong)
    result = compare_engines(position="rope")
    assert result.failed_columns == ["logits"]
    assert "NumPy" in result.logits.where
    assert compare_engines(position="alibi").failed_columns == []


def test_positions_that_are_off_by_one_where_rows_stand_apart_are_found(monkeypatch: Patch) -> None:
    right = KVCache.advance

    def wrong(self: KVCache, counts: Any, T: int) -> Any:
        reading = right(self, counts, T)
        if reading.start is not None or not counts.all():
            return reading
        return reading._replace(positions=(reading.positions - 1).clamp(0))

    monkeypatch.setattr(KVCache, "advance", wrong)
    result = compare_engines(position="learned")
    assert result.failed_columns == ["logits"]
    assert result.logits.where.startswith("different lengths, ")


def test_a_norm_that_is_wrong_for_one_row_is_found(monkeypatch: Patch) -> None:
    """A single token has a way of its own through NumPy's cache."""
    right = inference_norms.divide_by_rms
    monkeypatch.setattr(
        inference_norms,
        "divide_by_rms",
        lambda x, eps: right(x, eps) * (1.001 if len(x) == 1 else 1),
    )
    result = compare_engines()
    assert result.failed_columns == ["logits"]
    assert result.logits.where.startswith("a single row, ")


def test_an_error_that_both_caches_share_is_found(monkeypatch: Patch) -> None:
    for engine in (NumpyEngine, TorchEngine):
        right = engine.logits
        monkeypatch.setattr(
            engine,
            "logits",
            lambda *arguments, right=right, **options: 1.001 * right(*arguments, **options),
        )
    result = compare_engines()
    assert result.failed_columns == ["logits"]
    assert result.logits.where.endswith("with cache against without")


def test_a_row_that_is_cleared_badly_is_found(monkeypatch: Patch) -> None:
    """It begins again at its second place, so that the first key is left over from before."""

    def clear(self: KVCache, row: int) -> None:
        self._lengths[row] = 1

    right = TorchEngine.new_cache
    monkeypatch.setattr(KVCache, "clear", clear)
    monkeypatch.setattr(
        TorchEngine, "new_cache", lambda self, rows, capacity: right(self, rows, capacity + 1)
    )
    result = compare_engines()
    assert result.failed_columns == ["logits"]
    assert result.logits.where.startswith("a cleared row, ")


# -- NaN and infinity ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("engine", [NumpyEngine, TorchEngine])
def test_a_gradient_that_is_no_number_is_found_and_named(
    engine: Any, value: float, monkeypatch: Patch
) -> None:
    right, name = engine.gradients, "blocks.1.attention.k.weight"

    def gradients(*arguments: Any) -> dict[str, Array]:
        result = {key: array.copy() for key, array in right(*arguments).items()}
        result[name][3, 2] = value
        return result

    monkeypatch.setattr(engine, "gradients", gradients)
    result = compare_engines()
    assert result.failed_columns == ["gradients"]
    assert result.gradients.where == name
    assert math.isnan(result.gradients.error)


def test_a_loss_and_logits_that_are_no_number_are_found_in_both_engines_at_once(
    monkeypatch: Patch,
) -> None:
    """Where both are NaN they are not equal."""
    nothing = {"cross_entropy": math.nan}
    for engine in (NumpyEngine, TorchEngine):
        accumulate, logits = engine.accumulate, engine.logits
        monkeypatch.setattr(
            engine,
            "accumulate",
            lambda *arguments, right=accumulate: right(*arguments)._replace(**nothing),
        )
        monkeypatch.setattr(
            engine,
            "logits",
            lambda *arguments, right=logits, **options: right(*arguments, **options) * math.nan,
        )
    result = compare_engines()
    assert result.failed_columns == ["steps", "logits"]
    assert result.steps.where == "adamw, loss of step 1"


def test_the_largest_error_is_a_nan_wherever_it_stands() -> None:
    for errors in ([math.nan, 1e-3, 2.0], [1e-3, math.nan, 2.0], [1e-3, 2.0, math.nan]):
        assert math.isnan(parity.largest_error(LocatedError(error, "") for error in errors).error)
    assert parity.largest_error(
        [LocatedError(1.0, "a"), LocatedError(3.0, "b"), LocatedError(2.0, "c")]
    ) == LocatedError(3.0, "b")


def test_errors_are_relative_to_the_tensor_but_not_below_the_floor() -> None:
    a = {
        "large": np.array([100.0, -1.0]),
        "small": np.array([0.001, 0.0]),
        "middle": np.array([2.0, -4.0]),
    }
    b = {
        "large": np.array([100.0, -2.0]),
        "small": np.array([0.002, 0.0]),
        "middle": np.array([2.0, -4.5]),
    }
    errors = {item.where: item.error for item in parity.tensor_errors(a, b)}
    assert errors == pytest.approx({"large": 0.01, "small": 0.001 / 0.1, "middle": 0.5 / 4.5})
    nothing = {"w": np.zeros(3)}
    assert parity.tensor_errors(nothing, nothing) == [LocatedError(0.0, "w")]
    assert parity.tensor_errors(nothing, {"w": np.array([0, 1e-30, 0])})[0].error == 1
