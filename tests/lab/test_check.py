"""The gradient check: honest gradients pass, and a mistake planted anywhere is found."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import small_runs
from glasslm import files
from glasslm.cli import check as command
from glasslm.config.schema import ModelConfig, RunConfig, TrainConfig
from glasslm.engines import choice
from glasslm.engines.numpy import attention, engine, flash, model, moe, ops
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.errors import InputError
from glasslm.lab.checks import finite_differences, gradient_check, op_cases
from glasslm.lab.checks.finite_differences import TOLERANCE, check_gradients
from glasslm.lab.checks.gradient_check import SWITCHES, check_model, check_ops
from glasslm.lab.checks.op_cases import OPS, H, K
from glasslm.model.parameters import initial_weights, parameter_table

Array = np.ndarray[Any, Any]
MODULES = (ops, attention, flash, moe, model, engine)


# -- honest gradients ------------------------------------------------------------------------------


def test_every_op_passes() -> None:
    findings = list(check_ops())
    assert [finding.case for finding in findings] == list(OPS)
    assert [finding for finding in findings if not finding.passed] == []


def choose_handful() -> list[ModelConfig]:
    """A few models with few weights that together have every value of every switch."""
    missing = {(field, value) for field, values in SWITCHES.items() for value in values}
    chosen = [
        dataclasses.replace(gradient_check.small_model(), norm="none").resolve()
    ]  # no combination has norm none
    missing -= {("norm", "none")}
    covered = {
        config: active_values(config) for _, config in gradient_check.combinations(200, seed=1)
    }
    cost = {config: 2000 + parameter_table(config, gradient_check.V).trained for config in covered}
    while missing:
        best = max(covered, key=lambda config: len(missing & covered[config]) / cost[config])
        assert missing & covered[best]
        chosen.append(best)
        missing -= covered[best]
    return chosen


def active_values(config: ModelConfig) -> set[tuple[str, Any]]:
    """The values of switches that affect a gradient: beside adapters no other weight has one."""
    inactive = (
        {"lora_targets"}
        if not config.lora_rank
        else SWITCHES.keys() - {"lora_rank", "lora_targets"}
    )
    if not config.n_experts:
        inactive = inactive | {"experts_per_token", "shared_expert"}
    return {(field, getattr(config, field)) for field in SWITCHES.keys() - inactive}


HANDFUL = choose_handful()


@pytest.mark.parametrize(
    "config", HANDFUL, ids=lambda config: f"{config.feedforward} {config.position}"
)
def test_the_whole_model_passes(config: ModelConfig) -> None:
    finding = check_model("handful", config)
    assert finding.passed, finding
    assert finding.elements == parameter_table(config, gradient_check.V).trained


def test_the_handful_has_every_value_of_every_switch() -> None:
    for field, values in SWITCHES.items():
        assert {getattr(config, field) for config in HANDFUL} == set(values)


def test_the_switches_are_all_that_the_config_declares() -> None:
    for field, hint in get_type_hints(ModelConfig).items():
        if get_origin(hint) is not None and isinstance(get_args(hint)[0], str):
            assert SWITCHES[field] == get_args(hint)
        elif hint is bool:
            assert set(SWITCHES[field]) == {False, True}
    for field, values in SWITCHES.items():
        alone = {getattr(config, field) for _, config in gradient_check.single_switches()}
        assert alone >= set(values)


def test_combinations_are_different_and_follow_from_the_seed() -> None:
    one, again, other = (list(gradient_check.combinations(50, seed)) for seed in (0, 0, 1))
    assert one == again != other
    assert len({config for _, config in one}) == 50


@pytest.mark.slow
def test_every_switch_and_fifty_combinations() -> None:
    findings = list(gradient_check.check_models(50))
    assert len(findings) >= 70
    assert [finding for finding in findings if not finding.passed] == []


# -- planted errors --------------------------------------------------------------------------------

Op = Callable[..., tuple[Any, Callable[[Any], Any]]]


def op_name(case: str) -> str:
    """The function behind a case: "attention, large scores" -> "attention"."""
    return case.replace(",", " ").split()[0]


def count_gradients(name: str) -> int:
    """How many gradients an op returns, in one array or in several."""
    parts = {
        "linear": 2,
        "adapter": 3,
        "rms_norm": 2,
        "layer_norm": 3,
        "gate": 2,
        "attention": 3,
        "flash_attention": 3,
    }
    return parts.get(name, 1)


def with_flipped_sign(op: Op, name: str, part: int) -> Op:
    """The op with the sign of one of its gradients flipped."""
    places: dict[str, list[Any]] = {
        "gate": [np.s_[:, : op_cases.F], np.s_[:, op_cases.F :]],
        "attention": [np.s_[:, :, :H], np.s_[:, :, H : H + K], np.s_[:, :, H + K :]],
    }
    places["flash_attention"] = places["attention"]

    def wrong(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        *y, backward = op(*arguments, **named)

        def flipped(*upstream: Any) -> Any:
            result = backward(*upstream)
            if isinstance(result, tuple):
                assert len(result) == count_gradients(name)
                return tuple(-g if i == part else g for i, g in enumerate(result))
            result[places.get(name, [...])[part]] *= -1
            return result

        return *y, flipped

    return wrong


def plant(monkeypatch: pytest.MonkeyPatch, name: str, part: int = 0) -> None:
    """Replace the op by the wrong one in every module and table that names it."""
    right = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    wrong = with_flipped_sign(right, name, part)
    for module in MODULES:
        if getattr(module, name, None) is right:
            monkeypatch.setattr(module, name, wrong)
    for key, function in ops.ACTIVATIONS.items():
        if function is right:
            monkeypatch.setitem(ops.ACTIVATIONS, key, wrong)
    for key, term in ops.SOFTMAX_TERMS.items():
        if term is right:
            monkeypatch.setitem(ops.SOFTMAX_TERMS, key, wrong)


@pytest.mark.parametrize(
    ("case", "part"),
    [(case, part) for case in OPS for part in range(count_gradients(op_name(case)))],
)
def test_a_turned_sign_in_any_gradient_of_any_op_is_found(
    case: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, op_name(case), part)
    monkeypatch.setattr(gradient_check, "OPS", {case: OPS[case]})
    (finding,) = check_ops()
    assert not finding.passed
    assert finding.error > 0.1


USED_BY: dict[str, dict[str, Any]] = {
    "embedding": {},
    "linear": {},
    "frozen_linear": {
        "lora_rank": 1,
        "lora_targets": "o",
    },  # above q there are two, and two flipped signs cancel
    "adapter": {"lora_rank": 1, "lora_targets": "q,o"},
    "route": {"n_experts": 2, "experts_per_token": 1},
    "dispatch": {"n_experts": 2},
    "smoothing": {},
    "z_loss": {},
    "flash_attention": {"attention": "flash"},
    "rms_norm": {},
    "layer_norm": {"norm": "layernorm", "bias": True},
    **{function.__name__: {"feedforward": word} for word, function in ops.ACTIVATIONS.items()},
    "gate": {"feedforward": "geglu"},
    "dropout": {"dropout": 0.3},
    "cross_entropy": {},
    "rope": {"position": "rope"},
    "attention": {},
}


def test_the_table_above_has_every_op() -> None:
    assert set(USED_BY) == {op_name(case) for case in OPS}


def tiny(**switches: Any) -> ModelConfig:
    return ModelConfig(d_model=4, n_layers=1, n_heads=2, d_ff=4, block_size=6, **switches)


@pytest.mark.parametrize("name", USED_BY)
def test_the_whole_model_notices_it_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(**USED_BY[name])
    terms = {"smoothing": {"label_smoothing": 0.3}, "z_loss": {"z_loss": 0.1}}.get(name, {})
    assert check_model(name, config, **terms).passed
    plant(monkeypatch, name)
    assert not check_model(name, config, **terms).passed


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_forgotten_residual_gradient_is_found(
    norm_position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient that goes round a sublayer: without it only the one through the sublayer is
    left.
    """
    right = model.Model._residual

    def wrong(self: Any, norm: str, inner: Any, x: Array, new: Any) -> Any:
        y, backward = right(self, norm, inner, x, new)
        arriving: list[Array] = []

        def remember(h: Array) -> Any:
            out, back = inner(h)

            def remembering(dy: Array, gradients: Any) -> Array:
                arriving.append(dy.copy())
                return np.asarray(back(dy, gradients))

            return out, remembering

        if norm_position == "post":
            y, backward = right(self, norm, remember, x, new)

        def forgetful(dy: Array, gradients: Any) -> Array:
            around = dy.copy()
            dx = np.asarray(backward(dy, gradients))
            return dx - (around if norm_position == "pre" else arriving[-1])

        return y, forgetful

    monkeypatch.setattr(model.Model, "_residual", wrong)
    assert not check_model("residual", tiny(norm_position=norm_position)).passed


