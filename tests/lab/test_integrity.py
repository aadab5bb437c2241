"""Verification finds every kind of damage and names its cure, never touches the run, and tells whether it resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from glasslm import cli, files
from glasslm.config.schema import ComputeConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.lab.verification import integrity, resumption
from glasslm.runs import checkpoint
from glasslm.training import launch
from small_runs import (
    logged,
    no_report,
    quiet,
    read_json,
    small,
    start,
    wait_for,
    words,
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
    with no_report():
        return launch.train(small(text, **FLAGS | flags), compute, run_dir, say=quiet).run_dir


@pytest.fixture(scope="module")
def original(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(text, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def judged(run: Path) -> dict[str, integrity.Part]:
    return {part.name: part for part in integrity.examine(run)}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_a_whole_run_is_said_to_be_whole_and_is_not_touched(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert cli.main(["verify", str(run)]) == 0
    assert contents(run) == before
    *parts, empty, verdict = capsys.readouterr().out.splitlines()
    names = ["run.json", "tokenizer.json", "checkpoints/000000", "checkpoints/000005", "checkpoints/000010",
             "best", "metrics.jsonl", "text"]  # fmt: skip
    assert [line.split()[:2] for line in parts] == [["ok", name] for name in names]
    assert (empty, verdict) == ("", "whole: 8 parts")


def edit(path: Path, **changes: Any) -> None:
    path.write_bytes(files.json_bytes(read_json(path) | changes))


def drop(path: Path, name: str) -> None:
    path.write_bytes(
        files.json_bytes({key: value for key, value in read_json(path).items() if key != name})
    )


def rewritten(
    folder: Path, change: Callable[[dict[str, Any]], None], name: str = "model.safetensors"
) -> None:
    """Other arrays in a checkpoint, and a manifest that agrees with them."""
    arrays: dict[str, Any] = load_file(folder / name)
    change(arrays)
    save_file(arrays, folder / name)
    kept = {
        path.name: [path.read_bytes()] for path in folder.iterdir() if path.name != files.MANIFEST
    }
    files.write_folder(folder, kept)


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def lines(run: Path, change: Callable[[list[bytes]], Any]) -> None:
    path = run / "metrics.jsonl"
    found = path.read_bytes().splitlines(keepends=True)
    change(found)
    path.write_bytes(b"".join(found))


def swap_steps(found: list[bytes]) -> None:
    first, second = (
        index for index, line in enumerate(found) if b'"step": 6' in line or b'"step": 7' in line
    )
    found[first], found[second] = found[second], found[first]


def reshape(arrays: dict[str, Any]) -> None:
    arrays["embedding.weight"] = arrays["embedding.weight"].T.copy()


def poison(arrays: dict[str, Any]) -> None:
    arrays["norm.weight"][3] = np.nan


LAST, FIVE = "checkpoints/000010", "checkpoints/000005"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "record cut": (lambda run: (run / "run.json").write_text("{"), "run.json", "not JSON"),
    "record of the future": (lambda run: edit(run / "run.json", format=2), "run.json", "format 1"),
    "record without a field": (lambda run: drop(run / "run.json", "machine"), "run.json", "lacks 'machine'"),
    "record of another seed": (lambda run: edit(run / "run.json", seed=3), "run.json", "seed 3"),
    "record of other data": (lambda run: edit(run / "run.json", data={}), "run.json", "not as glasslm wrote it"),
    "record of another size": (
        lambda run: edit(run / "run.json", parameters={"total": 5}), "run.json", "5 parameters"),
    "unknown setting": (
        lambda run: edit(run / "run.json", config=read_json(run / "run.json")["config"] | {"modle": {}}),
        "run.json", "modle"),
    "another configuration": (
        lambda run: edit(run / "run.json", config=read_json(run / "run.json")["config"]
                         | {"optimizer": read_json(run / "run.json")["config"]["optimizer"] | {"lr": 0.5}}),
        LAST, "another config"),
    "another tokenizer": (lambda run: (run / "tokenizer.json").write_text('{"kind": "byte"}'), "tokenizer.json",
                          "another tokenizer"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json", "missing"),
    "a flipped bit": (lambda run: flip(run / LAST / "optimizer.safetensors"), LAST, "altered"),
    "a missing file": (lambda run: (run / LAST / "state.json").unlink(), LAST, "missing"),
    "a file too many": (lambda run: (run / LAST / "notes.txt").write_text("mine"), LAST, "does not belong there"),
    "no manifest": (lambda run: (run / LAST / "manifest.json").unlink(), LAST, "missing"),
    "a renamed folder": (lambda run: (run / LAST).rename(run / "checkpoints" / "000011"), "checkpoints/000011",
                         "renamed"),
    "a reshaped entry": (lambda run: rewritten(run / FIVE, reshape), FIVE, "'embedding.weight' has shape"),
    "a renamed entry": (
        lambda run: rewritten(run / FIVE, lambda arrays: arrays.update(norms=arrays.pop("norm.weight"))),
        FIVE, "'norms' belongs to no weight"),
    "a lost moment": (
        lambda run: rewritten(run / FIVE, lambda arrays: arrays.pop("adamw.v/norm.weight"), "optimizer.safetensors"),
        FIVE, "'adamw.v/norm.weight' is missing"),
    "a lost average": (
        lambda run: rewritten(run / FIVE, lambda arrays: arrays.pop("ema/norm.weight"), "optimizer.safetensors"),
        FIVE, "'ema/norm.weight' is missing"),
    "a number that is none": (lambda run: rewritten(run / FIVE, poison), FIVE, "'norm.weight' is not finite"),
    "a line of rubbish": (lambda run: lines(run, lambda found: found.insert(4, b"rubbish\n")), "metrics.jsonl",
                          "line 5"),
    "a line that is not strict": (
        lambda run: lines(run, lambda found: found.insert(4, b'{"kind": "step", "step": 1, "loss": NaN}\n')),
        "metrics.jsonl", "line 5"),
    "a line without its kind": (lambda run: lines(run, lambda found: found.insert(4, b'{"step": 1}\n')),
                                "metrics.jsonl", "line 5"),
    "steps in another order": (lambda run: lines(run, swap_steps), "metrics.jsonl", "step 6 after step 7"),
    "a log too short": (lambda run: lines(run, lambda found: found.__delitem__(slice(12, None))), "metrics.jsonl",
                        "none of its lines ends at byte"),
    "a log moved by a letter": (
        lambda run: lines(run, lambda found: found.insert(1, b'{"kind":"warning","step":0}\n')), "metrics.jsonl",
        "none of its lines ends at byte"),
    "no log": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_with_its_cure(
    case: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, name, says = DAMAGE[case]
    damage(run)
    before = contents(run)
    assert cli.main(["verify", str(run)]) == 1
    assert contents(run) == before
    *parts, _, verdict = capsys.readouterr().out.splitlines()
    (line,) = [line for line in parts if line.split()[1] == name]
    assert line.startswith("damaged")
    assert says in line
    assert "Cure: " in line
    assert "parts damaged" in verdict


def test_a_lost_best_checkpoint_is_damage(run: Path) -> None:
    best = checkpoint.load(run).progress.best
    assert best is not None
    if best.step == 10:  # which would only make step 5 the latest
        state = read_json(run / LAST / "state.json")
        kept = {
            path.name: [path.read_bytes()]
            for path in (run / LAST).iterdir()
            if path.name != files.MANIFEST
        }
        state["best"] = {"step": 5, "loss": 1.0}
        files.write_folder(run / LAST, kept | {"state.json": [files.json_bytes(state)]})
    shutil.rmtree(run / FIVE)
    part = judged(run)["best checkpoint"]
    assert part.verdict == "damaged"
    assert "step 5, the best, is missing" in part.message


def test_the_text_may_be_gone_but_not_another(text: Path, run: Path, tmp_path: Path) -> None:
    other = text.read_bytes() + b"more\n"
    moved = tmp_path / "moved.txt"
    record = read_json(run / "run.json")
    record["data"]["files"][0]["path"] = str(moved)
    (run / "run.json").write_bytes(files.json_bytes(record))
    gone = judged(run)["text"]
    assert (gone.verdict, record["data"]["files"][0]["sha256"] in gone.message) == ("note", True)
    moved.write_bytes(other)
    assert judged(run)["text"].verdict == "damaged"
    moved.write_bytes(text.read_bytes())
    assert judged(run)["text"].verdict == "ok"


def test_another_version_of_a_corpus_is_a_note(run: Path, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("x = 1")
    record = read_json(run / "run.json")
    record["config"]["data"] |= {"corpus": "python", "text_file": []}
    record["data"]["files"] = [
        {"path": str(tmp_path / "module.py"), "bytes": 5, "sha256": "0" * 64}
    ]
    (run / "run.json").write_bytes(files.json_bytes(record))
    text = judged(run)["text"]
    assert (text.verdict, "has changed" in text.message) == ("note", True)


def test_what_a_kill_leaves_is_no_damage(run: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "st')
    (run / "checkpoints" / "000012.tmp-77").mkdir()
    parts = judged(run)
    assert {part.verdict for part in parts.values()} == {"ok", "note"}
    assert "cut short" in parts["metrics.jsonl"].message
    assert parts["checkpoints/000012.tmp-77"].verdict == "note"


def test_a_checkpoint_that_goes_or_is_replaced_meanwhile_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, looks = files.verify_folder, []

    def verify(path: Path, hashes: bool = True) -> None:
        looks.append(path.name)
        if path.name == "000005" and looks.count("000005") == 1:
            files.remove_folder(path)
        if path.name == "000010" and looks.count("000010") == 1:
            found = {
                file.name: [file.read_bytes()]
                for file in path.iterdir()
                if file.name != files.MANIFEST
            }
            (path / "state.json").unlink()
            with pytest.raises(files.DamagedError):
                whole(path, hashes)
            files.write_folder(path, found)
            raise files.DamagedError("state.json is missing")
        whole(path, hashes)

    monkeypatch.setattr(files, "verify_folder", verify)
    parts = judged(run)
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
    process = start(*words(text, run, **FLAGS | often))
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and len(logged(run, "checkpoint")) > 3, process
    )
    seen: set[str] = set()
    for _ in range(20):
        parts = list(integrity.examine(run))
        assert [part for part in parts if part.verdict == "damaged"] == []
        seen |= {part.name for part in parts}
    process.kill()
    process.communicate(timeout=30)
    assert len(seen) > 12, "nothing was rotated away meanwhile"


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
    parts = judged(run)
    assert {part.verdict for part in parts.values()} == {"ok"}
    assert "base" in parts
    found = resumption.try_resume(run, quiet)
    assert (found.difference, found.same_lines) == (0.0, True)
    flip(run / "base" / "model.safetensors")
    assert judged(run)["base"].verdict == "damaged"
    shutil.rmtree(run / "base")
    assert judged(run)[LAST].verdict == "damaged"


# -- whether it resumes -----------------------------------------------------------------------------------------------


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
    with no_report():
        assert cli.main(["verify", str(run), "--resume", "--json"]) == 0
    assert contents(run) == before
    said = json.loads(capsys.readouterr().out)
    resumed = said["resume"]
    assert said["passed"]
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
    with no_report():
        found = resumption.try_resume(run, quiet)
    assert (found.passed, found.begin) == (True, 5)


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
    with no_report():
        assert cli.main(["verify", str(run), "--resume"]) == 1
    out = capsys.readouterr().out
    assert "does NOT resume to the bit" in out
    assert float(out.partition("weights and moments: ")[2].split()[0]) > 0


def test_without_a_whole_checkpoint_nothing_is_tried(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "checkpoints").iterdir():
        flip(path / "model.safetensors")
    assert cli.main(["verify", str(run), "--resume"]) == 1
    assert "damaged  resume" in capsys.readouterr().out
