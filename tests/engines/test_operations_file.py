"""A file with somebody's own operations is read once, in one line of error, and never changed."""

import subprocess
import sys
from pathlib import Path

import pytest

from glasslm.engines.learner_file import read_learner_file
from glasslm.engines.operations import SIGNATURES, read_operations
from glasslm.errors import InputError

SILU = "def silu(x):\n    return x, lambda dy: dy\n"

# What is wrong -> the text of the file and words of the message.
BAD_FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "syntax": ("x = 1\ndef silu(x)\n    return x\n", ["line 2", "expected ':'"]),
    "indentation": ("def silu(x):\nreturn x\n", ["line 2", "indented block"]),
    "missing import": ("import math\nimport not_there\n", ["line 2", "no module 'not_there'"]),
    "relative import": ("from . import helpers\n", ["line 1", "ImportError"]),
    "latin-1": ("x = 1\n# café\n".encode("latin-1"), ["line 2", "not UTF-8 (byte 11)"]),
    "NUL": ("x = 1\0\n", ["null bytes"]),
    "exception": ("def f():\n    1 / 0\n\nf()\n", ["line 2", "ZeroDivisionError"]),
    "many lines": ("raise ValueError('a\\nb\\x1b[31m')\n", ["line 1", "ValueError: a / b"]),
    "exit": ("import sys\nsys.exit(0)\n", ["line 2", "ends the program"]),
    "base exception": ("class E(BaseException): pass\n\nraise E\n", ["line 3", "E"]),
    "recursion": ("def f(): f()\nf()\n", ["line 1", "RecursionError"]),
    "nested": ("(" * 3000 + ")" * 3000, ["parenthes"]),
    "empty": ("", ["defines no operation", "rms_norm"]),
    "only helpers": ("def _silu(x): return x\n", ["defines no operation"]),
    "imported": ("from glasslm.ops import silu, rms_norm\n", ["defines no operation"]),
    "no function": ("silu = 3\n", ["defines no operation"]),
    "misspelt": ("x = 1\ndef rms_nrom(x): pass\n", ["line 2", "'rms_nrom'", "'rms_norm'"]),
    "misspelt beside a right one": (SILU + "def rmsnorm(x): pass\n", ["line 3", "'rms_norm'"]),
    "no gain": ("def rms_norm(x): pass\n", ["line 1", "rms_norm(x, gain, eps)"]),
    "no eps": ("def rms_norm(x, gain): pass\n", ["line 1", "eps"]),
    "one more": ("def silu(x, y): pass\n", ["line 1", "silu(x)", "'y'"]),
    "optimizer": ("def adamw(p, g, m): pass\n", ["line 1", "adamw(p, g, m, v, *, t, lr"]),
}  # fmt: skip


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "own.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_is_explained_in_one_line(fault: str, tmp_path: Path) -> None:
    text, words = BAD_FILES[fault]
    path = write(tmp_path, text)
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        read_operations(path)
    message = str(caught.value)
    assert str(path) in message
    assert not {"\n", "\x1b"} & {*message}
    assert len(message) < 500
    for word in words:
        assert word in message
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["missing", "folder", "large"])
def test_a_path_that_is_no_small_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    if kind == "folder":
        path.mkdir()
    if kind == "large":
        path.write_bytes(b"#" * 2_000_000)
    with pytest.raises(InputError, match=r"own\.py"):
        read_operations(path)


def test_functions_of_the_file_are_found_and_others_are_not(tmp_path: Path) -> None:
    text = (
        "import functools\nimport numpy as np\nfrom glasslm.ops import gelu\n"
        "from dataclasses import dataclass\n\n"
        "@dataclass\nclass Pair:\n    a: int\n\n"
        "def _helper(x): return x\n"
        "def sigmoid(x): return 1 / (1 + np.exp(-x))\n"
        "@functools.lru_cache\ndef softmax(x): pass\n"
        "silu = lambda x: (x, None)\n"
        "relu = functools.partial(_helper)\n"
        "if __name__ == '__main__':\n    raise SystemExit\n"
    )
    operations = read_operations(write(tmp_path, text))
    assert set(operations.functions) == {"softmax", "silu", "relu"}
    assert operations.file.text == text
    assert not operations.uses_torch
    assert operations.file.first_line(operations.functions["silu"]) == 14
    assert set(operations.file.functions) > {"_helper", "sigmoid"}
    assert "gelu" not in operations.file.functions


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    assert read_operations(write(tmp_path, b"\xef\xbb\xbf" + SILU.encode())).functions


def test_the_line_of_an_error_is_that_of_the_file(tmp_path: Path) -> None:
    text = (
        "import json\n\ndef silu(x):\n    return _parse(x)\n\ndef _parse(x):\n    json.loads('{')\n"
    )
    file = read_learner_file(write(tmp_path, text))
    with pytest.raises(ValueError, match="Expecting") as caught:
        file.functions["silu"](0)
    assert file.find_line(caught.value) == 7  # json's own lines do not count


def test_a_file_stands_alone_and_leaves_standard_output_alone(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("x = 1\n")
    code = (
        "from glasslm.engines.operations import read_operations\n"
        "from glasslm.errors import InputError\n"
        "try:\n    read_operations('own.py')\n"
        "except InputError as error:\n    print('refused', error)\n"
    )
    for text, output in (("print('hello')\n" + SILU, ""), ("import beside\n", "refused own.py")):
        write(tmp_path, text)
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert result.stdout[: len("refused own.py")] == output
        assert "hello" in result.stderr or "hello" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside.py", "own.py"]


def test_the_signatures_are_those_of_the_engine() -> None:
    from glasslm.engines.numpy import attention, ops, optimizer

    for name in SIGNATURES:
        assert name == "softmax" or any(
            hasattr(module, name) for module in (ops, attention, optimizer)
        )
