"""One process a run: a lock names its holder and removes leftovers."""

import json
import os
from pathlib import Path

import pytest

from glasslm.errors import InputError, InUseError
from glasslm.runs.run_lock import lock_run


def test_a_lock_is_exclusive_names_its_holder_and_removes_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with lock_run(folder):
        signature = json.loads((folder / "run.lock").read_text())
        assert signature["pid"] == os.getpid()
        assert set(signature) == {"pid", "host", "start"}
        with (
            pytest.raises(InUseError, match=f"process {os.getpid()} on {signature['host']}"),
            lock_run(folder),
        ):
            pass
        (folder / "file.tmp-77").write_bytes(b"half")
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "000001.tmp-77").mkdir()
    with lock_run(folder):
        assert not (folder / "file.tmp-77").exists()
        assert not list((folder / "checkpoints").iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(InputError, match="choose another place"),
        lock_run(tmp_path / "file" / "run"),
    ):
        pass
