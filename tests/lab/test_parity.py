"""Engine against engine: correct engines agree, and an error planted in either is detected and
named.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_check import HANDFUL, USED_BY, plant  # noqa: E402 - need PyTorch

import small_runs  # noqa: E402
from glasslm import files  # noqa: E402
from glasslm.cli import check as command  # noqa: E402
from glasslm.config.schema import DataConfig, ModelConfig, RunConfig  # noqa: E402
from glasslm.data.dataset import Dataset, prepare_dataset  # noqa: E402
from glasslm.data.sources import corpora  # noqa: E402
from glasslm.engines.dropout import row_keys  # noqa: E402
from glasslm.engines.numpy import engine as numpy_engine  # noqa: E402
from glasslm.engines.numpy import inference, model  # noqa: E402
from glasslm.engines.numpy import optimizer as numpy_optimizer  # noqa: E402
from glasslm.engines.numpy.engine import NumpyEngine  # noqa: E402
from glasslm.engines.torch import layers  # noqa: E402
from glasslm.engines.torch import optimizer as torch_optimizer  # noqa: E402
from glasslm.engines.torch.engine import TorchEngine  # noqa: E402
from glasslm.engines.torch.kv_cache import KeyValueCache  # noqa: E402
from glasslm.lab.checks import finite_differences, gradient_check, overlay, overlay_figure, parity  # noqa: E402
from glasslm.lab.checks.gradient_check import small_model  # noqa: E402
from glasslm.lab.checks.parity import COLUMNS, TOLERANCE, LocatedError, Parity, check_model  # noqa: E402
from glasslm.report import figures  # noqa: E402

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
        parity, "check_model", lambda case, config, precision, seed: (case, config, precision)
    )
    rows: list[Any] = list(parity.check_models("fp64", 7))
    cases = [*gradient_check.single_switches(), *gradient_check.combinations(7, 0)]
    assert [row[0] for row in rows] == [case for case, _ in cases]
    for (_, config, _), (_, small) in zip(rows, cases):
        assert {field: getattr(config, field) for field in gradient_check.SWITCHES} == {
            field: getattr(small, field) for field in gradient_check.SWITCHES
        }


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "combinations"), [("fp64", 25), ("fp32", 0)])
def test_all_switches_agree(precision: parity.ParityPrecision, combinations: int) -> None:
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
    """The gradients are right, but those of another model. In float32 where it is not smaller than
    rounding.
    """
    factor = 1.001 if precision == "fp64" else 100
    monkeypatch.setattr(model, "STD", model.STD * factor)
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
        if self.rotation:
            cos, sin = self.rotation
            self.rotation = cos, -sin

    monkeypatch.setattr(inference.AttentionContext, "__init__", wrong)
    result = compare_engines(position="rope")
    assert result.failed_columns == ["logits"]
    assert "NumPy" in result.logits.where
    assert compare_engines(position="alibi").failed_columns == []


def test_positions_that_are_off_by_one_where_rows_stand_apart_are_found(monkeypatch: Patch) -> None:
    right = KeyValueCache.reading

    def wrong(self: KeyValueCache, counts: Any, T: int) -> Any:
        reading = right(self, counts, T)
        if reading.start is not None or not counts.all():
            return reading
        return reading._replace(positions=(reading.positions - 1).clamp(0))

    monkeypatch.setattr(KeyValueCache, "reading", wrong)
    result = compare_engines(position="learned")
    assert result.failed_columns == ["logits"]
    assert result.logits.where.startswith("different lengths, ")


def test_a_norm_that_is_wrong_for_one_row_is_found(monkeypatch: Patch) -> None:
    """A single token has a way of its own through NumPy's cache."""
    right = inference._rms
    monkeypatch.setattr(
        inference, "_rms", lambda x, eps: right(x, eps) * (1.001 if len(x) == 1 else 1)
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

    def clear(self: KeyValueCache, row: int) -> None:
        self._lengths[row] = 1

    right = TorchEngine.new_cache
    monkeypatch.setattr(KeyValueCache, "clear", clear)
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


# -- the losses on a text --------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return small_runs.write_text(tmp_path / "text.txt")


def dataset_of(text: Path) -> Dataset:
    data = DataConfig(text_file=(str(text),))
    return prepare_dataset(data, corpora.find_source(data, small_runs.quiet), small_runs.quiet)


def short_config(steps: int = 4) -> RunConfig:
    """As the command does it, but for the number of steps."""
    full = overlay.overlay_config(seed=0)
    return dataclasses.replace(full, train=dataclasses.replace(full.train, max_steps=steps))


def test_the_losses_of_both_engines_stay_together_and_fall(text: Path) -> None:
    points = list(overlay.train_both(dataset_of(text), short_config(12)))
    assert [point.step for point in points] == list(range(1, 13))
    assert not any(point.exceeds_tolerance for point in points)
    assert points[-1].losses["fp32"][1] < points[0].losses["fp32"][1] - 0.3


def test_they_are_the_losses_of_a_run(text: Path, tmp_path: Path) -> None:
    config = short_config()
    flags = {
        **vars(config.model),
        **vars(config.train),
        **vars(config.optimizer),
        "log_interval": 1,
    }
    small_runs.train(text, tmp_path / "run", **flags)
    logged = [line["loss"] for line in small_runs.logged(tmp_path / "run", "step")]
    assert logged == [
        point.losses["fp32"][0] for point in overlay.train_both(dataset_of(text), config)
    ]


def test_losses_that_part_are_found(text: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(numpy_optimizer, "ADAM_EPS", 1e-7)
    assert [
        point.exceeds_tolerance for point in overlay.train_both(dataset_of(text), short_config(3))
    ] == [
        False,
        True,
        True,
    ]


def test_a_loss_that_is_no_number_is_wrong() -> None:
    good, bad = (2.0, 2.0), (math.nan, math.nan)
    assert not overlay.StepLosses(1, {"fp32": good, "fp64": good}).exceeds_tolerance
    assert overlay.StepLosses(1, {"fp32": good, "fp64": bad}).exceeds_tolerance
    assert overlay.StepLosses(1, {"fp32": bad, "fp64": good}).exceeds_tolerance
    assert overlay.StepLosses(1, {"fp32": (2.0, 2.001), "fp64": good}).relative_difference(
        "fp32"
    ) == pytest.approx(5e-4)


def test_the_figure_shows_both_losses_and_their_differences() -> None:
    losses = [
        ((4.0, 4.0 + 4e-6), (4.0, 4.0)),
        ((3.0, 3.0), (3.0, 3.0 + 3e-15)),
        ((math.nan, 2.0), (2.0, 2.0)),
    ]
    points = [overlay.StepLosses(i, {"fp32": a, "fp64": b}) for i, (a, b) in enumerate(losses, 1)]
    curves, gaps = overlay_figure.draw_overlay(
        points, TOLERANCE, "shakespeare", figures.PRINT_PALETTE
    ).axes
    by_hand, by_autograd = (np.array(line.get_ydata(), float) for line in curves.lines)
    np.testing.assert_array_equal(by_hand, [4, 3, np.nan])
    np.testing.assert_array_equal(by_autograd, [4.000004, 3, 2])
    assert curves.lines[0].get_linestyle() != curves.lines[1].get_linestyle()
    assert "nats" in curves.get_ylabel()
    drawn = {line.get_label(): np.array(line.get_ydata(), float) for line in gaps.lines}
    np.testing.assert_allclose(
        drawn["float32 (0 in 1 of 3 steps)"], [1e-6, np.nan, np.nan], rtol=1e-6
    )
    np.testing.assert_allclose(
        drawn["float64 (0 in 2 of 3 steps)"], [np.nan, 1e-15, np.nan], rtol=0.2
    )
    assert gaps.get_yscale() == "log"
    assert (gaps.get_xlabel(), gaps.get_ylabel()) == ("step", "share of the loss")


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def short(text: Path, monkeypatch: Patch) -> None:
    """No op, one switch, three steps on a small text."""
    finding = finite_differences.CheckResult("an op", 1e-9, "x[0]", 3, 0)
    monkeypatch.setattr(gradient_check, "check_ops", lambda seed: iter([finding]))
    monkeypatch.setattr(gradient_check, "check_models", lambda combinations, seed: iter([]))
    monkeypatch.setattr(
        gradient_check, "single_switches", lambda: [("the smallest", small_model())]
    )
    source, recipe = (
        corpora.find_source(DataConfig(text_file=(str(text),)), small_runs.quiet),
        short_config(3),
    )
    monkeypatch.setattr(corpora, "find_source", lambda data, notify: source)
    monkeypatch.setattr(overlay, "overlay_config", lambda seed: recipe)


@pytest.mark.usefixtures("short")
def test_the_command_tells_every_row_and_draws_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "parity.png"
    assert command.main(["--combinations", "2", "--figure", str(figure), "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert (facts["passed"], facts["wrong"], facts["cases"]) == (True, [], 1)
    parities = facts["parity"]
    assert parities["cases"] == 4  # the switch in both precisions, the combinations in one
    for precision, tolerance in {"fp64": 1e-10, "fp32": 1e-4}.items():
        assert parities["tolerance"][precision] == tolerance
        assert set(parities["largest_error"][precision]) == set(COLUMNS)
        assert all(
            0 < error <= tolerance for error in parities["largest_error"][precision].values()
        )
    assert (parities["curves"]["text"], parities["curves"]["steps"]) == ("text", 3)
    assert err.count("  the smallest\n") == 2
    for heading in (
        "float64, at most 1e-10",
        "float32, at most 0.0001",
        "gradients",
        "10 steps",
        "logits",
    ):
        assert heading in err
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("short")
def test_the_command_fails_and_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(numpy_optimizer, "ADAM_EPS", 1e-7)
    assert command.main(["--combinations", "0", "--json"]) == 1
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert not facts["passed"]
    assert facts["wrong"] == [
        "the smallest, float64 steps",
        "the losses of step 2",
        "the losses of step 3",
    ]
    (line,) = [line for line in err.splitlines() if "WRONG: " in line]
    assert "  the smallest  WRONG: steps (adamw, " in line
    assert err.splitlines()[-1].endswith("3 wrong")


@pytest.mark.usefixtures("short")
def test_an_error_that_is_no_number_is_null_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    good, bad = LocatedError(1e-12, "here"), LocatedError(math.nan, "there")

    def rows(precision: parity.ParityPrecision, random_combinations: int = 0, seed: int = 0) -> Any:
        return iter(
            [Parity("a", precision, good, good, bad), Parity("b", precision, good, good, good)]
        )

    monkeypatch.setattr(parity, "check_models", rows)
    assert command.main(["--json"]) == 1
    facts = files.parse_json(capsys.readouterr().out.encode())  # strict
    assert facts["parity"]["largest_error"]["fp64"] == {
        "gradients": 1e-12,
        "steps": 1e-12,
        "logits": None,
    }
    assert facts["wrong"] == ["a, float64 logits", "a, float32 logits"]


def test_a_trained_run_is_checked_in_both_precisions_with_its_own_optimizer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    small_runs.train(text, tmp_path / "run", max_steps=3, n_layers=1, dropout=0.2)
    monkeypatch.setattr(
        gradient_check,
        "check_run",
        lambda run, seed: iter([finite_differences.CheckResult("w", 0.0, "w[0]", 1, 0)]),
    )
    assert command.main([str(tmp_path / "run"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["parity"]
    assert facts["cases"] == 2
    assert "curves" not in facts
    assert all(error > 0 for errors in facts["largest_error"].values() for error in errors.values())
    monkeypatch.setattr(
        torch_optimizer, "orthogonalize", lambda g: 1.001 * g
    )  # small_runs trains by muon
    assert command.main([str(tmp_path / "run"), "--json"]) == 1
    assert "the trained model, float64 steps" in json.loads(capsys.readouterr().out)["wrong"]


def test_the_steps_go_on_from_the_moments_of_the_run(
    text: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    small_runs.train(text, tmp_path / "run", max_steps=5, n_layers=1)
    states = []
    right = parity.compare_steps

    def watched(pair: parity.Pair, batches: Any, lr: float) -> LocatedError:
        state = dict(pair[1].state())
        states.append(
            (pair[1].updates, np.abs(state["muon.m/blocks.0.attention.q.weight"]).max() > 0)
        )
        return right(pair, batches, lr)

    monkeypatch.setattr(parity, "compare_steps", watched)
    assert [row.precision for row in parity.check_run(str(tmp_path / "run"))] == ["fp64", "fp32"]
    assert states == [(5, True), (5, True)]
