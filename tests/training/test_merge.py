"""`glasslm merge`: one model of weights and adapters, which says and scores the same.

And a run tuned once more.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import glasslm
from glasslm.cli import main
from glasslm.model.adapters import merge_adapters
from glasslm.report import run_report
from glasslm.runs import checkpoint, run_folder
from small_runs import logged_lines, read_json
from tuned_runs import finetune, make_base, write_new_text

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_new_text(tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="module")
def tuned(base: Path, new: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With adapters of all matrices, and an average of them."""
    folder = tmp_path_factory.mktemp("tuned")
    return finetune(
        base, new, folder / "run", lora_rank=4, lora_targets="q,k,v,o,gate,up,down", ema=0.5
    )


@pytest.fixture(scope="module")
def whole(tuned: Path) -> Path:
    """The same merged, where `merge` puts it by itself."""
    assert main(["merge", str(tuned)]) == 0
    return tuned.with_name("run-merged")


def evaluate_run(
    run: Path, capsys: pytest.CaptureFixture[str], precision: str = "fp32"
) -> dict[str, Any]:
    capsys.readouterr()
    assert (
        main(["evaluate", str(run), "--json", "--engine", "numpy", "--precision", precision]) == 0
    )
    scores = json.loads(capsys.readouterr().out)
    assert scores.pop("text") == "val"
    return scores


