"""The order of the packages, and what may be imported where."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import glasslm

ROOT = Path(glasslm.__file__).parent

# Imports go one way: a package imports only from packages before it.
PACKAGES = [
    "errors", "strict_json", "files", "text", "config", "data", "model", "engines", "runs",
    "inference", "training", "ops",
    "report", "interop", "lab", "course", "serve", "cli", "__main__", "__init__", "py.typed",
]  # fmt: skip

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# Slow imports, each made inside the function that needs it: `glasslm --help` is instant.
SLOW_LIBRARIES = {
    "datasets",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "pyarrow",
    "ray",
    "requests",
    "scipy",
    "tensorboard",
    "tiktoken",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
}

# These modules of `engines` do not depend on which engine runs; everybody may import them.
SHARED_BY_ENGINES = {
    "engines.choice",
    "engines.lazy_arrays",
    "engines.factory",
    "engines.inspection",
    "engines.learner_file",
    "engines.memory_estimate",
    "engines.operations",
    "engines.positions",
    "engines.protocol",
    "engines.resources",
    "engines.state",
}
# The checks that compare hand-written gradients with autograd, and torchrun's entry, know one
# engine. So does the package ops, which offers the functions of the NumPy engine.
KNOW_AN_ENGINE = {
    "lab.checks.attention_paths",
    "lab.checks.gradient_check",
    "lab.checks.op_cases",
    "lab.checks.parity",
    "cli",
}


def list_modules() -> dict[str, Path]:
    """Every module of glasslm by its dotted name without `glasslm.`; a package by its own name."""
    modules = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        modules[name] = path
    return modules


MODULES = list_modules()


def list_imports(name: str) -> set[str]:
    """The modules of glasslm that a module imports, function bodies and TYPE_CHECKING included."""
    imports = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names if alias.name.split(".")[0] == "glasslm"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are absolute here"
            if node.module and node.module.split(".")[0] == "glasslm":
                children = {f"{node.module}.{alias.name}" for alias in node.names}
                modules = {child for child in children if child.removeprefix("glasslm.") in MODULES}
                imports |= modules | ({node.module} if children - modules else set())
    return {
        "__init__" if module == "glasslm" else module.removeprefix("glasslm.") for module in imports
    }


def test_the_source_folder_holds_these_packages_and_nothing_else() -> None:
    assert {path.stem if path.suffix == ".py" else path.name for path in ROOT.iterdir()} - {
        "__pycache__"
    } == set(PACKAGES)
    assert len(PACKAGES) <= 21  # with ops and strict_json: docs/architecture.md


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name: str) -> None:
    position = PACKAGES.index(name.split(".")[0])
    for module in list_imports(name):
        assert PACKAGES.index(module.split(".")[0]) <= position, f"{name} imports {module}"


def test_no_import_cycles() -> None:
    try:
        TopologicalSorter({name: list_imports(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_every_package_says_what_it_is_for() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
                f"{name} has no docstring"
            )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_engines_know_which_engine_runs(name: str) -> None:
    if not name.startswith(("engines", "ops")) and name not in KNOW_AN_ENGINE:
        assert {
            module for module in list_imports(name) if module.startswith("engines.")
        } <= SHARED_BY_ENGINES


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_are_short(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    if name.startswith("course.learn.exercises."):  # their solutions hold all of one operation
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert count_lines(node) <= MAX_FUNCTION_LINES, f"{name}.{node.name}"


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without its docstring and decorators."""
    assert function.end_lineno is not None
    first = function.body[0]
    docstring = 0
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        docstring = first.end_lineno - first.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


def library_imports(nodes: list[ast.stmt] | list[ast.AST]) -> set[str]:
    """The top-level names of what these statements import."""
    libraries = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            libraries |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            libraries.add((node.module or "").split(".")[0])
    return libraries


@pytest.mark.parametrize("name", sorted(MODULES))
def test_slow_libraries_are_imported_inside_functions(name: str) -> None:
    allowed = {"torch"} if name.startswith("engines.torch.") else set()
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert library_imports(tree.body) & SLOW_LIBRARIES <= allowed


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_pickle_and_torch_only_in_its_engine(name: str) -> None:
    # interop reads its own exports again with the libraries that they are written for
    allowed = {"torch"} if name.startswith(("engines.torch.", "interop.")) else set()
    nodes = list(ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))))
    assert not library_imports(nodes) & ({"pickle", "marshal", "shelve", "torch"} - allowed)


def test_test_files_have_different_names() -> None:
    """pytest imports them by their name alone: of two with one name, the second is an error."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py")]
    assert sorted(set(names)) == sorted(names)
