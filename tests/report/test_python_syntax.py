"""Python syntax of generated texts: valid code parses at any cut, and every fault is found."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.inference.proportions import Proportion
from glasslm.report import python_syntax

NATURAL = [inspect.getsource(module) for module in (textwrap, ast, json, inspect)]
VALID = '''import os


def first(path, size=3):
    """The first lines."""
    with open(path) as file:
        return [line for line in file][:size]


class Pair:
    left = {
        "a": [1, 2],
        "b": (3, 4),
    }

    def swap(self):
        if self.left and \\
           self.right:
            return self.right
        text = """
several
lines"""
        return text


for name in os.listdir("."):
    print(name, first(name))
'''


@given(st.sampled_from([VALID, *NATURAL]), st.data())
def test_valid_code_is_never_broken_wherever_it_is_cut(code: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, min(len(code), 900)))
    check = python_syntax.check_syntax(code[:cut])
    assert check.outcome != "broken", check
    assert not check.error
    complete_lines = [line for line in code[:cut].split("\n")[:-1] if line.strip()]
    assert check.lines <= len(complete_lines)


@pytest.mark.parametrize("code", [VALID, *NATURAL])
def test_what_parses_is_a_beginning_that_parses(code: str) -> None:
    """The reported number of lines parses by the parser itself."""
    for cut in range(0, min(len(code), 1200), 7):
        check = python_syntax.check_syntax(code[:cut])
        lines = code[:cut].split("\n")[:-1]
        ends = [i + 1 for i, line in enumerate(lines) if line.strip()][: check.lines]
        beginning = "\n".join(lines[: ends[-1] if ends else 0])
        assert bool(ast.parse(beginning).body) == (check.outcome == "parses")


@pytest.mark.parametrize(
    "wrong", ["    return ]\n", "x = = 3\n", "def f(x]:\n", "  x = (3\n}\n", "a b\n", "x = 'a\n"]
)
@pytest.mark.parametrize("after", ["", "y = 3\n", "class A:\n    def f(self):\n"])
def test_a_fault_is_found_whatever_comes_after_it(wrong: str, after: str) -> None:
    before = "x = 1\n\n\ndef g(y):\n    return y\n\n\n"
    check = python_syntax.check_syntax(before + wrong + after + "z")
    assert check.outcome == "broken"
    assert check.lines == 3
    assert check.error


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "x = 3",
        "# a remark\n\n# another\n",
        '"""a text\nwithout\nan end\n',
        "class A:\n",
        "f(\n1,\n2,\n",
        "@f\n",
    ],
)
def test_without_a_statement_there_is_nothing_that_parses(text: str) -> None:
    assert python_syntax.check_syntax(text).outcome == "unfinished"


@pytest.mark.parametrize(
    "text",
    ["(" * 3000, "-" * 3900 + "1", "a." * 1900 + "a", "x\0y", "\ud800 = 1", "9" * 3900, "[" * 99],
    ids=["brackets", "signs", "dots", "NUL", "surrogate", "number", "open"],
)  # fmt: skip
def test_hostile_texts_are_checked(text: str) -> None:
    assert python_syntax.check_syntax(f"y = 1\n{text}\nz = 1\n").lines in (1, 2, 3)


def test_dubious_code_is_no_error_and_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            python_syntax.check_syntax('x = "\\d"\nif x is 3:\n    pass\n1or x\n').outcome
            == "parses"
        )


def test_errors_are_counted_without_line_numbers() -> None:
    texts = ["x = 1\n" * n + "if x:\ny = 1\n" for n in range(5)] + ["x = (]\n"] * 2 + ["x = 1\n"]
    statistics = python_syntax.check_texts(texts)
    assert statistics.errors[0] == ("expected an indented block after 'if' statement", 5)
    assert statistics.errors[1][1] == 2
    assert statistics.proportion("broken") == Proportion(7, 8)
    assert statistics.lines == (0 + 1 + 2 + 3 + 4 + 0 + 0 + 1) / 8


def test_pieces_begin_after_a_separator() -> None:
    text = "".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(40))
    assert python_syntax.find_separator(text, 20) == "\n\n\n"
    assert python_syntax.find_separator(text.replace("\n\n\n", "\n\n"), 20) == "\n\n"
    assert python_syntax.find_separator(text.replace("\n\n\n", "\n"), 20) == "\n"
    assert python_syntax.find_separator(text.replace("\n", "\r\n"), 20) == "\r\n\r\n\r\n"
    pieces = python_syntax.cut_pieces(text, "\n\n\n", [9, 20], 10)
    assert [len(piece) for piece in pieces] == [9, 20] * 5
    assert all(piece.startswith("def f") for piece in pieces)
    numbers = [int(re.findall(r"\d+", piece)[0]) for piece in pieces]
    assert np.ptp(np.diff(numbers)) <= 1  # evenly spaced
    assert np.diff(numbers).min() >= 3
    assert (
        len(python_syntax.cut_pieces(text, "\n\n\n", [20], 100)) == 39
    )  # before the first there is no line break
    assert python_syntax.cut_pieces(text, "\n\n\n", [5000]) == []
    assert python_syntax.check_syntax(VALID.replace("\n", "\r\n")).outcome == "parses"
    assert python_syntax.check_syntax("x = 1\r\ny = 2 + \\\r\n").outcome == "parses"
