"""What a run relies on is removed, cut or changed while it trains: it says so and stops."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from glasslm.data.cache import cache_dir
from glasslm.data.token_file import TokenFile
from glasslm.errors import DamagedError
from glasslm.runs.run_folder import Run
from glasslm.training.loop import Loop
from small_runs import (
    comparable_results,
    logged_lines,
    read_json,
    resume,
    start_program,
    train,
    train_command,
    wait_for,
    write_text,
)

FLAGS: dict[str, Any] = {"max_steps": 6, "sample_interval": 0, "checkpoint_interval": 3}
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL or resource limits")


def remove_folder(run_dir: Path) -> None:
    shutil.rmtree(run_dir)


def replace_folder(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("moved"))
    shutil.copytree(run_dir.with_name("moved"), run_dir)


def remove(name: str) -> Callable[[Path], None]:
    return lambda run_dir: (run_dir / name).unlink()


def append(name: str, content: bytes) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        with open(run_dir / name, "ab") as file:
            file.write(content)

    return change


def replace(name: str) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        content = (run_dir / name).read_bytes()
        (run_dir / name).rename(run_dir / "old")
        (run_dir / name).write_bytes(content)

    return change


def edit(name: str, before: bytes, after: bytes) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        path = run_dir / name
        assert before in path.read_bytes()
        with open(path, "r+b") as file:
            content = file.read().replace(before, after)
            file.seek(0)
            file.write(content)
            file.truncate()
        stamp = path.stat()
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**7))

    return change


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (remove_folder, r"run was removed|metrics\.jsonl was removed"),
    "another folder": (replace_folder, r"run was replaced|metrics\.jsonl was removed or replaced"),
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints was removed"),
    "no lock": (remove("run.lock"), r"run\.lock was removed"),
    "no record": (remove("run.json"), r"run\.json was removed"),
    "another record": (edit("run.json", b'"numpy"', b'"torch"'), r"run\.json was altered"),
    "no tokenizer": (remove("tokenizer.json"), r"tokenizer\.json was removed"),
    "another tokenizer": (append("tokenizer.json", b" "), r"tokenizer\.json was altered"),
    "no log": (remove("metrics.jsonl"), r"metrics\.jsonl was removed"),
    "another log": (replace("metrics.jsonl"), r"metrics\.jsonl was removed or replaced"),
    "a longer log": (append("metrics.jsonl", b"x\n"), r"metrics\.jsonl was changed"),
    "a shorter log": (lambda run: os.truncate(run / "metrics.jsonl", 9), "was changed"),
    "an edited log": (edit("metrics.jsonl", b'"step": 0', b'"step": 9'), "was changed"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", sentences=40)


def change_at(step: int, change: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the change in the middle of a step."""
    right = Loop.advance

    def advance(self: Loop) -> Any:
        if self.step + 1 == step:
            change()
        return right(self)

    monkeypatch.setattr(Loop, "advance", advance)


def token_file(run_dir: Path, name: str = "train.bin") -> Path:
    return cache_dir("tokens") / read_json(run_dir / "run.json")["data"]["sha256"] / name


@posix
@pytest.mark.parametrize("case", CHANGES)
def test_a_change_during_training_is_named_and_ends_the_run(
    case: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = CHANGES[case]
    run_dir = tmp_path / "run"
    change_at(2, lambda: change(run_dir), monkeypatch)
    with pytest.raises(DamagedError, match=message) as caught:
        train(text, run_dir, **FLAGS)
    assert "glasslm resume" in str(caught.value)
    steps = [path.name for path in (run_dir / "checkpoints").glob("*")]
    assert steps in ([], ["000000"])  # none was written, whole or in part


@posix
def test_a_touched_file_is_no_change(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def touch_all() -> None:
        for path in (*run_dir.glob("*.json*"), token_file(run_dir)):
            os.utime(path)

    change_at(2, touch_all, monkeypatch)
    assert train(text, run_dir, **FLAGS).status == "finished"


@posix
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_tokens_that_are_cut_during_training_are_named(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    change_at(2, lambda: os.truncate(token_file(run_dir, name), 2), monkeypatch)
    with pytest.raises(DamagedError, match="cut"):
        train(text, run_dir, **FLAGS)
    monkeypatch.undo()
    assert resume(run_dir).status == "finished"  # the tokens are made again


@posix
def test_tokens_that_are_altered_during_training_are_named(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def alter() -> None:
        path = token_file(run_dir, "val.bin")
        with open(path, "r+b") as file:
            file.write(b"\x01\x00\x01\x00")
        os.utime(path, ns=(0, 0))

    change_at(2, alter, monkeypatch)
    with pytest.raises(DamagedError, match=r"val\.bin was altered.*makes them again"):
        train(text, run_dir, **FLAGS)


@posix
def test_a_cache_that_is_removed_during_training_does_no_harm(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, run_dir = (train(text, tmp_path / "plain", **FLAGS).run_dir, tmp_path / "run")
    change_at(2, lambda: shutil.rmtree(token_file(run_dir).parent), monkeypatch)
    assert train(text, run_dir, **FLAGS).status == "finished"
    assert comparable_results(run_dir, 6) == comparable_results(plain, 6)


@posix
def test_a_program_whose_tokens_are_cut_ends_with_4_and_not_by_a_signal(
    text: Path, tmp_path: Path
) -> None:
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    environment = os.environ | {"GLASSLM_CACHE": str(cache), "PYTHONIOENCODING": "utf-8"}
    command = train_command(
        text, run_dir, **FLAGS | {"max_steps": 100_000, "eval_interval": 100_000}
    )
    process = start_program(*command, env=environment)
    wait_for(
        lambda: (run_dir / "metrics.jsonl").exists() and bool(logged_lines(run_dir, "checkpoint")),
        process,
    )
    (train_tokens,) = cache.glob("tokens/*/train.bin")
    os.truncate(train_tokens, 0)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 4, message
    assert "Traceback" not in message
    # An evaluation or a batch finds it, whichever comes first.
    assert "the tokens in the cache were " in message.lower()
    assert Run(run_dir).history.status == "failed"


@posix
def test_a_file_of_tokens_that_is_cut_at_any_moment_is_damage_and_never_a_signal(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tokens.bin"
    whole = np.arange(30_000, dtype=np.uint16)
    whole.tofile(path)
    tokens = TokenFile(path, whole.dtype)
    assert len(tokens) == 30_000
    assert_array_equal(tokens[:], whole)
    assert_array_equal(tokens[-3:], whole[-3:])
    assert len(tokens[5:5]) == 0
    os.truncate(path, 20_001)  # within a token
    assert_array_equal(tokens[:10_000], whole[:10_000])
    for part in (slice(None), slice(9_999, 10_001), slice(20_000, 20_001)):
        with pytest.raises(DamagedError, match="from 60,000 to 20,001 bytes"):
            tokens[part]
    path.unlink()
    assert_array_equal(tokens[:4], whole[:4])
