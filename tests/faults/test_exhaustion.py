"""Too many open files and no memory to map one are exit code 6 in words, never damage."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli, files
from glasslm.data import dataset
from glasslm.errors import ExhaustedError
from glasslm.lab.verification import integrity
from glasslm.runs import checkpoint, tensor_file
from glasslm.runs.run_folder import Run
from small_runs import ignore_message, train, write_text

FLAGS: dict[str, Any] = {"max_steps": 2, "sample_interval": 0, "checkpoint_interval": 2}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exhausted")
    return train(write_text(folder / "text.txt", sentences=40), folder / "run", **FLAGS).run_dir


@pytest.fixture(params=[errno.EMFILE, errno.ENFILE, errno.ENOMEM], ids=errno.errorcode.get)
def error(request: pytest.FixtureRequest) -> OSError:
    return OSError(request.param, os.strerror(request.param), "a file")


def raise_error(error: OSError) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    return refuse


def test_tensors_that_cannot_be_mapped_are_not_damaged(
    error: OSError, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "safe_open", raise_error(error))
    with pytest.raises(ExhaustedError, match="not damaged"):
        dict(checkpoint.load(run_dir).state())
    with pytest.raises(ExhaustedError, match="not damaged"):
        list(integrity.examine_run(run_dir))


def test_tokens_that_cannot_be_opened_are_not_made_again(
    error: OSError, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "TokenFile", raise_error(error))
    with pytest.raises(ExhaustedError, match="not damaged"):
        Run(run_dir).dataset(ignore_message)


@pytest.mark.parametrize("command", ["verify", "evaluate", "resume"])
def test_a_command_that_cannot_open_a_file_exits_with_6(
    command: str,
    error: OSError,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files, "file_sha256", raise_error(error))
    assert cli.main([command, str(run_dir)]) == 6
    message = capsys.readouterr().err.splitlines()[-1]
    assert "not damaged" in message
    assert str(error.strerror) in message
