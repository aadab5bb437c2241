"""Files are there as a whole or not at all; a folder is what its manifest says.

A JSON file is strict.
"""

import ast
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from glasslm import files, strict_json
from glasslm.errors import DamagedError


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a file, ümlaut"
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert files.file_sha256(path) == hashlib.sha256(b"new").hexdigest()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_holds_its_bytes_and_arrays_and_a_manifest_of_them(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    contents: dict[str, list[files.Chunk]] = {
        "a": [b"head", array.T],
        "empty": [np.empty((0, 4), np.float32)],
        "number": [np.array(1.5)],
    }
    files.write_folder(tmp_path / "deep" / "folder", contents)
    folder = tmp_path / "deep" / "folder"
    files.verify_folder(folder)
    assert (folder / "a").read_bytes() == b"head" + array.T.tobytes()
    assert (folder / "number").read_bytes() == np.float64(1.5).tobytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["empty"] == {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    files.write_folder(folder, {"b": [b"other"]})  # replaces it as a whole
    assert {entry.name for entry in folder.iterdir()} == {"b", "manifest.json"}
    assert [entry.name for entry in folder.parent.iterdir()] == ["folder"]


def test_an_iterator_is_written_as_it_comes_and_the_next_file_after_it(tmp_path: Path) -> None:
    count = 0

    def numbers() -> Iterator[bytes]:
        nonlocal count
        for count in range(1, 4):
            yield bytes([count])

    files.write_folder(
        tmp_path / "folder", {"numbers": numbers(), "count": (bytes([count]) for _ in range(1))}
    )
    files.verify_folder(tmp_path / "folder")
    assert (tmp_path / "folder" / "numbers").read_bytes() == b"\1\2\3"
    assert (tmp_path / "folder" / "count").read_bytes() == b"\3"


def test_a_file_can_have_the_hash_of_its_content_as_its_name(tmp_path: Path) -> None:
    path = files.write_by_hash(tmp_path, iter([b"a", b"b"]), ".txt")
    assert path == tmp_path / f"{hashlib.sha256(b'ab').hexdigest()}.txt"
    assert path.read_bytes() == b"ab"
    assert files.write_by_hash(tmp_path, [b"ab"], ".txt") == path

    def failing_chunks() -> Iterator[bytes]:
        yield b"c"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_by_hash(tmp_path, failing_chunks(), ".txt")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from glasslm import files; "
        "files.write_by_hash(pathlib.Path(sys.argv[1]), iter(lambda: os._exit(9), 0), '.txt')"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    left = sorted(entry.name.partition(".tmp-")[0] for entry in tmp_path.iterdir())
    assert (killed.returncode, left) == (9, ["new", "new"])  # the file and its lock
    (tmp_path / "new.tmp-9").write_bytes(b"half")
    with FileLock(tmp_path / "new.tmp-9.lock"):  # of a process that lives
        path = files.write_by_hash(tmp_path, [b"ab"], ".txt")
        names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {path.name, "new.tmp-9", "new.tmp-9.lock"}


def test_without_hashes_only_names_and_sizes_count(tmp_path: Path) -> None:
    files.write_folder(tmp_path / "folder", {"one": [b"1234"]})
    (tmp_path / "folder" / "one").write_bytes(b"4321")
    files.verify_folder(tmp_path / "folder", hashes=False)
    with pytest.raises(DamagedError, match="altered"):
        files.verify_folder(tmp_path / "folder")
    (tmp_path / "folder" / "one").write_bytes(b"123")
    with pytest.raises(DamagedError, match="3 bytes"):
        files.verify_folder(tmp_path / "folder", hashes=False)


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for operation in ("_write", "_sync", "_sync_folder", "_rename"):
        original = getattr(files, operation)

        def record_operation(
            *arguments: Any, original: Any = original, operation: str = operation
        ) -> None:
            where = arguments[0]
            order.append(
                f"{operation} "
                f"{Path(where if isinstance(where, Path) else where.name).name.partition('.')[0]}"
            )
            original(*arguments)

        monkeypatch.setattr(files, operation, record_operation)
    files.write_atomic(tmp_path / "file", b"1")
    assert order == ["_write file", "_sync file", "_rename file", f"_sync_folder {tmp_path.name}"]
    order.clear()
    files.write_folder(tmp_path / "folder", {"one": [b"1"], "two": [b"2"]})
    written = [
        f"{operation} {name}"
        for name in ("one", "two", "manifest")
        for operation in ("_write", "_sync")
    ]
    assert order == [
        *written,
        "_sync_folder folder",
        "_rename folder",
        f"_sync_folder {tmp_path.name}",
    ]


def test_every_kind_of_damage_is_named_with_the_file(tmp_path: Path) -> None:
    def damaged(change: str, file: str) -> str:
        folder = tmp_path / change
        files.write_folder(folder, {"one": [b"1234"], "two": [b"5678"]})
        path = folder / file
        match change:
            case "missing" | "no manifest":
                path.unlink()
            case "extra" | "altered":
                path.write_bytes(b"4321")
            case "cut":
                path.write_bytes(b"12")
            case "reformatted":
                path.write_text(json.dumps(json.loads(path.read_text())))
            case "emptied":
                path.write_text("{}\n")
            case "overflowing":
                path.write_text(path.read_text().replace('"bytes": 4', '"bytes": 4e999'))
            case "folder":
                path.unlink()
                path.mkdir()
        with pytest.raises(DamagedError) as caught:
            files.verify_folder(folder)
        assert str(path) in str(caught.value)
        return str(caught.value)

    damaged("missing", "one")
    damaged("extra", "three")
    altered = damaged("altered", "two")
    assert hashlib.sha256(b"4321").hexdigest() in altered
    assert hashlib.sha256(b"5678").hexdigest() in altered
    cut = damaged("cut", "one")
    assert " 2 bytes" in cut
    assert "says 4" in cut
    damaged("folder", "one")
    damaged("no manifest", "manifest.json")
    damaged("reformatted", "manifest.json")
    damaged("emptied", "manifest.json")
    damaged("overflowing", "manifest.json")


def test_a_removed_folder_is_never_seen_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_folder(tmp_path / "x", {"one": [b"1"], "two": [b"2"]})

    def check_renamed(path: Path) -> None:
        assert not (tmp_path / "x").exists()
        files.verify_folder(path)

    monkeypatch.setattr(files, "_remove", check_renamed)
    files.remove_folder(tmp_path / "x")
    files.remove_folder(tmp_path / "never there")


def test_sweeping_removes_what_is_half_written_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "000500.tmp-123").mkdir()
    (tmp_path / "000500.tmp-123" / "model").write_bytes(b"half")
    (tmp_path / "run.json.tmp-9-removed").write_bytes(b"half")
    for name in ("000400", "run.json", "notes.tmp", "my.tmp-notes"):
        (tmp_path / name).write_bytes(b"whole")
    files.remove_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "000400",
        "run.json",
        "notes.tmp",
        "my.tmp-notes",
    }


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_replaced_folder_is_there_whenever_the_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Killed after so many of the two renames, before anything is cleaned up."""
    folder, rename = tmp_path / "000400", files._rename
    files.write_folder(folder, {"weights": [b"old"]})
    done: list[Path] = []

    def rename_or_die(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise SystemExit
        rename(source, target)
        done.append(target)

    def die(path: Path) -> None:
        raise SystemExit

    monkeypatch.setattr(files, "_rename", rename_or_die)
    monkeypatch.setattr(files, "_remove", die)
    with pytest.raises(SystemExit):
        files.write_folder(folder, {"weights": [b"new"]})
    monkeypatch.undo()
    files.remove_leftovers(tmp_path)
    files.verify_folder(folder)
    assert (folder / "weights").read_bytes() == (b"new" if renames == 2 else b"old")
    assert [entry.name for entry in tmp_path.iterdir()] == ["000400"]


def test_remove_takes_a_file_a_folder_or_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    for name in ("file", "folder", "absent"):
        files.remove(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_only_files_py_writes_and_removes_whole_files() -> None:
    """Verification works on copies in a temporary folder, which need no atomic writes."""
    operations = {"rmtree", "unlink", "rmdir", "removedirs", "write_text", "write_bytes", "move"}
    root = Path(files.__file__).parent
    callers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in operations
    }
    assert callers == {"files.py", "lab/verification/resumption.py"}


def test_an_appender_cuts_to_the_end_of_a_line_and_grows_from_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthr")
    log = files.Appender(path, start_bytes=4)
    log.append(b"2\n")
    assert path.read_bytes() == b"one\n2\n"
    assert log.bytes == 6
    log.close()
    for wrong in (3, 7, 100):
        with pytest.raises(DamagedError, match=str(wrong)):
            files.Appender(path, start_bytes=wrong)
        assert path.read_bytes() == b"one\n2\n"
    files.Appender(path).close()
    assert path.read_bytes() == b""


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_json_survives_to_the_bit(value: object) -> None:
    assert strict_json.parse_json(strict_json.json_bytes(value)) == value


def test_a_lone_surrogate_becomes_an_escape() -> None:
    assert strict_json.json_bytes("\udcff", indent=None) == b'"\\udcff"\n'
    assert strict_json.parse_json(b'"\\udcff"') == "\udcff"


@pytest.mark.parametrize(
    "text", [b"NaN", b"[Infinity]", b"{", b"\xff", b"[" * 200_000, b"1" * 5000], ids=repr
)
def test_what_is_not_strict_json_is_damage(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(DamagedError, match=r"x\.json"):
        files.read_json(path)
    with pytest.raises(DamagedError, match=r"y\.json is missing"):
        files.read_json(tmp_path / "y.json")
