"""The documents say what the code does: quoted lines are in the source, examples run, tables are measured."""

import contextlib
import importlib.util
import inspect
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest

import glasslm
from glasslm.cli.train import parse
from glasslm.config import presets
from glasslm.engines import positions
from glasslm.engines.dropout import row_keys
from glasslm.engines.numpy import attention, engine, flash, moe, ops, optimizer
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import initial_weights, parameter_table

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = Path(glasslm.__file__).parent
BACKWARD = (DOCS / "backward.md").read_text(encoding="utf-8")
FIRST_PRINCIPLES = (DOCS / "first-principles.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```python *(?:source=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# -- what is quoted ---------------------------------------------------------------------------------------------------

QUOTES = [(path, code) for path, code in FENCE.findall(BACKWARD) if path]


@pytest.mark.parametrize(
    ("path", "code"), QUOTES, ids=[code.splitlines()[0][:40] for _, code in QUOTES]
)
def test_quoted_lines_are_in_the_source(path: str, code: str) -> None:
    quoted = code.splitlines()
    source = (SOURCE / path).read_text(encoding="utf-8").splitlines()
    places = (source[start : start + len(quoted)] for start in range(len(source) - len(quoted) + 1))
    assert any(textwrap.dedent("\n".join(place)).splitlines() == quoted for place in places)


PARTS = (ops, attention, flash, moe)


def differentiable(module: ModuleType) -> set[str]:
    """The public functions that return an output and its backward function."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return {
        name
        for name, function in functions
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and "Callable" in str(inspect.get_annotations(function).get("return"))
    }


def test_every_op_and_optimizer_has_a_section_and_every_section_its_code() -> None:
    sections = set(re.findall(r"^### `([\w.]+)`$", BACKWARD, re.MULTILINE))
    updates = {
        name
        for name, _ in inspect.getmembers(optimizer, inspect.isfunction)
        if not name.startswith("_")
    }
    wanted = set.union(updates, *map(differentiable, PARTS))
    assert {"linear", "attention", "adamw"} <= wanted
    assert sections >= wanted
    for section in sections:
        names = section.split(".")
        owner = next(
            module for module in (*PARTS, positions, optimizer, engine) if hasattr(module, names[0])
        )
        for name in names:
            owner = getattr(owner, name)
        assert callable(owner)


def test_names_in_the_text_are_names_in_the_code() -> None:
    known = set(
        re.findall(
            r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
        )
    )
    prose = re.sub(r"^```.*?^```$", "", BACKWARD, flags=re.MULTILINE | re.DOTALL)
    spans = set(re.findall(r"`([A-Za-z_][\w.]*)`", prose)) - {"dy", "y"}  # the page's own letters
    unknown = {span for span in spans for word in span.split(".") if word not in known}
    assert len(spans) > 60
    assert not unknown


# -- what is kept, and what it costs ----------------------------------------------------------------------------------

MODEL, V, B = presets.tiny().model.resolved(), 65, 2
D, F, T, H, K, Q = (
    MODEL.d_model,
    MODEL.d_ff,
    MODEL.block_size,
    MODEL.n_heads,
    MODEL.n_kv_heads,
    MODEL.head_size,
)
N = B * T
SHARED = {
    "w",
    "a",
    "b",
    "table",
    "gain",
    "cos",
    "sin",
    "self",
}  # weights and tables, which no token adds to


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def new(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


def keys() -> np.ndarray:
    return row_keys(0, 0, np.arange(B), 1)


def attend(drop: Any) -> tuple[Any, Any]:
    heads = numbers(B, T, H + 2 * K, Q)
    return attention.attention(heads[:, :, : H + K], heads[:, :, H + K :], None, drop, new)


def attend_by_tiles() -> tuple[Any, Any]:
    heads = numbers(B, T, H + 2 * K, Q)
    return flash.flash_attention(heads[:, :, : H + K], heads[:, :, H + K :], None, 0, new)


def linear(inputs: int, outputs: int) -> Callable[[], tuple[Any, Any]]:
    return lambda: ops.linear(numbers(N, inputs), numbers(outputs, inputs), new)


CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "embedding": lambda: ops.embedding(np.arange(N) % V, numbers(V, D), new),
    "frozen_linear, q, k and v": lambda: ops.frozen_linear(
        numbers(N, D), numbers((H + 2 * K) * Q, D), new
    ),
    "adapter, q, rank 8": lambda: ops.adapter(
        numbers(N, D), numbers(8, D), numbers(H * Q, 8), 1.0, new
    ),
    "rms_norm": lambda: ops.rms_norm(numbers(N, D), numbers(D), new),
    "layer_norm": lambda: ops.layer_norm(numbers(N, D), numbers(D), numbers(D), new),
    "linear, q, k and v": linear(D, (H + 2 * K) * Q),
    "rope": lambda: attention.rope(
        numbers(B, T, H + K, Q), *positions.rope_tables(T, H + K, Q, np.float32), new
    ),
    "attention": lambda: attend(None),
    "attention with dropout": lambda: attend((0.1, keys())),
    "flash_attention": attend_by_tiles,
    "linear, o": linear(H * Q, D),
    "linear, gate and up": linear(D, 2 * F),
    "gate with silu": lambda: ops.gate(numbers(N, 2 * F), ops.silu, new),
    "silu": lambda: ops.silu(numbers(N, F), new),
    "gelu": lambda: ops.gelu(numbers(N, F), new),
    "relu": lambda: ops.relu(numbers(N, F), new),
    "relu2": lambda: ops.relu2(numbers(N, F), new),
    "linear, down": linear(F, D),
    "dropout": lambda: ops.dropout(numbers(N, D), 0.1, keys(), new),
    "linear, head": linear(D, V),
    "cross_entropy": lambda: ops.cross_entropy(numbers(N, V), np.arange(N) % V, new),
    "smoothing": lambda: ops.smoothing(numbers(N, V), np.arange(N) % V, new),
    "z_loss": lambda: ops.z_loss(numbers(N, V), np.arange(N) % V, new),
}


def kept(backward: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name and memory of every array that a backward function mentions, itself or through functions it mentions."""
    for name, cell in zip(backward.__code__.co_freevars, backward.__closure__ or ()):
        with contextlib.suppress(ValueError):  # a variable of a branch that was not taken
            for value in (
                cell.cell_contents if isinstance(cell.cell_contents, list) else [cell.cell_contents]
            ):
                if isinstance(value, np.ndarray) and name not in SHARED:
                    while isinstance(value.base, np.ndarray):
                        value = value.base
                    yield name, value
                elif isinstance(value, FunctionType):
                    yield from kept(value)


def bytes_of(arrays: list[np.ndarray]) -> int:
    return sum({id(array): array.nbytes for array in arrays}.values())


def rows_of_the_table() -> dict[str, list[str]]:
    lines = BACKWARD.split("| op | kept |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].replace("`", ""): row[1:] for row in cells}


TABLE = rows_of_the_table()


def test_the_table_has_every_op() -> None:
    assert set(TABLE) == set(CASES)
    in_words = differentiable(moe)  # what an expert keeps depends on how many tokens it gets
    assert set.union(*map(differentiable, PARTS)) - in_words == {
        re.split("[ ,]", case)[0] for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_what_an_op_keeps_is_what_the_table_says(case: str) -> None:
    _, backward = CASES[case]()
    arrays = list(kept(backward))
    named = re.findall(r"`(\w+)`", TABLE[case][0])
    assert set(named) <= {name for name, _ in arrays}
    assert bytes_of([array for name, array in arrays if name in named]) == bytes_of(
        [array for _, array in arrays]
    )
    assert bytes_of([array for _, array in arrays]) / N == number(TABLE[case][1])


def number(text: str) -> int:
    return int(re.match(r"[\d,]+", text)[0].replace(",", ""))  # type: ignore[index]


def test_what_a_pass_keeps_is_what_the_page_says() -> None:
    config = presets.tiny().resolved()
    whole = NumpyEngine(config, V, threads=1)
    whole.load(initial_weights(whole.rows, seed=1))
    tokens = np.zeros((B, T), np.int64)
    _, backward = whole.forward(Batch(tokens, tokens, 0, np.arange(B)), 1 / N)
    said = re.search(r"a whole pass of tiny keeps \*\*([\d,]+) bytes a token", BACKWARD)
    assert said
    weights = whole.weights.flat
    assert bytes_of([array for _, array in kept(backward) if array is not weights]) / N == number(
        said[1]
    )


def test_the_products_cost_what_the_estimate_counts() -> None:
    of_a_block = (
        "linear, q, k and v",
        "attention",
        "linear, o",
        "linear, gate and up",
        "linear, down",
    )
    times = dict.fromkeys(of_a_block, MODEL.n_layers) | {"linear, head": 1}
    forward = sum(n * number(TABLE[case][2]) for case, n in times.items())
    backward = sum(n * number(TABLE[case][3]) for case, n in times.items())
    assert f"{forward:,} FLOPs forward" in BACKWARD
    assert backward == 2 * forward
    assert forward + backward == flops_per_token(MODEL, V)


def test_muon_costs_what_the_page_says() -> None:
    rows = NumpyEngine(presets.tiny().resolved(), V, threads=1).rows.values()
    sides = [sorted(row.shape) for row in rows if row.group == "muon"]
    cost = sum(5 * (4 * short**2 * long + 2 * short**3) for short, long in sides)
    train = presets.tiny().train
    assert f"{cost / 1e9:.1f} GFLOP an update" in BACKWARD
    assert (
        f"{flops_per_token(MODEL, V) * train.batch_size * T / 1e9:.1f} GFLOP for the gradients"
        in BACKWARD
    )


# -- what is run -------------------------------------------------------------------------------------------------------


def run(document: str) -> tuple[dict[str, Any], str]:
    """All examples of a document, one after the other, as one program: its names, and what it printed."""
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for path, code in FENCE.findall(document):
            if not path:
                exec(compile(code, "example", "exec"), names)
    return names, printed.getvalue()


def test_the_example_by_hand_is_right() -> None:
    names, _ = run(BACKWARD)
    assert names["dw"][0, 1] == 4


def test_first_principles() -> None:
    names, printed = run(FIRST_PRINCIPLES)
    V, floor = names["V"], names["floor"]
    assert math.isclose(names["bigram_losses"][0], math.log(V), rel_tol=1e-6)
    assert floor < names["bigram_losses"][-1] < floor + 0.01, "the page says: within a hundredth"
    assert names["hidden_losses"][-1] < floor
    assert math.isclose(names["losses"][0], math.log(V), rel_tol=0.05)
    assert names["losses"][-1] < 0.5 * floor
    # Later steps amplify rounding, as training does.
    np.testing.assert_allclose(names["engine_losses"][:20], names["losses"][:20], rtol=1e-4)
    assert names["engine_losses"][-1] < 0.5 * floor
    written = printed.rpartition("nats\n")[2].split()[:-1]  # the last word may be cut off
    assert len(written) > 8
    assert set(written) <= set(names["text"].split())


def test_the_parts_named_in_first_principles_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", FIRST_PRINCIPLES)
    assert len(links) > 20
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_the_commands_in_first_principles_are_understood() -> None:
    (command,) = re.findall(r"^ {4}glasslm train (.*)$", FIRST_PRINCIPLES, re.MULTILINE)
    asked = parse(command.split())
    assert parameter_table(asked.model, V).total == 795_392
    known = {
        name
        for part in (asked.model, asked.data, asked.optimizer, asked.train)
        for name in vars(part)
    }
    flags = set(re.findall(r"`--([a-z-]+)", FIRST_PRINCIPLES))
    assert len(flags) > 8
    assert {flag.replace("-", "_") for flag in flags} <= known | {"preset", "compare"}


# -- what survives which fault ----------------------------------------------------------------------------------------

TESTS = Path(__file__).parent
FAULTS = (DOCS / "faults.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of docs/faults.md, without its head."""
    lines = FAULTS.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_fault_has_tests_and_every_test_exists() -> None:
    runs, texts = rows("Runs and checkpoints"), rows("Text in")
    assert (len(runs), len(texts)) == (18, 7)
    for fault, what_happens, tests in runs + texts:
        named = re.findall(r"`tests/([\w/]+\.py)::(\w+)`", tests)
        assert len(named) == tests.count("::") > 0, fault
        assert what_happens
        for path, name in named:
            source = (TESTS / path).read_text(encoding="utf-8")
            found = re.search(rf"((?:^@.*\n(?:^[ )].*\n)*)*)^def {name}\(", source, re.MULTILINE)
            assert found, f"{path} has no {name}"
            alone = re.search(r"^@pytest\.mark\.slow$", found[1], re.MULTILINE) is not None
            assert alone == (
                tests.find("slow: ") != -1 and tests.find("slow: ") < tests.find(name)
            ), name


def test_the_numbers_of_the_faults_are_those_of_the_tests() -> None:
    def of(path: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"counted_{Path(path).stem}", TESTS / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    folder, resume, crafted = (
        of(f"faults/test_{name}.py") for name in ("run_folder", "resume", "crafted")
    )
    engines = len(resume.ENGINES)
    counted = {
        "kills in the middle of a step": engines * resume.STEPS,
        "deaths at an operation": folder.DEATHS,
        "flipped bits": folder.FLIPS,
        "cuts": folder.CUTS,
        "resumes from each step": engines * resume.RESUMES,
        "signals during a save": engines * (2 * len(resume.MOMENTS) + resume.DEATHS),
        "crafted files": len(crafted.CRAFTED),
        "crafted model folders": len(crafted.FOLDERS),
        "kinds of damage": len(of("lab/test_verification.py").DAMAGE),
        "races": folder.RACES,
    }
    said = {what: number(cell) for what, cell in rows("In numbers")}
    assert len(said) == len(counted)
    for what, times in counted.items():
        assert [value for key, value in said.items() if key.startswith(what)] == [times], what
