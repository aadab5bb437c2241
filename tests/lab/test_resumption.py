"""Exact resume of merged, diverged, running and interrupted runs."""

import dataclasses
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli, files
from glasslm.engines.protocol import Array
from glasslm.errors import DamagedError
from glasslm.lab.verification import resumption
from glasslm.runs import checkpoint
from glasslm.runs.checkpoint import Checkpoint
from glasslm.runs.run_folder import Run
from glasslm.training import launch
from glasslm.training.loop import Loop
from glasslm.training.merging import merge_run
from small_runs import ignore_message, logged_lines, train, without_report, write_text

FLAGS: dict[str, Any] = {"max_steps": 10, "sample_interval": 0, "dropout": 0.2, "batch_size": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def original(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(text, tmp_path_factory.mktemp("runs") / "run", **FLAGS).run_dir


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def try_resume(run: Path) -> resumption.Resumption:
    with without_report():
        return resumption.try_resume(run, ignore_message)


def test_a_merged_run_resumes_to_the_bit(text: Path, original: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"optimizer": "adamw", "sample_interval": 10}
    tuned = train(text, tmp_path / "tuned", init_from=str(original), lora_rank=2, **flags)
    merged = merge_run(Run(tuned.run_dir), tmp_path / "merged", "glasslm merge", ignore_message)
    assert checkpoint.load(merged).position.loop == {}
    assert try_resume(merged).passed


def multiply_weights(monkeypatch: pytest.MonkeyPatch, step: int, factor: float) -> None:
    """Multiply all weights before this step (from 1), so that every later loss is bad."""
    do_step = Loop.do_step

    def do_damaged_step(self: Loop) -> None:
        if self.step + 1 == step:
            state = [
                (name, array if "/" in name else factor * array)
                for name, array in self.engine.state()
            ]
            self.engine.load(iter(state), self.engine.updates)
        do_step(self)

    monkeypatch.setattr(Loop, "do_step", do_damaged_step)


def test_a_diverged_run_has_a_verdict_of_its_own(text: Path, tmp_path: Path) -> None:
    """With the run's loss windows or its first loss, the guard would end the copy.

    The weights become bad at one step and hardly change afterwards. So the losses of the run exceed
    the guard's limit by far, and those of the copy, equally bad from its first evaluation on, stay
    below the copy's own limit.
    """
    flags = FLAGS | {"lr": 1e-5, "max_steps": 90, "warmup_steps": 0}
    with pytest.MonkeyPatch.context() as patch:
        multiply_weights(patch, step=2, factor=10.0)
        run = train(text, tmp_path / "run", **flags).run_dir
    assert logged_lines(run, "end")[-1]["status"] == "diverged"
    first, *later = [line["loss"] for line in logged_lines(run, "eval")]
    assert first < 5.0
    assert min(later) > 10.0
    assert max(later) - min(later) < 0.5
    assert try_resume(run).passed


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_copy_that_diverges_is_a_note(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(
        text, tmp_path / "run", **FLAGS | {"lr": 1e30, "max_steps": 30, "warmup_steps": 0}
    ).run_dir
    assert logged_lines(run, "end")[-1]["status"] == "diverged"
    capsys.readouterr()
    with without_report():
        assert cli.main(["verify", str(run), "--resume"]) == 0
    *_, note, _, verdict = capsys.readouterr().out.splitlines()
    assert note.split()[:2] == ["note", "resume"]
    assert "diverges" in note
    assert "1 notes" in verdict
    assert "bit" not in verdict


def test_divergence_after_a_resume_only_is_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = launch.resume

    def diverged(*arguments: Any, **options: Any) -> Any:
        return dataclasses.replace(resume(*arguments, **options), status="diverged")

    monkeypatch.setattr(launch, "resume", diverged)
    with without_report():
        assert cli.main(["verify", str(run), "--resume"]) == 1
    assert "damaged  resume" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [3, 12 + 3, 12 + 7 + 1 + 3], ids=["whole", "cut", "resumed"])
def test_a_signal_ends_it_with_its_own_code(
    at: int, number: signal.Signals, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_step, steps = Loop.do_step, []

    def step(self: Loop) -> None:
        do_step(self)
        steps.append(self.step)
        if len(steps) == at:
            signal.raise_signal(number)

    monkeypatch.setattr(Loop, "do_step", step)
    with without_report():
        assert cli.main(["verify", str(run), "--resume"]) == 128 + number
    assert len(steps) == at


def rotating(run: Path, monkeypatch: pytest.MonkeyPatch, before_reading: bool) -> list[Path]:
    """Write the next checkpoint and remove the one of step 5 when that is read."""
    later, earlier = run / "checkpoints" / "000010", run / "checkpoints" / "000005"
    aside, reads = run / "later", list[Path]()
    later.rename(aside)
    state = Checkpoint.state

    def rotate_then_read(self: Checkpoint) -> Iterator[tuple[str, Array]]:
        if run not in self.path.parents:
            return state(self)
        reads.append(self.path)
        arrays = [] if before_reading else list(state(self))
        if aside.exists():
            files.remove_folder(earlier)
            aside.rename(later)
        return state(self) if before_reading else iter(arrays)

    monkeypatch.setattr(Checkpoint, "state", rotate_then_read)
    return reads


def test_a_checkpoint_that_is_rotated_away_before_it_is_read_gives_way_to_the_next(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = rotating(run, monkeypatch, before_reading=True)
    result = try_resume(run)
    assert (result.passed, result.start_step) == (True, 10)
    assert [path.name for path in reads] == ["000005", "000010"]


def test_a_checkpoint_that_is_rotated_away_later_was_read_once(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = rotating(run, monkeypatch, before_reading=False)
    result = try_resume(run)
    assert (result.passed, result.start_step) == (True, 5)
    assert [path.name for path in reads] == ["000005"]


def test_a_checkpoint_that_is_rotated_away_while_it_is_verified_is_not_said_to_be_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside, verify, messages = run / "later", files.verify_folder, list[str]()
    (run / "checkpoints" / "000010").rename(aside)

    def look(path: Path, hashes: bool = True) -> None:
        if path.name == "000005" and aside.exists():
            files.remove_folder(path)
            aside.rename(run / "checkpoints" / "000010")
        verify(path, hashes)

    monkeypatch.setattr(files, "verify_folder", look)
    with without_report():
        result = resumption.try_resume(run, messages.append)
    assert (result.passed, result.start_step) == (True, 10)
    assert not any("damaged" in message for message in messages)


def test_a_damaged_checkpoint_of_a_run_at_rest_is_told(run: Path) -> None:
    messages: list[str] = []
    for name, expected in (("000010", 5), ("000005", 0)):
        (run / "checkpoints" / name / "state.json").unlink()
        with without_report():
            assert resumption.try_resume(run, messages.append).start_step == expected
        assert any("damaged" in message for message in messages)
    (run / "checkpoints" / "000000" / "state.json").unlink()
    with pytest.raises(DamagedError):
        try_resume(run)
