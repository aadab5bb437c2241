"""The gradient check: honest gradients pass, and a mistake planted anywhere is found."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from glasslm.config.schema import ModelConfig, RunConfig, TrainConfig
from glasslm.engines.numpy import attention, engine, flash, model, moe, ops, soft_cap, softmax_terms
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.lab.checks import gradient_check, op_cases
from glasslm.lab.checks.gradient_check import SWITCHES, check_model, check_ops
from glasslm.lab.checks.op_cases import OPS, H, K
from glasslm.model.parameters import initial_weights, parameter_table

Array = np.ndarray[Any, Any]
MODULES = (ops, softmax_terms, soft_cap, attention, flash, moe, model, engine)


# -- honest gradients ------------------------------------------------------------------------------


def test_every_op_passes() -> None:
    findings = list(check_ops())
    assert [finding.case for finding in findings] == list(OPS)
    assert [finding for finding in findings if not finding.passed] == []


def test_every_activation_of_the_engine_has_a_case() -> None:
    assert {function.__name__ for function in ops.ACTIVATIONS.values()} <= OPS.keys()


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
    cost = {config: estimate_cost(config) for config in covered}
    while missing:
        best = max(covered, key=lambda config: len(missing & covered[config]) / cost[config])
        assert missing & covered[best]
        chosen.append(best)
        missing -= covered[best]
    return chosen


def estimate_cost(config: ModelConfig) -> int:
    """Losses of one dense layer that a check takes, and a constant that keeps the models few."""
    layers = config.n_layers * (3 if config.n_experts else 1)
    return 1000 + parameter_table(config, gradient_check.V).trained * layers


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
            values = SWITCHES.get(field) or (False, *gradient_check.EXTRA_VALUES[field])
            assert set(values) == {False, True}
    for field, values in SWITCHES.items():
        alone = {getattr(config, field) for _, config in gradient_check.single_switches()}
        assert alone >= set(values)


def test_combinations_are_different_and_follow_from_the_seed() -> None:
    one, again, other = (list(gradient_check.combinations(50, seed)) for seed in (0, 0, 1))
    assert one == again != other
    assert len({config for _, config in one}) == 50


SAMPLE = 8  # elements of each weight; the handful above has every element


@pytest.mark.slow
def test_every_switch_and_fifty_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = functools.partial(gradient_check.check_engine, sample=SAMPLE)
    monkeypatch.setattr(gradient_check, "check_engine", sampled)
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
        "rms_norm_1p": 2,
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
    for norm, entry in ops.NORMS.items():
        if entry.op is right:
            monkeypatch.setitem(ops.NORMS, norm, entry._replace(op=wrong))
    for key, term in softmax_terms.SOFTMAX_TERMS.items():
        if term is right:
            monkeypatch.setitem(softmax_terms.SOFTMAX_TERMS, key, wrong)


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
    "rms_norm_1p": {"norm": "rmsnorm1p"},
    "soft_cap": {"logit_softcap": 2.0},
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
    """The gradient of the residual connection: without it only the sublayer's is left."""
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
        for name, w in initial_weights(machine.table, 0)
    )
    tokens = rng.integers(0, 7, (2, 7))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], 0, np.arange(2))
    right = machine.gradients
    for name in machine.table:
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


def test_every_case_has_numbers_of_its_own() -> None:
    names = [*OPS, *(name for name, _ in gradient_check.single_switches())]
    assert len({gradient_check._generator(0, name).random() for name in names}) == len(set(names))
