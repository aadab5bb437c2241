"""A learner's file in its process: values and errors as if called here, limits, evidence."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from glasslm.course.isolation import wire
from glasslm.course.isolation.learner_process import HAS_FORK_SERVER, ForkServer, LearnerProcess
from glasslm.course.isolation.process_limits import Limits
from glasslm.course.isolation.remote_error import LearnerStopped
from glasslm.course.isolation.remote_function import RemoteFunction, load_function
from glasslm.course.learn import check_function
from glasslm.course.learn.exercises import load_exercise

FILE = "learner.py"


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer | None]:
    started = ForkServer() if HAS_FORK_SERVER else None
    yield started
    if started:
        started.close()


def load(process: LearnerProcess, source: str, name: str = "f") -> RemoteFunction:
    process.load(FILE, source)
    function = load_function(process, FILE, name)
    assert function is not None
    return function


def stop_sentence(server: ForkServer | None, source: str, limits: Limits) -> str:
    with LearnerProcess(server, limits) as process, pytest.raises(LearnerStopped) as stopped:
        load(process, source)(np.ones(2))
    return str(stopped.value)


SILU = """
import numpy as np

def silu(x, scale=1.0):
    s = 1 / (1 + np.exp(-x))
    def backward(dy):
        return dy * {dx}
    return x * s, backward
"""


@pytest.mark.parametrize("dx", ["(s + x * s * (1 - s))", "(s + s * (1 - s))", "s[0, 0, 0]"])
def test_the_verdict_is_that_of_the_function_in_this_process(
    server: ForkServer | None, dx: str
) -> None:
    source = SILU.format(dx=dx)
    namespace: dict[str, object] = {}
    exec(compile(source, FILE, "exec"), namespace)
    here = check_function(load_exercise("silu"), namespace["silu"], 3)  # type: ignore[arg-type]
    with LearnerProcess(server) as process:
        there = check_function(load_exercise("silu"), load(process, source, "silu"), 3)
        assert process.finish() == []
    assert there.to_json() == here.to_json()


def test_arrays_changed_in_place_change_here_too(server: ForkServer | None) -> None:
    source = """
def f(x, gain, eps=1e-5):
    gain += 1
    y = x * 2
    def backward(dy):
        x[...] = 7
        y[...] = 8
        dy *= 0
        return dy
    return y, backward
"""
    with LearnerProcess(server) as process:
        function = load(process, source)
        assert str(inspect.signature(function)) == "(x, gain, eps=1e-05)"
        x, gain, dy = np.ones(3), np.ones(2, np.float32), np.ones(3)
        y, backward = function(x, gain=gain)
        assert y.tolist() == [2, 2, 2]
        assert gain.tolist() == [2, 2]
        assert gain.dtype == np.float32
        assert backward(dy).tolist() == [0, 0, 0]
        assert (x.tolist(), y.tolist(), dy.tolist()) == ([7] * 3, [8] * 3, [0] * 3)


def test_an_error_has_its_class_its_message_and_the_learners_line(
    server: ForkServer | None,
) -> None:
    source = "class Odd(KeyError):\n    pass\n\ndef f(x):\n    raise Odd('no such')\n"
    with LearnerProcess(server) as process:
        with pytest.raises(KeyError) as raised:
            load(process, source)(1)
        assert type(raised.value).__name__ == "Odd"
        last = traceback.extract_tb(raised.value.__traceback__)[-1]
        assert (last.filename, last.lineno) == (FILE, 5)
        with pytest.raises(SyntaxError):
            process.load(FILE, "def f(:\n")


def test_objects_stay_there_and_their_methods_work(server: ForkServer | None) -> None:
    source = """
class f:
    def __init__(self, start):
        self.values = [start]
    def add(self, value):
        self.values.append(value)
        return {"sum": sum(self.values), "all": tuple(self.values)}
