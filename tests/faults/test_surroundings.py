"""Odd clocks, odd paths, folders that cannot be written, small disks.

A run does not depend on them, or says so.
"""

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli
from glasslm.config.schema import ComputeConfig
from glasslm.errors import ExhaustedError
from glasslm.runs import checkpoint, run_folder
from glasslm.training import launch
from small_runs import (
    comparable_results,
    ignore_message,
    logged_lines,
    resume,
    run_program,
    small_config,
    train,
    train_command,
    without_report,
    write_text,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals or links")
ENGINES = ["numpy", "torch"]
TINY: dict[str, Any] = {
    "d_model": 16,
    "n_layers": 1,
    "max_steps": 10,
    "sample_interval": 0,
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(text, tmp_path_factory.mktemp("runs") / "whole", **TINY).run_dir


# -- clocks ----------------------------------------------------------------------------------------


def backward_clock() -> Iterator[float]:
    """A wall clock that is set back by an hour whenever it is asked."""
    return itertools.count(2e9, -3600.0)


def stopped_clock() -> Iterator[float]:
    return itertools.repeat(1.7e9)


def epoch_clock() -> Iterator[float]:
    return itertools.repeat(0.0)


@pytest.mark.parametrize("clock", [backward_clock, stopped_clock, epoch_clock])
def test_the_wall_clock_decides_nothing(
    clock: Any, text: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a result nor a duration, which are monotonic time."""
    ticks = clock()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(ticks))
        run = train(text, tmp_path / "run", **TINY).run_dir
    assert comparable_results(run, 10) == comparable_results(uninterrupted, 10)
    elapsed = [
        line["timing"]["elapsed_s"] for line in run_folder.Run(run).metrics() if "timing" in line
    ]
    assert elapsed == sorted(elapsed)
    assert 0 <= elapsed[0] <= elapsed[-1] < 60


@pytest.mark.parametrize("stamps", ["equal", "the other way round", "before 1970"])
def test_steps_order_checkpoints_and_their_timestamps_do_not(
    stamps: str, text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    folders = sorted((run / "checkpoints").iterdir())
    for number, folder in enumerate(folders):
        when = {"equal": 1e9, "the other way round": 1e9 - 1e6 * number, "before 1970": -1e6}[
            stamps
        ]
        for path in (folder, *folder.iterdir()):
            os.utime(path, (when, when))
    assert checkpoint.load(run).step == 10
    shutil.rmtree(folders[-1])
    assert checkpoint.load(run).step == int(folders[-2].name) < 10
    assert resume(run).status == "finished"
    assert comparable_results(run, 10) == comparable_results(uninterrupted, 10)


# -- paths -----------------------------------------------------------------------------------------

NAMES = {
    "spaces": " a run  with spaces ",
    "unicode": "Läufe ö 走る 🏃",
    "decomposed": "e\u0301te\u0301",  # which some file systems compose
    "quotes": 'it\'s a "run"' if os.name == "posix" else "it's a run",
    "shell": "$HOME; echo `x` & #!%",
    "looks like a flag": "--run",
    "looks like a pattern": "run[1]",
    "dots": "run.v1.tmp",
    "a checkpoint's name": "000005",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_will_do_for_a_run_and_its_text(
    name: str, text: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    own = folder / f"{name}.txt"
    shutil.copyfile(text, own)
    run = train(own, folder / name, **TINY).run_dir
    assert comparable_results(run, 10) == comparable_results(uninterrupted, 10)
    shutil.rmtree(run / "checkpoints" / "000010")
    assert resume(run).status == "finished"
    assert comparable_results(run, 10) == comparable_results(uninterrupted, 10)
    assert cli.main(["verify", str(run)]) == 0
    assert cli.main(["generate", str(run), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert "damaged" not in capsys.readouterr().out


def linked_folder(place: Path) -> Path:
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real", target_is_directory=True)
    return place / "link"


def linked_parent(place: Path) -> Path:
    return linked_folder(place) / "run"


def relative_link(place: Path) -> Path:
    (place / "real").mkdir()
    (place / "link").symlink_to("real", target_is_directory=True)
    return place / "link" / ".." / "link" / "run"


@posix
@pytest.mark.parametrize("link", [linked_folder, linked_parent, relative_link])
def test_a_run_may_be_behind_a_link(
    link: Any, text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").symlink_to(text)
    run = train(tmp_path / "text.txt", link(tmp_path), **TINY).run_dir
    shutil.rmtree(run / "checkpoints" / "000010")
    moved = run.resolve()
    assert moved != run
    assert resume(run).status == "finished"
    assert comparable_results(moved, 10) == comparable_results(uninterrupted, 10)
    assert cli.main(["verify", str(run)]) == 0


@posix
@pytest.mark.parametrize("broken", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere_is_said_before_training(
    broken: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / ("link" if broken == "itself" else "nothing"))
    code = cli.main([str(word) for word in train_command(text, tmp_path / "link", **TINY)])
    message = capsys.readouterr().err
    assert (code, "Traceback" in message) == (2, False), message
    assert "link" in message
    assert "step" not in message


def test_a_folder_that_cannot_be_written_is_said_before_training(
    text: Path, tmp_path: Path
) -> None:
    """In the words of one who is not root, if need be."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    tmp_path.chmod(0o755)
    if os.access(closed, os.W_OK):
        pytest.skip("root may read everything, and write it")
    done = run_program(*train_command(text, closed / "run", **TINY))
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "step" not in done.stderr
    assert not any(closed.iterdir())


@posix
@pytest.mark.parametrize("command", ["train", "resume"])
def test_a_read_only_file_system_is_said_before_training(
    command: str,
    text: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with mount_tmpfs(tmp_path / "disk", "16m") as disk:
        run = disk / "run"
        if command == "resume":
            shutil.copytree(uninterrupted, run)
            shutil.rmtree(run / "checkpoints" / "000010")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        argv = train_command(text, run, **TINY) if command == "train" else ["resume", str(run)]
        code = cli.main([str(word) for word in argv])
        message = capsys.readouterr().err
        assert (code, "Traceback" in message) == (2, False), message
        assert "cannot be written" in message
        assert "loss" not in message


# -- a small disk ----------------------------------------------------------------------------------


@contextmanager
def mount_tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own of that size in memory, where the system allows it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs resource limits: a small disk, which only root may mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@posix
@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_of_two_megabytes_ends_a_run_in_words_and_more_room_ends_it_well(
    engine: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a save.

    The checkpoint before it is whole, no half file stays, and a resumed run has the same bits.
    """
    if engine == "torch":
        pytest.importorskip("torch")
    compute = ComputeConfig(engine=engine, device="cpu", precision="fp32", threads=1)
    sizes = {
        "d_model": 32,
        "n_layers": 7,
        "max_steps": 10,
        "sample_interval": 0,
        "batch_size": 4,
        "keep": 9,
    }
    with without_report():
        launch.train(
            small_config(text, **sizes), compute, tmp_path / "whole", notify=ignore_message
        )
    one = sum(
        path.stat().st_size for path in (tmp_path / "whole" / "checkpoints" / "000000").iterdir()
    )
    assert 2 * one < 2 << 20 < 3 * one, "the third checkpoint does not fit"
    with mount_tmpfs(tmp_path / "disk", "2m") as disk:
        run = disk / "run"
        with without_report(), pytest.raises(ExhaustedError) as caught:
            launch.train(small_config(text, **sizes), compute, run, notify=ignore_message)
        assert "000010" in str(caught.value)
        assert "bytes are needed" in str(caught.value)
        assert "are free" in str(caught.value)
        assert checkpoint.load(run).step == 5
        assert checkpoint.list_steps(run) == [0, 5]
        assert not list(run.rglob("*.tmp-*"))
        assert logged_lines(run, "end")[0]["status"] == "failed"
        capsys.readouterr()
        assert cli.main(["resume", str(run), "--threads", "1"]) == ExhaustedError.exit_code
        message = capsys.readouterr().err
        assert "Free some space" in message
        assert "Traceback" not in message
        subprocess.run(
            ["mount", "-o", "remount,size=16m", str(disk)], check=True, capture_output=True
        )
        with without_report():
            assert launch.resume(run, compute, notify=ignore_message).status == "finished"
        assert comparable_results(run, 10) == comparable_results(tmp_path / "whole", 10)


def fill_disk(path: Path) -> None:
    """Leave no room for anything else."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


@posix
def test_a_disk_without_room_for_a_line_of_the_log_keeps_whole_lines(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two checkpoints; what the system took of the line that had no room is taken back."""
    seldom = {"max_steps": 40, "eval_interval": 1000, "checkpoint_interval": 1000}
    uninterrupted = train(text, tmp_path / "whole", **TINY | seldom).run_dir
    with mount_tmpfs(tmp_path / "disk", "4m") as disk:
        run = shutil.copytree(uninterrupted, disk / "run")
        shutil.rmtree(run / "checkpoints" / "000040")
        os.truncate(run / "metrics.jsonl", checkpoint.load(run).position.metrics_bytes)
        fill_disk(disk / "ballast")
        assert cli.main(["resume", str(run), "--threads", "1"]) == ExhaustedError.exit_code
        assert f"no room to write {run / 'metrics.jsonl'}" in capsys.readouterr().err
        assert checkpoint.load(run).step == 0
        assert 0 < len(logged_lines(run, "step")) < 40
        assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n")
        (disk / "ballast").unlink()
        assert resume(run).status == "finished"
        assert comparable_results(run, 40) == comparable_results(uninterrupted, 40)
