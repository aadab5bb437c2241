"""`glasslm check` without PyTorch: its lines, its JSON object and its exit code."""

import json
import math
from pathlib import Path

import pytest
from test_check import plant, tiny

import small_runs
from glasslm import strict_json
from glasslm.cli import check as command
from glasslm.engines import resources
from glasslm.errors import InputError
from glasslm.lab.checks import attention_paths, finite_differences, gradient_check
from glasslm.lab.checks.op_cases import OPS
from glasslm.model.parameters import parameter_table


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that PyTorch is not installed; test_loss_parity.py tests the rest."""
    monkeypatch.setattr(resources, "is_torch_installed", lambda: False)


@pytest.fixture
def short(without_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few operations and models: test_check.py checks all of them."""
    few = {case: OPS[case] for case in ("linear", "silu", "attention")}
    monkeypatch.setattr(gradient_check, "OPS", few)
    monkeypatch.setattr(gradient_check, "SOFTMAX_TERMS", {})
    monkeypatch.setattr(gradient_check, "single_switches", lambda: [("the smallest", tiny())])
    monkeypatch.setattr(gradient_check, "small_model", tiny)
    monkeypatch.setattr(attention_paths, "KV_HEADS", (2,))


@pytest.mark.usefixtures("short")
def test_the_command_prints_every_case_and_one_json_object_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["--combinations", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["passed"] is True
    assert facts["cases"] == len(gradient_check.OPS) + 2
    assert facts["largest_error"] <= facts["tolerance"] == 1e-6
    assert facts["wrong"] == []
    for case in [*gradient_check.OPS, "the smallest", "weighted targets"]:
        assert f"  {case}" in err
    assert facts["parity"] is None
    assert len([line for line in err.splitlines() if "pip install torch" in line]) == 1


@pytest.mark.usefixtures("short")
def test_the_command_fails_when_a_gradient_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "silu")
    monkeypatch.setattr(gradient_check, "single_switches", list)
    assert command.main(["--combinations", "0"]) == 1
    out = capsys.readouterr().out
    assert sum(line.endswith("WRONG") for line in out.splitlines()) >= 2
    assert "silu" in out
    assert "wrong" in out.splitlines()[-1]


@pytest.mark.usefixtures("short")
def test_a_gradient_that_is_no_number_is_the_largest_error_and_null_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [("good", 1e-9), ("bad", math.nan), ("wrong", 0.5)]
    findings = [finite_differences.CheckResult(case, error, "x[0]", 1, 0) for case, error in cases]
    monkeypatch.setattr(gradient_check, "check_ops", lambda seed: iter(findings))
    monkeypatch.setattr(gradient_check, "check_models", lambda combinations, seed: iter([]))
    assert command.main(["--json"]) == 1
    facts = strict_json.parse_json(capsys.readouterr().out.encode())  # strict
    assert facts["largest_error"] is None
    assert (facts["passed"], facts["wrong"]) == (False, ["bad", "wrong"])


@pytest.mark.usefixtures("short")
def test_a_figure_that_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="PyTorch"):
        command.main(["--figure", str(tmp_path / "parity.png")])
    monkeypatch.setattr(resources, "is_torch_installed", lambda: True)
    for name in ("parity.pdf", "missing/parity.png"):
        with pytest.raises(InputError, match=r"expected a \.png file"):
            command.main(["--figure", str(tmp_path / name)])
    with pytest.raises(InputError, match="RUN"):
        command.main(["a-run", "--figure", str(tmp_path / "parity.png")])


@pytest.mark.usefixtures("short")
def test_a_file_of_optimizers_is_compared_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.py"
    path.write_text("def sgd(p, g, m, *, lr, decay, momentum):\n    p -= lr * g\n")
    with pytest.raises(InputError, match="has only optimizers, which have no gradient: expected"):
        command.main(["--ops", str(path)])
    monkeypatch.setattr(resources, "is_torch_installed", lambda: True)
    monkeypatch.setattr(command, "_compare_engines", lambda *_: ("1 model", {"cases": 1}, []))
    assert command.main(["--ops", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["cases"], facts["largest_error"], facts["parity"]) == (0, 0, {"cases": 1})


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match="--seed is -1"):
        command.main(["--seed", "-1"])


@pytest.mark.usefixtures("without_torch")
def test_a_trained_run_passes_also_without_its_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = small_runs.write_text(tmp_path / "text.txt")
    small_runs.train(text, tmp_path / "run", max_steps=3, feedforward="relu2", n_layers=1)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "another"))
    assert command.main([str(tmp_path / "run"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    table = parameter_table(
        small_runs.small_config(text, feedforward="relu2", n_layers=1).model, 21
    )
    assert facts["cases"] == len(table)  # every weight
    assert facts["elements"] == gradient_check.RUN_ELEMENTS * len(table)
    with pytest.raises(InputError):
        command.main([str(tmp_path / "nothing")])
