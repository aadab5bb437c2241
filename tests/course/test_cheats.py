"""Attempts to get marks without computing: each is flagged. Honest code is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted_faults import Solution, list_exercises, read_solutions

from glasslm.course.grading.marking import Job, Record, mark
from glasslm.course.grading.near_copies import find_near_copies, fingerprint
from glasslm.course.grading.source_flags import find_source_flags
from glasslm.course.isolation.learner_process import HAS_FORK_SERVER, ForkServer

HERE = Path(__file__).parent
CHEATS = sorted((HERE / "cheats").glob("*.py"))
# Attempts whose names and texts show nothing: only what happens while they run.
HIDDEN_FROM_THE_TEXT = ("exec_by_builtins", "list_folder", "patch_by_dict", "always_equal")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer | None]:
    started = ForkServer() if HAS_FORK_SERVER else None
    yield started
    if started:
        started.close()


def mark_source(server: ForkServer | None, source: str, exercise: str = "silu") -> Record:
    job: Job = {
        "student": "ada",
        "exercise": exercise,
        "origin": "ada/silu.py",
        "source": source,
        "problem": "",
        "seed": 5,
        "cpu_s": 10,
    }
    return mark(job, server)


def test_there_are_many_attempts() -> None:
    assert len(CHEATS) >= 20


@pytest.mark.parametrize("path", CHEATS, ids=lambda path: path.stem)
def test_an_attempt_is_flagged_and_gets_nothing(server: ForkServer | None, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    kind = source.splitlines()[0].removeprefix("# kind: ")
    record = mark_source(server, source)
    evidence = [flag for flag in record["flags"] if flag["kind"] == kind]
    assert evidence, record["flags"]
    assert all(flag["detail"] for flag in evidence)
    assert record["verdict"] != "right"
    for flag in evidence:
        if flag["line"]:
            assert flag["text"] == source.splitlines()[flag["line"] - 1].strip()


@pytest.mark.parametrize("name", HIDDEN_FROM_THE_TEXT)
def test_some_attempts_are_seen_only_while_they_run(name: str) -> None:
    source = (HERE / "cheats" / f"{name}.py").read_text(encoding="utf-8")
    kind = source.splitlines()[0].removeprefix("# kind: ")
    assert kind not in {flag.kind for flag in find_source_flags(source)}


LOOPS_UNLESS_COUNTED = """
import math
import sys

import numpy as np


def silu(x):
    if CONDITION:
        return x, lambda dy: dy
    y, derivative = np.zeros_like(x), np.zeros_like(x)
    for i, v in np.ndenumerate(x):
        s = 0.5 * (1 + math.tanh(float(v) / 2))
        y[i], derivative[i] = v * s, s + v * s * (1 - s)
    return y, lambda dy: dy * derivative
"""


@pytest.mark.parametrize(
    ("condition", "details"),
    [
        ("False", []),
        ("sys.gettrace()", ["sys.gettrace", "y is wrong while instructions are counted"]),
        ("x.size > 150", ["y is right for small inputs, wrong with N = 15, D = 21"]),
    ],
)
def test_loops_that_hide_from_the_count_get_no_point_for_speed(
    server: ForkServer | None, condition: str, details: list[str]
) -> None:
    record = mark_source(server, LOOPS_UNLESS_COUNTED.replace("CONDITION", condition))
    assert record["verdict"] == "right", record["sentence"]
    assert {part["name"]: part["points"] for part in record["parts"]}["speed"] == 0
    assert sorted(flag["detail"] for flag in record["flags"]) == details


EXACT_GELU = """
import math

import numpy as np


def gelu(x):
    p = 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))

    def backward(dy):
        return (dy * (p + x * np.exp(-x * x / 2) / (2 * np.pi) ** 0.5)).astype(np.CAST)

    return (x * p).astype(np.CAST), backward
"""


@pytest.mark.parametrize("cast", ["float32", "float16"])
def test_a_cast_hides_no_mistake(server: ForkServer | None, cast: str) -> None:
    record = mark_source(server, EXACT_GELU.replace("CAST", cast), "gelu")
    assert (record["forward"], record["backward"]) == ("wrong", "wrong")


def test_results_in_float32_are_right_up_to_its_rounding(server: ForkServer | None) -> None:
    source = next(s.source for s in read_solutions("gelu") if s.name == "base 1")
    source = source.replace("return 0.5 * x * (1 + t)", "return (0.5 * x * (1 + t)).astype('f4')")
    record = mark_source(server, source, "gelu")
    assert (record["forward"], record["backward"], record["verdict"]) == ("right", "right", "dtype")


INNOCENT = '''
"""SiLU without torch: no `import torch`, no open("file"), no sys._getframe()."""
# import torch; exec("import glasslm"); np.allclose = None
import doctest
import functools
import logging
import math
import time
import traceback
import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Saved = namedtuple("Saved", "x s")
torch = "the name of a library, e.g. torch or os.environ"


class Pair(NamedTuple):
    x: float
    s: float


@dataclass
class Cache:
    saved: Saved


@functools.lru_cache(None)
def scale(n):
    return math.sqrt(n)


def silu(x):
    """Return x s. (torch.nn.functional.silu)"""
    rng = np.random.default_rng(0)
    rng.normal(size=3)
    warnings.warn("a warning with open('file')", stacklevel=1)
    print("shape", x.shape, "gc.get_objects()")
    try:
        np.ones(2) @ np.ones(3)
    except ValueError as error:
        traceback.print_exc()
        logging.getLogger(__name__).warning("%s: subprocess, ctypes", error)
    assert time.perf_counter() > 0
    cache = Cache(Saved(x, 0.5 * (1 + np.tanh(x / 2))))

    def backward(dy):
        s = cache.saved.s
        return dy * (s + cache.saved.x * s * (1 - s))

    return cache.saved.x * cache.saved.s, backward
'''


def test_a_name_that_is_imported_is_evidence_like_an_attribute() -> None:
    assert [f.kind for f in find_source_flags("from sys import gettrace")] == ["checker"]


def test_names_in_comments_and_texts_are_no_evidence(server: ForkServer | None) -> None:
    record = mark_source(server, INNOCENT)
    assert record["verdict"] == "right", record["sentence"]
    assert record["flags"] == []


RIGHT = [
    solution
    for exercise in list_exercises()
    for solution in read_solutions(exercise)
    if solution.verdict == "right"
]


def test_the_texts_of_right_solutions_show_nothing() -> None:
    assert len(RIGHT) >= 40
    for solution in RIGHT:
        assert find_source_flags(solution.source) == [], solution.label


def check_no_flags(server: ForkServer | None, solutions: list[Solution]) -> None:
    for solution in solutions:
        record = mark_source(server, solution.source, solution.exercise)
        assert (record["verdict"], record["flags"]) == ("right", []), solution.label


def test_a_right_solution_of_each_exercise_gets_no_flag(server: ForkServer | None) -> None:
    check_no_flags(server, list({solution.exercise: solution for solution in RIGHT}.values()))


@pytest.mark.slow
def test_all_right_solutions_get_no_flag(server: ForkServer | None) -> None:
    check_no_flags(server, RIGHT)


ATTENTION = """
import numpy as np

