"""A lack of memory, of open files or of room on the disk is exit code 6 in words, never damage.

Each file that a command opens is refused by the system once, for one of these reasons. A slow test
runs commands in real limits; for it, this file is a program: `python test_exhaustion.py FOLDER`.
"""

import ast
import errno
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import glasslm
from forked_commands import load_commands, run_forked, run_script
from glasslm import cli
from glasslm.report import run_report
from glasslm.runs import checkpoint
from glasslm.training import launch
from small_runs import COMPUTE, ignore_message, small_config, train, train_command, write_text

REASONS = (errno.EMFILE, errno.ENOMEM, errno.ENFILE, errno.ENOSPC)
TINY: dict[str, Any] = {"max_steps": 2, "sample_interval": 0, "checkpoint_interval": 2}

Watch = Callable[[Any], None]  # of the path or descriptor that is opened
_watch: Watch | None = None  # what the audit hook, which Python never removes, calls at present


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None and event == "open":
        _watch(arguments[0])


sys.addaudithook(_audit)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Call `watch` before each file that this process opens."""
    global _watch
    _watch = watch
    try:
        yield
    finally:
        _watch = None


def opened_files(folder: Path, argv: list[str]) -> list[str]:
    """The files below `folder` that a command opens, in order, by their paths in it."""
    paths: list[str] = []

    def record(name: Any) -> None:
        if isinstance(name, str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(name))
            if path.startswith(f"{folder}{os.sep}") and not os.path.isdir(path):
                paths.append(os.path.relpath(path, folder))

    with watching(record):
        code = cli.main(argv)
    assert code in (0, 1), argv
    return list(dict.fromkeys(paths))


def refuse(path: Path, number: int) -> Watch:
    """The system refuses to open `path`."""

    def check(name: Any) -> None:
        is_named = isinstance(name, str | bytes | os.PathLike)
        if is_named and os.path.abspath(os.fsdecode(name)) == str(path):
            raise OSError(number, os.strerror(number), str(path))

    return check


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A text, a finished run, a run to resume, a model folder, a log and a table."""
    folder = tmp_path_factory.mktemp("exhausted").resolve()
    text = write_text(folder / "text.txt", sentences=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSLM_CACHE", str(folder / "cache"))
        patch.setattr(run_report, "write", lambda run_dir, *_: run_dir / "report.html")
        patch.setitem(sys.modules, "transformers", None)  # it reads the files of an export, too
        train(text, folder / "run", **TINY)
        config = small_config(text, **TINY | {"max_steps": 4})
        launch.train(config, COMPUTE, folder / "cut", stop_at=2, notify=ignore_message)
        hf_folder = str(folder / "hf")
        tuned = ["--run-dir", str(folder / "tuned"), "--max-steps", "2", "--text-file", str(text)]
        assert cli.main(["finetune", str(folder / "run"), *tuned]) == 0
        assert cli.main(["export", str(folder / "run"), "--to", "hf", "--out", hf_folder]) == 0
        (folder / "log.csv").write_text("step,loss\n" + "".join(f"{i},2.{i}\n" for i in range(99)))
        yield folder


def commands(folder: Path) -> dict[str, list[str]]:
    run, out, text = str(folder / "run"), str(folder / "out"), folder / "text.txt"
    tokenizer = str(folder / "run" / "tokenizer.json")
    return {
        "verify": ["verify", run],
        "evaluate": ["evaluate", run],
        "evaluate a text": ["evaluate", run, "--text-file", str(text)],
        "generate": ["generate", run, "--prompt", "a", "--max-new-tokens", "2"],
        "compare": ["compare", run, run, "--out", out],
        "resume": ["resume", out],
        "train": train_command(text, Path(out), **TINY),
        "train with a tokenizer": train_command(text, Path(out), **TINY, tokenizer=tokenizer),
        "finetune": ["finetune", run, "--text-file", str(text), "--run-dir", out,
                     "--max-steps", "2", "--sample-interval", "0"],
        "merge": ["merge", str(folder / "tuned"), "--run-dir", out],
        "export": ["export", run, "--to", "hf", "--out", out],
        "import": ["import", str(folder / "hf"), "--run-dir", out],
        "corpus": ["corpus", "inspect", "--text-file", str(text)],
        "diagnose a curve": ["diagnose", "--curve", str(folder / "log.csv"), "--out", out],
    }  # fmt: skip


ONLY = {  # the files of commands whose other files are those of `train`
    "compare": "run/",
    "finetune": "run/",
    "train with a tokenizer": "run/",
}


def prepare(folder: Path, name: str) -> None:
    for path in (folder / "out", folder / "cache"):
        if path.is_dir():
            shutil.rmtree(path)
    checkpoint._verified_folders.clear()  # each command is a process of its own
    if name == "resume":
        shutil.copytree(folder / "cut", folder / "out")


@pytest.mark.parametrize("name", commands(Path()))
def test_no_file_that_cannot_be_opened_is_called_damaged(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = commands(folder)[name]
    prepare(folder, name)
    paths = [path for path in opened_files(folder, argv) if path.startswith(ONLY.get(name, ""))]
    assert paths
    for number, path in zip(itertools.cycle(REASONS), paths):
        prepare(folder, name)
        capsys.readouterr()
        with watching(refuse(folder / path, number)):
            code = cli.main(argv)
        messages = capsys.readouterr().err.splitlines()
        assert code == 6, (path, messages)
        message = messages[-1]
        full = os.strerror(errno.ENOSPC)
        words = {errno.ENOSPC: (full, "is full")}.get(number, (os.strerror(number),))
        assert any(word in message for word in words), (path, message)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("loss"), "KeyError: 'loss'"),
        (RuntimeError("two\nlines"), "RuntimeError: two / lines"),
        (MemoryError(), "out of memory"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    ],
    ids=repr,
)
def test_a_finished_run_does_not_fail_because_of_its_report(
    error: Exception,
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(run_dir: Path, *_: float) -> Path:
        raise error

    monkeypatch.setattr(run_report, "write", fail)
    prepare(folder, "resume")
    assert cli.main(commands(folder)["resume"]) == 0
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning.startswith("warning: the report was not written")
    assert reason in warning
    assert f"`glasslm report {folder / 'out'}`" in warning


def converts_unasked(handler: ast.ExceptHandler) -> bool:
    """Whether it makes another error of an OSError, and does not ask whether a resource ran out."""
    names = {node.id for node in ast.walk(handler.type or handler) if isinstance(node, ast.Name)}
    inside = [node for statement in handler.body for node in ast.walk(statement)]
    raised = [node.exc for node in inside if isinstance(node, ast.Raise)]
    kinds = {exc.func.id for exc in raised
             if isinstance(exc, ast.Call) and isinstance(exc.func, ast.Name)}  # fmt: skip
    converts = bool(kinds - {"ApiError"})  # a server answers with the reason, and goes on
    asks = None in raised or any(
        isinstance(node, ast.Name) and node.id == "raise_if_exhausted" for node in inside
    )
    return bool(names & {"OSError", "Exception", "GlasslmError"}) and converts and not asks


def test_each_handler_that_converts_a_system_error_asks_what_ran_out() -> None:
    """`errors.explain_system_errors` does so, and needs no handler."""
    root = Path(glasslm.__file__).parent
    handlers = [
        (f"{path.relative_to(root).as_posix()}:{node.lineno}", node)
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
    ]
    assert len(handlers) > 100
    assert [place for place, handler in handlers if converts_unasked(handler)] == []


# -- real limits -----------------------------------------------------------------------------------

N_FILES = (0, 1, 2, 3, 5, 8, 16)  # that a process may open beside those that it has
ROOM_MB = (1, 4, 16, 64, 400)  # of address space beside what the process has


def limit_files(count: int) -> Callable[[Callable[[], None]], None]:
    def prepare(ready: Callable[[], None]) -> None:
        import resource

        limit = max(map(int, os.listdir("/proc/self/fd"))) + count
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    return prepare


def limit_memory(megabytes: int) -> Callable[[Callable[[], None]], None]:
    def prepare(ready: Callable[[], None]) -> None:
        import resource

        status = Path("/proc/self/status").read_text(encoding="ascii")
        size = re.search(r"VmSize:\s+(\d+) kB", status)
        assert size
        limit = (int(size[1]) << 10) + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return prepare


def run_in_limits(folder: Path) -> dict[str, Any]:
    load_commands()
    os.environ["GLASSLM_CACHE"] = str(folder / "cache")
    text, run = write_text(folder / "text.txt"), str(folder / "run")
    train(text, folder / "run", **TINY, d_model=256, n_layers=4)
    threads = ["--threads", "1"]
    argvs = {
        "train": train_command(text, folder / "new", **TINY),
        "generate": ["generate", run, "--prompt", "a", "--max-new-tokens", "2", *threads],
        "verify": ["verify", run],
        "report": ["report", run],
        "evaluate": ["evaluate", run, *threads],
    }
    results: dict[str, Any] = {}
    for name, argv in argvs.items():
        for limits, limit in ((N_FILES, limit_files), (ROOM_MB, limit_memory)):
            for number in limits:
                shutil.rmtree(folder / "new", ignore_errors=True)
                key = f"{name}, {limit.__name__} {number}"
                results[key] = run_forked(argv, limit(number), place=folder)._asdict()
    return results


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs resource limits that bind, as Linux has")
def test_commands_end_in_words_within_real_limits(tmp_path: Path) -> None:
    results = run_script(__file__, tmp_path)
    for name, result in results.items():
        assert "Traceback" not in result["err"], (name, result["err"][-2000:])
        assert result["code"] in (0, 6), (name, result)
    codes = {name: result["code"] for name, result in results.items()}
    assert all(codes[f"{name}, limit_files 0"] == 6 for name in ("train", "generate", "verify"))
    # How much memory a fork has left to reuse is chance: only some of the low limits are too low.
    assert 6 in [code for name, code in codes.items() if "limit_memory" in name]
    assert list(codes.values()).count(0) > 8


if __name__ == "__main__":
    print(json.dumps(run_in_limits(Path(sys.argv[1]))))
