"""Exports, imports and merges that are killed or terminated leave nothing of a model's size.

SIGTERM cleans up at once. After SIGKILL the next command in the same folder removes what is left.
This file is also the program of the processes: `python test_killed_exchange.py FOLDER`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from glasslm import cli, files
from glasslm.errors import InputError
from tuned_runs import finetune, make_base, write_new_text

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL or resource limits")
OPERATIONS = ("_make_folder", "_open", "_write", "_sync", "_sync_folder", "_rename")
MOMENTS = 4  # of each command and signal
EXCHANGES = {
    "hf": ["export", "{base}", "--to", "hf", "--out", "{out}"],
    "gguf": ["export", "{base}", "--to", "gguf", "--out", "{out}.gguf"],
    "peft": ["export", "{tuned}", "--to", "peft", "--out", "{out}"],
    "import": ["import", "{model}", "--run-dir", "{out}"],
    "import of adapters": ["import", "{adapters}", "--base", "{base}", "--run-dir", "{out}"],
    "merge": ["merge", "{tuned}", "--run-dir", "{out}"],
}


def signal_at(k: int, number: int) -> Callable[[], int]:
    """This process gets a signal before its k-th operation on the disk; returns their count."""
    count = 0

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == k:
                os.kill(os.getpid(), number)
            return operation(*arguments, **options)

        return run

    for name in OPERATIONS:
        setattr(files, name, wrap(getattr(files, name)))
    return lambda: count


def run_in_child(argv: list[str], k: int = -1, number: int = 0) -> tuple[int, int]:
    """The exit code of a command (negative: a signal), and its operations on the disk."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        count, code = signal_at(k, number), 99
        try:
            code = cli.main(argv)
        except SystemExit as error:
            code = int(str(error.code))
        finally:
            os.write(writing, str(count()).encode())
            os._exit(code)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(reading) as pipe:
        return code, int(pipe.read() or 0)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kill_exchange(folder: Path, place: Path, argv: list[str]) -> dict[str, Any]:
    """One command, whole, then terminated and killed at several moments, then whole again."""

    def run(name: str, *interruption: int) -> tuple[int, int]:
        values = {key: str(folder / key) for key in ("base", "tuned", "model", "adapters")}
        return run_in_child(
            [word.format(out=place / name, **values) for word in argv], *interruption
        )

    place.mkdir()
    values = {key: str(folder / key) for key in ("base", "tuned", "model", "adapters")}
    # In this process, so that its children have the modules.
    cli.main([word.format(out=folder / f"{place.name}-first", **values) for word in argv])
    code, operations = run("whole")
    whole = names(place)
    codes, left, killed = {}, {}, 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        for moment in range(MOMENTS):
            k = operations * moment // MOMENTS
            codes[f"{number.name} {k}"], _ = run(f"{number.name}-{k}", k, number)
            if number == signal.SIGTERM:
                left[k] = sorted(set(names(place)) - set(whole))
            else:
                killed = max(killed, len(set(names(place)) - set(whole)))
    again, _ = run("again")
    new = sorted(set(names(place)) - set(whole))
    return {"first": code, "operations": operations, "codes": codes, "left": left,
            "killed": killed, "again": again, "whole": whole, "new": new}  # fmt: skip


@posix
@pytest.mark.slow
def test_killed_exchanges_leave_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = make_base(tmp_path, max_steps=2)
    tuned = finetune(base, write_new_text(tmp_path), tmp_path / "tuned", lora_rank=2, max_steps=2)
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    exports = ((base, "hf", "model"), (tuned, "peft", "adapters"))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", __file__, str(tmp_path)]
    for run, to, name in exports:
        folder = tmp_path / name
        assert "not compared" in subprocess.run(
            [*command, "export", str(run), "--to", to, "--out", str(folder)],
            capture_output=True, text=True, check=True, env=environment,
        ).stdout  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["name"] for result in results] == list(EXCHANGES)
    for result in results:
        name = result["name"]
        assert (result["first"], result["again"]) == (0, 0), name
        assert result["operations"] >= MOMENTS, name
        for moment, code in result["codes"].items():
            assert code == (143 if moment.startswith("SIGTERM") else -signal.SIGKILL), moment
        assert set(map(tuple, result["left"].values())) == {()}, name
        assert result["killed"] > 0, name  # SIGKILL leaves something, which the next run removes
        assert result["new"] == [file.replace("whole", "again") for file in result["whole"]], name


def test_only_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    orphans = ["a.tmp-12", "b[1].gguf.tmp-12", "b[1].gguf.tmp-12.tmp-12"]
    others = ["a.tmp-123", "b[1].gguf", "live.tmp-9", "live.tmp-9.tmp-9", "notes.tmp-1999"]
    for name in [*orphans, *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"w")
    for name in ("a.tmp-12.lock", "b[1].gguf.tmp-12.lock"):
        (tmp_path / name).touch()
    with FileLock(tmp_path / "live.tmp-9.lock"), files.atomic_path(tmp_path / "new") as path:
        path.write_bytes(b"x")
    names = set(os.listdir(tmp_path)) - {"live.tmp-9.lock"}
    assert names == {*others, "new"}


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with files.atomic_path(tmp_path / "new") as path:
            path.mkdir()
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "theirs").touch()

    with pytest.raises(InputError, match="exists already"):
        write()
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == ["theirs"]


def main(folder: Path, argv: list[str]) -> None:
    """One command, or all EXCHANGES with their interruptions, a line of JSON for each."""
    for library in ("transformers", "peft", "llama_cpp"):  # which take seconds to import
        sys.modules[library] = None  # type: ignore[assignment]
    if argv:
        raise SystemExit(cli.main(argv))
    os.fsync = lambda descriptor: None  # type: ignore # the processes die, the machine does not
    import gguf  # noqa: F401 - once, before the forks

    for number, (name, words) in enumerate(EXCHANGES.items()):
        result = kill_exchange(folder, folder / f"place-{number}", words)
        print(json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
