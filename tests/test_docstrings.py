"""The examples in docstrings run and print what they say."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import glasslm

ROOT = Path(glasslm.__file__).parent

# Objects whose examples read or make a run, or depend on the clock: their examples are only parsed.
NOT_RUN = {
    "glasslm.load",
    "glasslm.train",
    "glasslm.inference.trained_model.Model",
    "glasslm.inference.trained_model.Model.activations",
    "glasslm.inference.trained_model.Model.attention",
    "glasslm.inference.trained_model.Model.evaluate",
    "glasslm.inference.trained_model.Model.generate",
    "glasslm.inference.trained_model.Model.generate_ids",
    "glasslm.inference.trained_model.Model.gradients",
    "glasslm.inference.trained_model.Model.inspect",
    "glasslm.inference.trained_model.Model.logits",
    "glasslm.inference.trained_model.Model.losses",
    "glasslm.inference.trained_model.Model.stream",
    "glasslm.ops.array_file.load_checkpoint",
    "glasslm.ops.array_file.save_checkpoint",
    "glasslm.runs.history.History",
    "glasslm.runs.metrics.MetricsLog",
    "glasslm.runs.run_folder.Run",
    "glasslm.runs.run_folder.default_name",
}


def list_modules() -> list[str]:
    """The modules with examples in their text."""
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>>" in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def find_examples(module: str) -> dict[str, doctest.DocTest]:
    """The docstrings of a module that have examples, by the name of their object."""
    docstrings = doctest.DocTestFinder().find(importlib.import_module(module))
    return {docstring.name: docstring for docstring in docstrings if docstring.examples}


@pytest.mark.parametrize("module", list_modules())
def test_examples_print_what_they_say(module: str) -> None:
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    output: list[str] = []
    examples = find_examples(module)
    assert examples, "its examples are in no docstring"
    for name, docstring in examples.items():
        if name in NOT_RUN:
            for example in docstring.examples:
                ast.parse(example.source)
        else:
            runner.run(docstring, out=output.append)
    assert not output, "".join(output)


def test_every_example_that_is_not_run_exists() -> None:
    assert {name for module in list_modules() for name in find_examples(module)} >= NOT_RUN