def attention(q, k, v):
    '''Causal attention.'''
    B, T, H, Q = q.shape
    group = H // k.shape[2]
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum('bthq,bshq->bhts', q, keys) * (1 / float(Q) ** 0.5)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    y = np.einsum('bhts,bshq->bthq', p, values)

    def backward(dy):
        dvalues = np.einsum('bhts,bthq->bshq', p, dy)
        dp = np.einsum('bthq,bshq->bhts', dy, values)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * (1 / float(Q) ** 0.5)
        dq = np.einsum('bhts,bshq->bthq', ds, keys)
        dkeys = np.einsum('bhts,bthq->bshq', ds, q)
        split = (B, T, H // group, group, Q)
        return dq, dkeys.reshape(split).sum(3), dvalues.reshape(split).sum(3)

    return y, backward
"""
RENAMED = {"scores": "logits", "keys": "kk", "values": "vv", "group": "g", "p": "weights"}


def rename(source: str) -> str:
    """Other names, another order of two statements and of a product, other comments."""
    for name, other in RENAMED.items():
        source = re.sub(rf"\b(d?){name}\b", rf"\1{other}", source)
    first, second = source.split("    def backward(dy):\n")[1].splitlines(True)[:2]
    changed = source.replace(first + second, second + "\n        # my own idea\n" + first)
    assert changed != source
    return changed.replace("Causal attention.", "My own work.").replace(
        "weights * dp", "dp * weights"
    )


def test_a_copy_with_other_names_is_near_and_an_own_solution_is_not() -> None:
    own = (HERE / "attention_by_loops.txt").read_text(encoding="utf-8")
    found = find_near_copies(
        "attention",
        {
            "ada": fingerprint(ATTENTION),
            "bob": fingerprint(rename(ATTENTION)),
            "cleo": fingerprint(own),
        },
    )
    assert [(pair.student, pair.other) for pair in found] == [("ada", "bob")]
    assert found[0].similarity > 0.8


RMS_NORM = """
import numpy as np

def rms_norm(x, gain, eps=1e-5):
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    unit = x * rstd

    def backward(dy):
        du = dy * gain
        dx = rstd * (du - unit * (du * unit).mean(-1, keepdims=True))
        return dx, (dy * unit).sum(0)

    return gain * unit, backward
"""


def test_a_short_solution_is_a_near_copy_only_if_few_students_have_it() -> None:
    copy = RMS_NORM.replace("rstd", "r").replace("unit", "u").replace("dy * gain", "gain * dy")
    few = {"ada": fingerprint(RMS_NORM), "bob": fingerprint(copy)}
    assert len(find_near_copies("rms_norm", few)) == 1
    many = few | {name: fingerprint(RMS_NORM) for name in ("cleo", "dan", "eve")}
    assert find_near_copies("rms_norm", many) == []
    changed = RMS_NORM.replace("(du * unit).mean(-1, keepdims=True)", "np.mean(du * unit, -1)")
    assert find_near_copies("rms_norm", few | {"bob": fingerprint(changed)}) == []


def test_very_short_solutions_are_never_near_copies() -> None:
    relu = (
        "import numpy as np\ndef relu(x):\n    return np.maximum(x, 0), lambda dy: dy * (x > 0)\n"
    )
    assert find_near_copies("relu", {"ada": fingerprint(relu), "bob": fingerprint(relu)}) == []


def test_a_module_from_another_folder_is_flagged(server: ForkServer | None, tmp_path: Path) -> None:
    (tmp_path / "my_answers.py").write_text("def silu(x):\n    return x, None\n")
    source = f"import sys\nsys.path.append({str(tmp_path)!r})\nfrom my_answers import silu\n"
    record = mark_source(server, source)
    assert {(flag["kind"], flag["line"]) for flag in record["flags"]} == {("file", 3)}
    assert "my_answers" in record["flags"][0]["detail"]


def test_common_imports_are_no_evidence(server: ForkServer | None) -> None:
    lines = ["from __future__ import annotations", "import matplotlib.pyplot as plt", INNOCENT]
    record = mark_source(server, "\n".join(lines))
    assert (record["verdict"], record["flags"]) == ("right", []), record["sentence"]
