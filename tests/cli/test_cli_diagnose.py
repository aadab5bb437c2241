"""glasslm diagnose: a run, a configuration, a curve, a step; table, page, JSON, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from glasslm.cli import main
from small_runs import train, train_command, without_report, write_text


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(
        write_text(folder / "text.txt", 2000),
        folder / "run",
        max_steps=20,
        checkpoint_interval=10,
        keep=100,
    )
    return folder / "run"


def flags(text: Path, **changes: object) -> list[str]:
    """Those of a small configuration, without the folder of a run."""
    command = train_command(text, Path("unused"), **changes)
    at = command.index("--run-dir")
    return ["--engine", "numpy", *command[1:at], *command[at + 2 :]]


def test_a_run_is_diagnosed_into_its_folder(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["diagnose", str(run_dir), "--engine", "numpy"])
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith("  ")]
    for signal in (
        "initial loss",
        "causality",
        "dead units",
        "attention logits",
        "learning rate",
        "divergence",
    ):
        assert any(signal in row for row in rows)
    verdicts = re.findall(r"^(\d+) bad, (\d+) to watch, (\d+) ok$", out, re.MULTILINE)
    for page in ("README.md", "docs/features.md", "docs/cookbook.md", "docs/course.md"):
        text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
        assert f" {sum(map(int, verdicts[0]))} signals" in text, page
    assert "inspecting the weights of step 20" in err
    assert out.splitlines()[-1] == f"page: {run_dir / 'diagnosis' / 'diagnosis.html'}"
    assert code == (1 if "\u2717 bad" in out else 0)
    page = (run_dir / "diagnosis" / "diagnosis.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 7
    assert "<script" not in page
    pictures = {path.stem for path in (run_dir / "diagnosis" / "figures").iterdir()}
    assert pictures == {"depth", "attention", "updates", "overfit", "range", "widths", "history"}
    assert "| verdict |" in (run_dir / "diagnosis" / "diagnosis.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_figures")
def test_a_configuration_is_diagnosed_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.txt", 2000)
    out_dir = tmp_path / "here"
    code = main(["diagnose", *flags(text, lr=1.0), "--json", "--out", str(out_dir)])
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert (code, facts["verdict"], facts["page"]) == (1, "bad", str(out_dir / "diagnosis.html"))
    bad = {row["signal"]: row for row in facts["findings"] if row["verdict"] == "bad"}
    assert "learning rate" in bad
    assert set(bad["learning rate"]) == {"signal", "verdict", "seen", "means", "advice"}
    assert "--lr" in bad["learning rate"]["advice"]
    assert "Diagnosis before training" in err  # the table, where standard output is for the object
    assert "divergence" not in err  # there is no history
    assert not (tmp_path / "unused").exists()


def test_a_curve_is_diagnosed_with_its_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "log.csv"
    falls_and_explodes = [f"{step},{4 - step / 50 if step < 100 else 9}" for step in range(1, 201)]
    file.write_text("\n".join(["step,loss", *falls_and_explodes]), encoding="utf-8")
    assert main(["diagnose", "--curve", str(file), "--out", str(tmp_path / "out")]) == 1
    out, _ = capsys.readouterr()
    assert "\u2717 bad: divergence" in out
    assert (tmp_path / "out" / "diagnosis.html").read_text(encoding="utf-8").count("<svg") == 1


def test_a_step_is_replayed(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["diagnose", str(run_dir), "--replay", "13", "--engine", "numpy", "--out", str(tmp_path)]
    )
    out, _ = capsys.readouterr()
    assert code in (0, 1)
    assert "step 13, replayed from step 10" in out
    assert (tmp_path / "replay-13.html").is_file()


@pytest.mark.usefixtures("no_figures")
def test_a_step_is_replayed_as_it_is_asked_for(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        ["diagnose", str(run_dir), "--replay", "13", "--precision", "fp64", "--out", str(tmp_path)]
    )
    assert "another machine, engine" in capsys.readouterr().out
    main(["diagnose", str(run_dir), "--replay", "13", "--out", str(tmp_path)])
    assert "to the bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replay", "3"], "glasslm diagnose RUN --replay STEP"),
        (["--preset", "huge"], "choose from quick, tiny"),
        (["{run}", "--lr", "1"], "RUN has its own settings"),
        (["{run}", "--preset", "small"], "RUN has its own settings"),
        (["--json", "{run}"], "RUN comes first"),
        (["no-such-run"], "there is no run"),
        (["--curve", "no-such-file.csv"], "no-such-file.csv"),
        (["--lora-rank", "4"], "--init-from RUN"),
        (["{run}", "--curve", "f.csv"], "--curve does not read RUN"),
        (["--curve", "f.csv", "--engine", "numpy"], "does not read --engine"),
        (["--curve=f.csv", "--replay", "3"], "glasslm diagnose RUN --replay STEP"),
        (["--curve", "f.csv", "--cookbook"], "does not read --cookbook"),
        (["{run}", "--cookbook"], "--cookbook does not read RUN"),
        (["--cookbook", "--preset", "nanogpt"], "does not read --preset"),
        (["--cookbook", "--lr=1"], "does not read --lr"),
        (["{run}", "--cookbook", "--replay", "3"], "does not read --replay"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", *(word.replace("{run}", str(run_dir)) for word in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_a_fine_tuned_run_is_not_asked_for_a_first_loss(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "new.txt", 2000)
    command = [
        "finetune",
        str(run_dir),
        "--text-file",
        str(text),
        "--engine",
        "numpy",
        "--max-steps",
        "6",
    ]
    with without_report():
        assert main([*command, "--sample-interval", "0", "--run-dir", str(tmp_path / "tuned")]) == 0
    capsys.readouterr()
    main(["diagnose", str(tmp_path / "tuned"), "--engine", "numpy", "--json"])
    facts = json.loads(capsys.readouterr().out)
    verdicts = {row["signal"]: row["verdict"] for row in facts["findings"]}
    assert not {"initial loss", "initialization", "widths"} & set(verdicts)
    assert verdicts["update to weight"] == verdicts["gradients by layer"] == "ok"
