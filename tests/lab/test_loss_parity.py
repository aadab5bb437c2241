"""The losses of both engines on one text, and `glasslm check` with PyTorch."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import small_runs  # noqa: E402
from glasslm import strict_json  # noqa: E402
from glasslm.cli import check as command  # noqa: E402
from glasslm.config.schema import DataConfig, RunConfig  # noqa: E402
from glasslm.data.dataset import Dataset, prepare_dataset  # noqa: E402
from glasslm.data.sources import corpora  # noqa: E402
from glasslm.engines.numpy import optimizer as numpy_optimizer  # noqa: E402
from glasslm.engines.torch import optimizer as torch_optimizer  # noqa: E402
from glasslm.lab.checks import (  # noqa: E402
    attention_paths,
    finite_differences,
    gradient_check,
    loss_parity,
    loss_parity_figure,
    parity,
)
from glasslm.lab.checks.gradient_check import small_model  # noqa: E402
from glasslm.lab.checks.parity import COLUMNS, TOLERANCE, LocatedError, Parity  # noqa: E402
from glasslm.report import figures  # noqa: E402

Array = np.ndarray[Any, Any]
Patch = pytest.MonkeyPatch


# -- the losses on a text --------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return small_runs.write_text(tmp_path / "text.txt")


def dataset_of(text: Path) -> Dataset:
    data = DataConfig(text_file=(str(text),))
    return prepare_dataset(
        data, corpora.find_source(data, small_runs.ignore_message), small_runs.ignore_message
    )


def short_config(steps: int = 4) -> RunConfig:
    """As the command does it, but for the number of steps."""
    full = loss_parity.loss_parity_config(seed=0)
    return dataclasses.replace(full, train=dataclasses.replace(full.train, max_steps=steps))


def test_the_losses_of_both_engines_stay_together_and_fall(text: Path) -> None:
    points = list(loss_parity.train_both(dataset_of(text), short_config(12)))
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
    logged = [line["loss"] for line in small_runs.logged_lines(tmp_path / "run", "step")]
    assert logged == [
        point.losses["fp32"][0] for point in loss_parity.train_both(dataset_of(text), config)
    ]


def test_losses_that_part_are_found(text: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(numpy_optimizer, "ADAM_EPS", 1e-7)
    assert [
        point.exceeds_tolerance
        for point in loss_parity.train_both(dataset_of(text), short_config(3))
    ] == [
        False,
        True,
        True,
    ]


def test_a_loss_that_is_no_number_is_wrong() -> None:
    good, bad = (2.0, 2.0), (math.nan, math.nan)
    assert not loss_parity.StepLosses(1, {"fp32": good, "fp64": good}).exceeds_tolerance
    assert loss_parity.StepLosses(1, {"fp32": good, "fp64": bad}).exceeds_tolerance
    assert loss_parity.StepLosses(1, {"fp32": bad, "fp64": good}).exceeds_tolerance
    assert loss_parity.StepLosses(1, {"fp32": (2.0, 2.001), "fp64": good}).relative_difference(
        "fp32"
    ) == pytest.approx(5e-4)


def test_the_figure_shows_both_losses_and_their_differences() -> None:
    losses = [
        ((4.0, 4.0 + 4e-6), (4.0, 4.0)),
        ((3.0, 3.0), (3.0, 3.0 + 3e-15)),
        ((math.nan, 2.0), (2.0, 2.0)),
    ]
    points = [
        loss_parity.StepLosses(i, {"fp32": a, "fp64": b}) for i, (a, b) in enumerate(losses, 1)
    ]
    curves, gaps = loss_parity_figure.draw_loss_parity(
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
    """No op, one switch, one sharing of heads, three steps on a small text."""
    finding = finite_differences.CheckResult("an op", 1e-9, "x[0]", 3, 0)
    monkeypatch.setattr(gradient_check, "check_ops", lambda seed: iter([finding]))
    monkeypatch.setattr(gradient_check, "check_models", lambda combinations, seed: iter([]))
    monkeypatch.setattr(attention_paths, "KV_HEADS", (2,))
    monkeypatch.setattr(
        gradient_check, "single_switches", lambda: [("the smallest", small_model())]
    )
    source, recipe = (
        corpora.find_source(DataConfig(text_file=(str(text),)), small_runs.ignore_message),
        short_config(3),
    )
    monkeypatch.setattr(corpora, "find_source", lambda data, notify: source)
    monkeypatch.setattr(loss_parity, "loss_parity_config", lambda seed: recipe)


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
    # The switch and weighted targets in both precisions, the combinations in one.
    assert parities["cases"] == 6
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
        "weighted targets, float64 steps",
        "the losses of step 2",
        "the losses of step 3",
    ]
    lines = [line for line in err.splitlines() if "WRONG: " in line]
    assert "  the smallest  WRONG: steps (adamw, " in lines[0]
    assert len(lines) == 2
    assert err.splitlines()[-1].endswith("4 wrong")


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
    facts = strict_json.parse_json(capsys.readouterr().out.encode())  # strict
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
        lambda run, seed, ops: iter([finite_differences.CheckResult("w", 0.0, "w[0]", 1, 0)]),
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
