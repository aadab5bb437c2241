"""Signals in the middle of each kind of work: the exit code is 128 + n, and nothing half is left.

This file is also the program that runs the commands: `python test_signals_in_commands.py FOLDER`.
"""

import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forked_commands import load_commands, run_forked, run_script
from small_runs import shorten_runs, train, train_command, write_text

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

Ready = Callable[[], None]
TINY = {"max_steps": 2, "eval_interval": 1, "sample_interval": 0}
OTHERS = {"SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138, "SIGXCPU": 152}


def wait_in_python(ready: Ready) -> None:
    ready()
    while True:
        time.sleep(0.01)


def wait_in_library(ready: Ready) -> None:
    """A call of C that takes an hour, and looks for no signal."""
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def wait_in_callbacks(ready: Ready) -> None:
    """Python drops an exception in the callback of a weak reference."""

    class Buffer:
        """Something that a weak reference can refer to."""

    ready()
    while True:
        time.sleep(0.2)
        buffer = Buffer()
        reference = weakref.ref(buffer, lambda _: time.sleep(0.2))
        del buffer, reference


def patch(target: str, wait: Callable[[Ready], None], after: int = 0) -> Callable[[Ready], None]:
    """The function `target` (module:name) waits at its call number `after`."""

    def prepare(ready: Ready) -> None:
        import importlib

        module, _, name = target.partition(":")
        owner: Any = importlib.import_module(module)
        *path, name = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original, calls = getattr(owner, name), [0]

        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                wait(ready)
            return original(*arguments, **options)

        setattr(owner, name, call)

    return prepare


def slow_library(method: str) -> Callable[[Ready], None]:
    """The tokenizers library needs an hour in Rust for `method`."""

    def prepare(ready: Ready) -> None:
        import tokenizers

        library = tokenizers.Tokenizer

        class Slow:
            def __init__(self, model: Any) -> None:
                self.__dict__["own"] = model if isinstance(model, library) else library(model)

            @staticmethod
            def from_str(text: str) -> "Slow":
                return Slow(library.from_str(text))

            def __getattr__(self, name: str) -> Any:
                if name == method:
                    return lambda *_, **__: wait_in_library(ready)
                return getattr(self.own, name)

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(self.own, name, value)

        tokenizers.Tokenizer = Slow  # type: ignore[assignment,misc]

    return prepare


def endless_evaluation(after: int) -> Callable[[Ready], None]:
    """The evaluation after `after` others has batches without end. Planning a run makes two."""

    def prepare(ready: Ready) -> None:
        from glasslm.inference import evaluation

        original, calls = evaluation.iterate_windows, [0]

        def windows(*arguments: Any) -> Any:
            calls[0] += 1
            yield from original(*arguments)
            if calls[0] > after:
                ready()
                while True:
                    time.sleep(0.01)
                    yield from original(*arguments)

        evaluation.iterate_windows = windows

    return prepare


def ignored_hangup(ready: Ready) -> None:
    """As nohup starts a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    patch("glasslm.report.run_report:write", wait_in_python)(ready)


def commands(folder: Path) -> dict[str, tuple[list[str], Callable[[Ready], None]]]:
    """Each kind of long work: its command, and the patch that makes it long."""
    base, text, out = str(folder / "base"), folder / "text.txt", folder / "out"
    bpe = TINY | {"tokenizer": "bpe", "vocab_size": 260}
    encode = slow_library("encode_batch_fast")
    gguf = ["export", base, "--to", "gguf", "--out", f"{out}.gguf"]
    ablation = ["ablate", "--axes", "norm", "--seeds", "2", "--out", str(folder / "study")]
    ablation += ["--max-steps", "100000", "--text-file", str(text), "--d-model", "16"]
    py, callbacks = wait_in_python, wait_in_callbacks
    exports = {"export": (gguf, patch("glasslm.files:_write_hashed", py))}
    return {
        **(exports if importlib.util.find_spec("gguf") else {}),
        "BPE training": (train_command(text, out, **bpe), slow_library("train_from_iterator")),
        "tokenization": (train_command(text, out, **bpe, val_fraction=0.2), encode),
        "last evaluation": (train_command(text, folder / "cut", **TINY), endless_evaluation(4)),
        "evaluate": (["evaluate", base, "--threads", "1"], endless_evaluation(0)),
        "callbacks": (["evaluate", base], patch("glasslm.cli.evaluate:load_model", callbacks)),
        "generate": (["generate", base, "--prompt", "a"],
                     patch("glasslm.inference.stream_batch:sample_tokens", py)),
        "compression": (["report", base], patch("lzma:compress", wait_in_library)),
        "report": (["report", base], patch("glasslm.report.run_report:write", py)),
        "import": (["import", base, "--run-dir", str(out)],
                   patch("glasslm.interop.model_import:import_model", py)),
        "merge": (["merge", base, "--run-dir", str(out)],
                  patch("glasslm.training.merging:merge_run", py)),
        "check": (["check"], patch("glasslm.lab.checks.gradient_check:check_ops", py)),
        "diagnose": (["diagnose", base], patch("glasslm.lab.diagnosis.diagnose:diagnose", py)),
        "compare": (["compare", base, base],
                    patch("glasslm.lab.verification.comparison:read_runs", py)),
        "verify": (["verify", base], patch("glasslm.lab.verification.integrity:examine_run", py)),
        "download": (["corpus", "get", "shakespeare"],
                     patch("glasslm.data.download:_read_into", wait_in_library)),
        "ablate": (ablation, patch("glasslm.lab.studies.trial_process:subprocess.Popen",
                                   lambda ready: ready())),
    }  # fmt: skip


def run_commands(folder: Path) -> dict[str, Any]:
    """Each command with Ctrl-C; one of them with the other signals; the files that are new then."""
    text = write_text(folder / "text.txt")
    load_commands()
    os.environ["GLASSLM_CACHE"] = str(folder / "cache")
    train(text, folder / "base", **TINY)
    results: dict[str, Any] = {}
    for name, (argv, prepare) in commands(folder).items():
        before = {path for path in folder.rglob("*") if "cache" not in path.parts}
        numbers = {"SIGINT": 130} if name != "report" else {"SIGINT": 130} | OTHERS
        for number in numbers:
            key = f"{name} {number}"
            results[key] = run_forked(argv, prepare, (getattr(signal, number),), folder)._asdict()
        new = {path for path in folder.rglob("*") if "cache" not in path.parts} - before
        results[key]["new"] = sorted(str(path.relative_to(folder)) for path in new)
    twice = (signal.SIGHUP, signal.SIGINT)
    results["nohup SIGINT"] = run_forked(
        ["report", str(folder / "base")], ignored_hangup, twice, folder
    )._asdict()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("tokenizers")
    return run_script(__file__, tmp_path_factory.mktemp("signals"))


def test_ctrl_c_ends_each_kind_of_work(results: dict[str, Any]) -> None:
    """Also library calls that do not return, and a signal that arrives in a callback."""
    for name, result in results.items():
        number = name.split()[-1]
        assert result["code"] == (OTHERS | {"SIGINT": 130})[number], (name, result)
        assert "Traceback" not in result["err"], (name, result)
        assert "interrupted" in result["err"] + result["out"] or number in result["err"], name


def test_an_interrupted_command_leaves_no_half_file(results: dict[str, Any]) -> None:
    new = {name: result["new"] for name, result in results.items() if "new" in result}
    assert any(file == "cut/checkpoints/000002" for file in new.pop("last evaluation SIGINT"))
    assert all(file.startswith("study") for file in new.pop("ablate SIGINT"))
    logs = ("out.", "err.")  # of the commands themselves
    assert {name: files for name, files in new.items()
            if any(not file.startswith(logs) for file in files)} == {}  # fmt: skip


if __name__ == "__main__":
    shorten_runs(pytest.MonkeyPatch())
    print(json.dumps(run_commands(Path(sys.argv[1]))))