def test_the_merged_model_writes_and_scores_the_same(
    tuned: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for run in (tuned, whole):
        capsys.readouterr()
        flags = [
            "--prompt",
            "eht",
            "--temperature",
            "0",
            "--max-new-tokens",
            "80",
            "--engine",
            "numpy",
        ]
        assert main(["generate", str(run), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 80
    one, other = (evaluate_run(run, capsys) for run in (tuned, whole))
    assert other == pytest.approx(one, rel=1e-5)
    assert one["step"] == run_folder.Run(tuned).history.best_step
    np.testing.assert_allclose(
        glasslm.load(whole, engine="numpy").logits("eht"),
        glasslm.load(tuned, engine="numpy").logits("eht"),
        atol=1e-4,
    )


def test_it_is_an_ordinary_run_of_the_base_s_architecture(
    base: Path, tuned: Path, whole: Path
) -> None:
    run, origin = run_folder.Run(whole), run_folder.Run(tuned)
    assert not (whole / "base").exists()
    assert run.config.model.lora_rank == 0
    assert run.record["parameters"] == run_folder.Run(base).record["parameters"]
    assert run.record["flops_per_token"] == run_folder.Run(base).record["flops_per_token"]
    assert run.record["merged_from"] == {"run": str(tuned), "step": origin.history.best_step}
    assert "base" not in run.record
    assert run.record["data"] == origin.record["data"]
    assert run.record["command"] == f"glasslm merge {tuned}"
    weights = checkpoint.load(whole).weights()
    expected = merge_adapters(checkpoint.load(tuned, "best").weights(), origin.config.model)
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


def test_it_takes_over_what_was_measured(tuned: Path, whole: Path) -> None:
    history, earlier = run_folder.Run(whole).history, run_folder.Run(tuned).history
    assert history.status == "finished"
    assert (history.best_step, history.best_val_loss) == (earlier.best_step, earlier.best_val_loss)
    assert logged_lines(whole, "eval") == [
        line for line in logged_lines(tuned, "eval") if line["step"] <= earlier.best_step
    ]
    assert logged_lines(whole, "step") == []
    merged_checkpoint = checkpoint.load(whole)
    assert merged_checkpoint.position.best == (earlier.best_step, earlier.best_val_loss)
    assert merged_checkpoint.position.metrics_bytes < (whole / "metrics.jsonl").stat().st_size


def test_of_a_text_that_is_sampled_the_loss_is_that_of_all_of_it(
    base: Path, new: Path, tmp_path: Path
) -> None:
    """Which was measured at the end, after the checkpoint of the best step was written."""
    flags: dict[str, Any] = {
        "lora_rank": 2,
        "block_size": 4,
        "val_fraction": 0.5,
        "lr": 5.0,
        "max_steps": 4,
    }
    run = finetune(base, new, tmp_path / "run", eval_interval=1, **flags)
    best = run_folder.Run(run).history
    assert best.best_step is not None
    assert best.best_step < 4  # a rate as high as that spoils the model
    assert main(["merge", str(run), "--run-dir", str(tmp_path / "whole")]) == 0
    history = run_folder.Run(tmp_path / "whole").history
    assert (history.best_step, history.best_val_loss) == (best.best_step, best.best_val_loss)
    assert (
        max(history.eval_steps) == best.best_step
    )  # nothing of what the weights became after that
    assert main(["resume", str(tmp_path / "whole")]) == 2


def test_what_was_computed_in_float64_stays_so(
    base: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune(
        base, new, tmp_path / "run", lora_rank=2, precision="fp64", engine="numpy", max_steps=4
    )
    assert main(["merge", str(run)]) == 0
    whole = tmp_path / "run-merged"
    assert {array.dtype for array in checkpoint.load(whole).weights().values()} == {
        np.dtype(np.float64)
    }
    one, other = (evaluate_run(path, capsys, "fp64") for path in (run, whole))
    assert other == pytest.approx(one, rel=1e-12)


def test_the_name_is_given_or_made_from_the_run_s(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From inside the run's folder, too."""
    run = Path(shutil.copytree(tuned, tmp_path / "runs" / "mine"))
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "mine", "--run-dir", "other"]) == 0
    assert capsys.readouterr().out == "run: other\n"
    monkeypatch.chdir(run)
    assert main(["merge", "."]) == 0
    assert Path(capsys.readouterr().out.removeprefix("run: ").rstrip()) == run.resolve().with_name(
        "mine-merged"
    )
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"mine", "mine-merged"}


def test_what_cannot_be_merged_is_refused(
    base: Path, tuned: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_refused(*argv: str) -> str:
        capsys.readouterr()
        assert main(["merge", *argv]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "no adapters" in run_refused(str(base), "--run-dir", str(tmp_path / "new"))
    assert "no adapters" in run_refused(str(whole))
    assert "already holds a run" in run_refused(str(tuned))
    assert "already holds a run" in run_refused(str(tuned), "--run-dir", str(base))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    assert "notes.txt" in run_refused(str(tuned), "--run-dir", str(tmp_path / "full"))
    assert "no run" in run_refused(str(tmp_path / "nowhere"))
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes.txt"]
    assert main(["resume", str(whole)]) == 2  # finished


# -- once more -------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_a_tuned_run_is_tuned_again(full: bool, base: Path, tuned: Path, tmp_path: Path) -> None:
    """From its weights and adapters made one.

    The first text is to be learned again, the second one is watched.
    """
    old = Path(read_json(base / "run.json")["data"]["files"][0]["path"])
    flags: dict[str, Any] = {"full": True} if full else {"lora_rank": 2, "lora_targets": "q"}
    run = finetune(tuned, old, tmp_path / "run", **flags)
    evals = {
        split: [line for line in logged_lines(run, "eval") if line["split"] == split]
        for split in ("val", "old")
    }
    assert evals["old"][0]["loss"] == pytest.approx(
        run_folder.Run(tuned).history.best_val_loss, rel=1e-5
    )
    earlier = [line for line in logged_lines(tuned, "eval") if line["split"] == "old"]
    at_best = next(
        line for line in earlier if line["step"] == run_folder.Run(tuned).history.best_step
    )
    assert evals["val"][0]["loss"] == pytest.approx(at_best["loss"], rel=1e-5)
    assert evals["val"][-1]["loss"] < evals["val"][0]["loss"]
    if full:
        return
    expected = merge_adapters(
        checkpoint.load(tuned, "best").weights(), run_folder.Run(tuned).config.model
    )
    for name, array in load_file(run / "base" / "model.safetensors").items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    names = load_file(checkpoint.load(run).path / "model.safetensors")
    assert {name.removeprefix("blocks.0.").removeprefix("blocks.1.") for name in names} == {
        "attention.q.lora_a",
        "attention.q.lora_b",
    }


def test_the_report_shows_what_was_forgotten(base: Path, tuned: Path, whole: Path) -> None:
    """In the page itself and as a file, in a run that measured it."""
    for run, shown in ((tuned, True), (whole, True), (base, False)):
        page = run_report.write(run).read_text(encoding="utf-8")
        assert ("of the new text and of the old text" in page) == shown
        assert page.count("<svg") == (2 if shown else 1)
        figure = run / "figures" / "forgetting.png"
        assert figure.exists() == shown
        assert ("forgetting.png" in (run / "report.md").read_text(encoding="utf-8")) == shown
        if shown:
            assert figure.read_bytes().startswith(b"\x89PNG")