def test_a_forgotten_half_of_a_tied_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = model.Model._embed

    def wrong(self: Any, tokens: Array, run: Any) -> Any:
        x, backward = right(self, tokens, run)

        def forgetful(dx: Array, gradients: dict[str, Array]) -> None:
            gradients["embedding.weight"] = np.zeros_like(gradients["embedding.weight"])
            backward(dx, gradients)

        return x, forgetful

    monkeypatch.setattr(model.Model, "_embed", wrong)
    finding = check_model("tied", tiny())
    assert not finding.passed
    assert finding.where.startswith("embedding.weight[")


RICH = tiny(
    norm="layernorm",
    position="learned",
    feedforward="swiglu",
    qk_norm=True,
    bias=True,
    tie_embeddings=False,
)


def test_an_error_of_a_hundredth_of_a_percent_in_any_weight_is_found_and_named() -> None:
    run = RunConfig(model=RICH, train=TrainConfig(batch_size=2, micro_batch_size=2)).resolve()
    machine = NumpyEngine(run, 7, threads=1, dtype=np.float64)
    rng = np.random.default_rng(0)
    machine.load(
        (name, w + 0.3 * rng.standard_normal(w.shape))
        for name, w in initial_weights(machine.rows, 0)
    )
    tokens = rng.integers(0, 7, (2, 7))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], 0, np.arange(2))
    right = machine.gradients
    for name in machine.rows:
        honest = gradient_check.check_engine(name, machine, batch, rng, kinks=False, only=name)
        assert honest.passed, honest

        def wrong(batch: Batch, weight: float, name: str = name) -> dict[str, Array]:
            return {
                key: g * 1.0001 if key == name else g for key, g in right(batch, weight).items()
            }

        machine.gradients = wrong  # type: ignore[method-assign]
        finding = gradient_check.check_engine(name, machine, batch, rng, kinks=False, only=name)
        assert not finding.passed
        assert finding.where.startswith(f"{name}[")
        machine.gradients = right  # type: ignore[method-assign]


