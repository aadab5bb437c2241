"""The notebooks under examples/ run from top to bottom in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.ipynb"))


def code_of(notebook: Path) -> str:
    """The code cells as a program in which the value of a cell's last line is displayed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_there_are_three_notebooks_without_outputs() -> None:
    assert len(EXAMPLES) == 3
    for path in EXAMPLES:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert cells[0]["cell_type"] == "markdown"
        assert all(not cell.get("outputs") for cell in cells)
        compile(code_of(path), str(path), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    program = tmp_path / "cells.py"
    program.write_text(code_of(path), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, program.name], cwd=tmp_path, capture_output=True, encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


TASKS = Path(__file__).parents[1] / "examples" / "tasks.py"


def run_python(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipes_of_tasks_are_listed() -> None:
    assert "induction,grokking,positions,carries" in "".join(
        run_python(str(TASKS), "--help").split()
    )


@pytest.mark.slow
def test_a_second_run_of_a_recipe_has_the_same_weights(tmp_path: Path) -> None:
    """The recipe with its models, texts and figure, but with 100 steps of its 700."""
    program = (
        f"import sys; sys.path.insert(0, {str(TASKS.parent)!r}); import tasks; train = tasks.train;"
        "tasks.train = lambda *names, **flags: train(*names, **flags | {'max_steps': 100});"
        "tasks.main()"
    )
    hashes = []
    for _ in range(2):
        output = run_python("-c", program, "carries", "--out", str(tmp_path))
        hashes.append(re.findall("weights of step 100: sha256 ([0-9a-f]+)", output))
        assert (tmp_path / "carries.png").stat().st_size > 0
    assert len(hashes[0]) == 2
    assert hashes[0] == hashes[1]
