"""Verification finds every kind of damage, names its cure, and never changes the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_damage import DAMAGE, FIVE, LAST, flip_bit

from glasslm import cli, files, strict_json
from glasslm.cli.verify import UNVERIFIED
from glasslm.config.schema import ComputeConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.lab.verification import integrity, resumption
from glasslm.runs import checkpoint
from glasslm.training import launch
from small_runs import (
    ignore_message,
    logged_lines,
    read_json,
    small_config,
    start_program,
    train_command,
    wait_for,
    without_report,
    write_text,
)

FLAGS: dict[str, Any] = {
    "max_steps": 10,
    "sample_interval": 0,
    "dropout": 0.2,
    "batch_size": 4,
    "ema": 0.9,
}
ENGINES = ["numpy", "torch"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def trained(text: Path, run_dir: Path, engine: Any = "numpy", **flags: Any) -> Path:
    compute = ComputeConfig(engine=engine, device="cpu", precision="fp32", threads=1)
    with without_report():
        return launch.train(
            small_config(text, **FLAGS | flags), compute, run_dir, notify=ignore_message
        ).run_dir


@pytest.fixture(scope="module")
def original(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(text, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def verdicts(run: Path) -> dict[str, integrity.Part]:
    return {part.name: part for part in integrity.examine_run(run)}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_a_whole_run_is_said_to_be_whole_and_is_not_touched(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert cli.main(["verify", str(run)]) == 0
    assert contents(run) == before
    *parts, empty, verdict = capsys.readouterr().out.splitlines()
    names = [
        "run.json",
        "tokenizer.json",
        "checkpoints/000000",
        "checkpoints/000005",
        "checkpoints/000010",
        "best",
        "metrics.jsonl",
        "text",
    ]
    assert [line.split()[:2] for line in parts] == [["ok", name] for name in names]
    assert (empty, verdict) == ("", f"whole: 8 parts ({UNVERIFIED})")


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_with_its_cure(
    case: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, name, message = DAMAGE[case]
    damage(run)
    before = contents(run)
    assert cli.main(["verify", str(run)]) == 1
    assert contents(run) == before
    *parts, _, verdict = capsys.readouterr().out.splitlines()
    (line,) = [line for line in parts if line.split()[1] == name]
    assert line.startswith("damaged")
    assert message in line
    assert "Cure: " in line
    assert "parts damaged" in verdict


def test_a_lost_best_checkpoint_is_damage(run: Path) -> None:
    best = checkpoint.load(run).position.best
    assert best is not None
    if best.step == 10:  # which would only make step 5 the latest
        state = read_json(run / LAST / "state.json")
        contents_by_name = {
            path.name: [path.read_bytes()]
            for path in (run / LAST).iterdir()
            if path.name != files.MANIFEST
        }
        state["best"] = {"step": 5, "loss": 1.0}
        files.write_folder(
            run / LAST, contents_by_name | {"state.json": [strict_json.json_bytes(state)]}
        )
    shutil.rmtree(run / FIVE)
    part = verdicts(run)["best checkpoint"]
    assert part.verdict == "damaged"
    assert "step 5, the best, is missing" in part.message


def test_the_text_may_be_gone_but_not_another(text: Path, run: Path, tmp_path: Path) -> None:
    other = text.read_bytes() + b"more\n"
    moved = tmp_path / "moved.txt"
    record = read_json(run / "run.json")
    record["data"]["files"][0]["path"] = str(moved)
    (run / "run.json").write_bytes(strict_json.json_bytes(record))
    gone = verdicts(run)["text"]
    assert (gone.verdict, record["data"]["files"][0]["sha256"] in gone.message) == ("note", True)
    moved.write_bytes(other)
    assert verdicts(run)["text"].verdict == "damaged"
    moved.write_bytes(text.read_bytes())
    assert verdicts(run)["text"].verdict == "ok"


def test_another_version_of_a_corpus_is_a_note(run: Path, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("x = 1")
    record = read_json(run / "run.json")
    record["config"]["data"] |= {"corpus": "python", "text_file": []}
    record["data"]["files"] = [
        {"path": str(tmp_path / "module.py"), "bytes": 5, "sha256": "0" * 64}
    ]
    (run / "run.json").write_bytes(strict_json.json_bytes(record))
    text = verdicts(run)["text"]
    assert (text.verdict, "has changed" in text.message) == ("note", True)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ({"corpus": "task:copy", "text_file": []}, "/gone/from/the/cache.txt"),
        ({"corpus": "dialogues", "text_file": []}, "/gone/from/the/cache.txt"),
        ({"chat": "dialogues", "text_file": []}, "dialogues"),
    ],
)
def test_a_generated_text_needs_no_restoring(run: Path, source: Any, path: str) -> None:
    record = read_json(run / "run.json")
    record["config"]["data"] |= source
    record["data"]["files"] = [{"path": path, "bytes": 5, "sha256": "0" * 64}]
    (run / "run.json").write_bytes(strict_json.json_bytes(record))
    text = verdicts(run)["text"]
    assert (text.verdict, text.message.partition(" by")[0]) == ("ok", "generated")


def test_what_a_kill_leaves_is_no_damage(run: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "st')
    (run / "checkpoints" / "000012.tmp-77").mkdir()
    parts = verdicts(run)
    assert {part.verdict for part in parts.values()} == {"ok", "note"}
    assert "cut short" in parts["metrics.jsonl"].message
    assert parts["checkpoints/000012.tmp-77"].verdict == "note"


def test_a_checkpoint_that_goes_or_is_replaced_meanwhile_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_folder, verified = files.verify_folder, []

    def verify(path: Path, hashes: bool = True) -> None:
        verified.append(path.name)
        if path.name == "000005" and verified.count("000005") == 1:
            files.remove_folder(path)
        if path.name == "000010" and verified.count("000010") == 1:
            copies = {
                file.name: [file.read_bytes()]
                for file in path.iterdir()
                if file.name != files.MANIFEST
            }
            (path / "state.json").unlink()
            with pytest.raises(files.DamagedError):
                verify_folder(path, hashes)
            files.write_folder(path, copies)
            raise files.DamagedError("state.json is missing")
        verify_folder(path, hashes)

    monkeypatch.setattr(files, "verify_folder", verify)
    parts = verdicts(run)
    assert parts[FIVE].verdict == "note"
    assert parts[LAST].verdict == "ok"


def test_a_run_under_way_is_whole_at_any_moment(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = {
        "max_steps": 5000,
        "keep": 1,
        "checkpoint_interval": 1,
        "eval_interval": 2,
        "log_interval": 1,
    }
    process = start_program(*train_command(text, run, **FLAGS | often))
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and len(logged_lines(run, "checkpoint")) > 3,
        process,
    )
    names: set[str] = set()
    for _ in range(20):
        parts = list(integrity.examine_run(run))
        assert [part for part in parts if part.verdict == "damaged"] == []
        names |= {part.name for part in parts}
    process.kill()
    process.communicate(timeout=120)
    assert len(names) > 12, "nothing was rotated away meanwhile"


def test_what_is_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert cli.main(["verify", str(tmp_path / "nothing")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_adapters_are_verified_beside_the_weights_that_they_adapt(
    text: Path, original: Path, tmp_path: Path
) -> None:
    run = trained(
        text, tmp_path / "run", init_from=str(original), lora_rank=2, optimizer="adamw", ema=0.0
    )
    parts = verdicts(run)
    assert {part.verdict for part in parts.values()} == {"ok"}
    assert "base" in parts
    result = resumption.try_resume(run, ignore_message)
    assert (result.difference, result.same_lines) == (0.0, True)
    flip_bit(run / "base" / "model.safetensors")
    assert verdicts(run)["base"].verdict == "damaged"
    shutil.rmtree(run / "base")
    assert verdicts(run)[LAST].verdict == "damaged"
    assert "base is missing. Cure: restore it" in verdicts(run)["base"].message


# -- whether it resumes ----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("epochs", [None, 1.7], ids=["random windows", "epochs"])
def test_a_run_resumes_to_the_bit(
    engine: str,
    epochs: float | None,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    run = trained(
        text, tmp_path / "run", engine, **({"epochs": epochs, "block_size": 64} if epochs else {})
    )
    before = contents(run)
    with without_report():
        assert cli.main(["verify", str(run), "--resume", "--json"]) == 0
    assert contents(run) == before
    output = json.loads(capsys.readouterr().out)
    resumed = output["resume"]
    assert set(resumed) == {
        "passed",
        "engine",
        "precision",
        "begin",
        "died",
        "resumed",
        "end",
        "entries",
        "difference",
        "where",
        "lines",
        "same_lines",
        "same_progress",
    }
    assert output["passed"]
    assert resumed["passed"]
    assert resumed["engine"] == engine
    assert (resumed["difference"], resumed["same_lines"], resumed["same_progress"]) == (
        0.0,
        True,
        True,
    )
    assert (
        resumed["begin"]
        < resumed["resumed"]
        < resumed["died"]
        < resumed["end"]
        == resumed["begin"] + 12
    )
    assert resumed["lines"] >= 12 + 2
    assert resumed["entries"] == len(dict(checkpoint.load(run).state()))


def test_a_run_that_was_killed_resumes_to_the_bit(run: Path) -> None:
    shutil.rmtree(run / LAST)
    with without_report():
        result = resumption.try_resume(run, ignore_message)
    assert (result.passed, result.start_step) == (True, 5)


def test_a_resume_that_forgets_is_found_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine that loses its moments wherever a run is resumed."""

    def forgetful(*arguments: Any, **options: Any) -> Engine:
        engine = make_engine(*arguments, **options)
        load = engine.load

        def without_moments(state: Any, updates: int = 0, loss_scale: float = 1.0) -> None:
            load([(name, array) for name, array in state if "/" not in name], updates, loss_scale)

        engine.load = without_moments  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr(launch, "make_engine", forgetful)
    with without_report():
        assert cli.main(["verify", str(run), "--resume"]) == 1
    out = capsys.readouterr().out
    assert "does NOT resume to the bit" in out
    assert float(out.partition("weights and moments: ")[2].split()[0]) > 0


def test_without_a_whole_checkpoint_nothing_is_tried(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "checkpoints").iterdir():
        flip_bit(path / "model.safetensors")
    assert cli.main(["verify", str(run), "--resume"]) == 1
    assert "damaged  resume" in capsys.readouterr().out


def test_a_best_loss_of_a_sample_has_its_standard_error(text: Path, tmp_path: Path) -> None:
    """Of the final measurement; a loss of the whole split has no note."""
    config = small_config(text, **FLAGS | {"block_size": 4, "val_fraction": 0.5})
    compute = ComputeConfig(threads=1)
    for n_windows, is_sample in ((40, True), (None, False)):
        with without_report():
            run = launch.train(
                config, compute, tmp_path / str(n_windows), final_windows=n_windows,
                notify=ignore_message,
            )  # fmt: skip
        message = verdicts(run.run_dir)["best checkpoint"].message
        assert run.best is not None
        assert f"validation loss {run.best['loss']:.4f}" in message
        noted = is_sample and f"(sampled, standard error {run.best['stderr']:.4f})"
        assert message.endswith(noted if noted else f"{run.best['loss']:.4f}")