# -- the comparison itself -------------------------------------------------------------------------


def check_function(
    value: Callable[[Array], float], slope: Callable[[Array], Array], x: Array, **options: Any
) -> Any:
    return check_gradients(
        "case",
        {"x": x},
        lambda: value(x),
        lambda: {"x": slope(x)},
        np.random.default_rng(0),
        **options,
    )


def test_it_says_how_wrong_and_where_and_restores_the_inputs() -> None:
    x = np.arange(6.0).reshape(2, 3) + 1
    before = x.copy()

    def wrong(x: Array) -> Array:
        g = 2 * x
        g[1, 2] *= 1.01
        return g

    finding = check_function(lambda x: float((x * x).sum()), wrong, x)
    assert finding.where == "x[1, 2]"
    assert finding.error == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert finding.elements == 6
    np.testing.assert_array_equal(x, before)
    assert check_function(lambda x: float((x * x).sum()), lambda x: 2 * x, x).error < 1e-9


def test_nan_does_not_pass() -> None:
    assert not check_function(
        lambda x: float((x * x).sum()), lambda x: np.where(x > 1, np.nan, 2 * x), np.ones(3) * 2
    ).passed


def test_a_point_at_a_kink_is_moved_and_counted() -> None:
    x = np.array([1.0, 1e-7, -1.0])  # between the two points of the difference

    def slope(x: Array) -> Array:
        return np.where(x > 0, 2.0, 0.0)

    finding = check_function(lambda x: float(2 * np.maximum(x, 0).sum()), slope, x, kinks=True)
    assert finding.passed
    assert finding.redrawn >= 1
    assert x[1] == 1e-7
    assert not check_function(lambda x: float(2 * np.maximum(x, 0).sum()), slope, x).passed