"""
    with LearnerProcess(server) as process:
        counter = load(process, source)(np.float32(1.5))
        assert counter.add(2) == {"sum": 3.5, "all": (1.5, 2)}
        assert counter.values == [1.5, 2]


def test_values_survive_the_way_there_and_back() -> None:
    values = [
        None, True, 3, 2.5, float("inf"), "ü", b"\0\1", (1, [2, {"a": {3}}]), np.float16(1.5),
        np.zeros((0, 3)), np.arange(6).reshape(2, 3).T, np.array(1j), np.array([True]),
    ]  # fmt: skip
    arrays: list[bytes] = []
    values.append(np.array([1.5, "x", None], dtype=object))
    code = wire.encode(values, arrays, pytest.fail)
    back = wire.decode(code, arrays, pytest.fail)
    assert not arrays
    for value, other in zip(values, back, strict=True):
        assert type(other) is type(value)
        if isinstance(value, (np.ndarray, np.generic)):
            np.testing.assert_array_equal(other, value)
        else:
            assert other == value
        assert getattr(value, "dtype", None) == getattr(other, "dtype", None)


@pytest.mark.parametrize(
    "code",
    [
        {"array": "<f8", "shape": [9]},
        {"array": "|O", "shape": [1]},
        {"scalar": "<f4"},
        {},
        {"a": 1},
    ],
)
def test_a_forged_value_is_refused(code: dict[str, object]) -> None:
    def refuse(value: object) -> None:
        raise ValueError

    with pytest.raises(wire.WireError):
        wire.decode(code, [b"12345678"], refuse)


LIMITS = Limits(cpu_s=1, wall_s=60.0, memory_bytes=1 << 30)


def test_an_endless_loop_is_stopped_with_its_line(server: ForkServer | None) -> None:
    if sys.platform == "win32":
        pytest.skip("needs resource limits")
    sentence = stop_sentence(server, "def f(x):\n    while True:\n        pass\n", LIMITS)
    assert sentence.startswith("line ")
    assert "1 s of CPU time" in sentence


def test_a_loop_that_catches_everything_is_killed(server: ForkServer | None) -> None:
    loop = """
def f(x):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""
    assert "no end within" in stop_sentence(server, loop, LIMITS)


def test_sleep_is_stopped(server: ForkServer | None) -> None:
    limits = Limits(cpu_s=1, wall_s=1.0)
    sleep = "import time\ndef f(x):\n    time.sleep(60)\n"
    assert stop_sentence(server, sleep, limits) == "no end within 1 s"


def test_an_exit_or_a_crash_is_named(server: ForkServer | None) -> None:
    assert "exit" in stop_sentence(server, "import os\ndef f(x):\n    os._exit(0)\n", LIMITS)


@pytest.mark.parametrize(
    "result",
    ["[object() for _ in range(30000)]", "10**5000", "nested(1000)", "np.ones(1 << 26)"],
)
def test_results_that_cannot_be_sent_are_errors(server: ForkServer | None, result: str) -> None:
    source = f"""
import numpy as np
def nested(depth):
    return [nested(depth - 1)] if depth > 970 else []
def f(x):
    return {result}
"""
    with LearnerProcess(server) as process:
        function = load(process, source)
        with pytest.raises((ValueError, MemoryError)):
            function(1)
        assert process.flags == []


def test_memory_is_limited(server: ForkServer | None) -> None:
    if sys.platform != "linux":
        pytest.skip("needs resource limits")
    # Pages that nobody touches: to fill them may take a slow machine more than its second.
    source = "def f(x):\n    return [bytes(1 << 27) for _ in range(64)]\n"
    with LearnerProcess(server, LIMITS) as process, pytest.raises(MemoryError):
        load(process, source)(1)


SYSTEM_CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def f(kind, path):
    if kind == "fork":
        return libc.fork()
    if kind == "socket":
        return libc.socket(2, 1, 0)
    if kind == "write":
        return libc.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    if kind == "unlink":
        return libc.unlink(path)
    return libc.execl(b"/bin/true", b"true", None)
"""


def test_the_kernel_refuses_what_gets_past_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the audit hook, which refuses ctypes: the filter of system calls alone."""
    if sys.platform != "linux":
        pytest.skip("needs resource limits")
    from glasslm.course.isolation import learner_process

    command = learner_process._command("single")
    without_hook = (
        "import glasslm.course.isolation.audit_hook as h; h.watch = lambda *a: None; from"
    )
    command[-1] = command[-1].replace("from", without_hook)
    monkeypatch.setattr(learner_process, "_command", lambda kind: command)
    kept = tmp_path / "kept.txt"
    kept.write_text("content")
    with LearnerProcess() as process:
        assert process.limits_kept["network"]
        function = load(process, SYSTEM_CALLS)
        for kind in ("fork", "socket", "write", "unlink", "exec"):
            assert function(kind, str(kept).encode()) == -1, kind
    assert kept.read_text() == "content"


def test_the_process_has_no_environment_and_no_reference(
    server: ForkServer | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASS_SECRET", "seed")
    source = """
import os, sys
def f(x):
    names = [name for name in sys.modules if name.startswith("glasslm")]
    return os.environ.get("CLASS_SECRET"), names
"""
    with LearnerProcess(server) as process:
        assert load(process, source)(1) == (None, [])


def test_a_function_that_is_an_argument_is_called_here(server: ForkServer | None) -> None:
    source = """
def f(x, g):
    y, backward = g(x)
    return y + x, lambda dy: dy + backward(dy)
"""

    def double(x: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        return 2 * x, lambda dy: 2 * dy

    with LearnerProcess(server) as process:
        function = load(process, source)
        y, backward = function(np.ones(2), double)
        assert (y.tolist(), backward(np.ones(2)).tolist()) == ([3, 3], [3, 3])
        with pytest.raises(ValueError, match="TypeError"):
            function("text", lambda x: x + 1)