def test_a_large_third_derivative_is_not_taken_for_an_error() -> None:
    x = np.array([1.0])
    finding = check_function(
        lambda x: float(np.sin(300 * x).sum()), lambda x: 300 * np.cos(300 * x), x
    )
    assert finding.passed
    h = finite_differences.STEP_SIZE
    two_points = float(np.sin(300 * (1 + h)) - np.sin(300 * (1 - h))) / (2 * h)
    assert abs(two_points / (300 * np.cos(300)) - 1) > TOLERANCE


def test_a_sample_takes_that_many_elements() -> None:
    assert (
        check_function(
            lambda x: float((x * x).sum()), lambda x: 2 * x, np.ones(100), sample=7
        ).elements
        == 7
    )


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where PyTorch is not installed; with it, the command is tested in test_parity.py."""
    monkeypatch.setattr(choice, "is_torch_installed", lambda: False)


@pytest.fixture
def short(without_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_check, "single_switches", lambda: [("the smallest", tiny())])


@pytest.mark.usefixtures("short")
def test_the_command_prints_every_case_and_one_json_object_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["--combinations", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["passed"] is True
    assert facts["cases"] == len(OPS) + 1 + len(gradient_check.SOFTMAX_TERMS)
    assert facts["largest_error"] <= facts["tolerance"] == 1e-6
    assert facts["wrong"] == []
    for case in [*OPS, "the smallest"]:
        assert f"  {case}" in err
    assert facts["parity"] is None
    assert len([line for line in err.splitlines() if "pip install torch" in line]) == 1


@pytest.mark.usefixtures("short")
def test_the_command_fails_when_a_gradient_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "silu")
    assert command.main(["--combinations", "0"]) == 1
    out = capsys.readouterr().out
    assert sum(line.endswith("WRONG") for line in out.splitlines()) >= 2
    assert "silu" in out
    assert "wrong" in out.splitlines()[-1]


@pytest.mark.usefixtures("without_torch")
def test_a_gradient_that_is_no_number_is_the_largest_error_and_null_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [("good", 1e-9), ("bad", math.nan), ("wrong", 0.5)]
    findings = [finite_differences.CheckResult(case, error, "x[0]", 1, 0) for case, error in cases]
    monkeypatch.setattr(gradient_check, "check_ops", lambda seed: iter(findings))
    monkeypatch.setattr(gradient_check, "check_models", lambda combinations, seed: iter([]))
    assert command.main(["--json"]) == 1
    facts = files.parse_json(capsys.readouterr().out.encode())  # strict
    assert facts["largest_error"] is None
    assert (facts["passed"], facts["wrong"]) == (False, ["bad", "wrong"])


@pytest.mark.usefixtures("short")
def test_a_figure_that_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="PyTorch"):
        command.main(["--figure", str(tmp_path / "parity.png")])
    monkeypatch.setattr(choice, "is_torch_installed", lambda: True)
    for name in ("parity.pdf", "missing/parity.png"):
        with pytest.raises(InputError, match=r"expected a \.png file"):
            command.main(["--figure", str(tmp_path / name)])
    with pytest.raises(InputError, match="RUN"):
        command.main(["a-run", "--figure", str(tmp_path / "parity.png")])


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match="seed is -1"):
        command.main(["--seed", "-1"])


def test_every_case_has_numbers_of_its_own() -> None:
    names = [*OPS, *(name for name, _ in gradient_check.single_switches())]
    assert len({gradient_check._generator(0, name).random() for name in names}) == len(set(names))


@pytest.mark.usefixtures("without_torch")
def test_a_trained_run_passes_also_without_its_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = small_runs.write_text(tmp_path / "text.txt")
    small_runs.train(text, tmp_path / "run", max_steps=3, feedforward="relu2", n_layers=1)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "another"))
    assert command.main([str(tmp_path / "run"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = parameter_table(small_runs.small(text, feedforward="relu2", n_layers=1).model, 21)
    assert facts["cases"] == len(rows)  # every weight
    assert facts["elements"] == gradient_check.RUN_ELEMENTS * len(rows)
    with pytest.raises(InputError):
        command.main([str(tmp_path / "nothing")])
