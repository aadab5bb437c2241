"""The documents agree with the code: quotations, examples, tables, names."""

import ast
import contextlib
import importlib.util
import inspect
import io
import math
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal, get_args

import numpy as np
import pytest

import glasslm
from glasslm import ops as public_ops
from glasslm.cli import ablate, look
from glasslm.cli.train import parse
from glasslm.config import presets
from glasslm.config.schema import FeedForward, ModelConfig
from glasslm.data import tokenizers
from glasslm.engines import positions
from glasslm.engines.dropout import row_keys
from glasslm.engines.numpy import attention, engine, flash, moe, ops, optimizer, softmax_terms
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.errors import InputError
from glasslm.interop import families, gguf_file
from glasslm.lab.checks import gradient_check, op_cases
from glasslm.lab.tries import attempt, hidden_text
from glasslm.lab.verification import reproduction
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.training.preference import dpo, grpo

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = Path(glasslm.__file__).parent
BACKWARD = (DOCS / "backward.md").read_text(encoding="utf-8")
FIRST_PRINCIPLES = (DOCS / "first-principles.md").read_text(encoding="utf-8")
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
FENCE = re.compile(r'^```python *(?:title="(\S+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)

# -- quotations --------------------------------------------------------------------

QUOTES = [(path, code) for path, code in FENCE.findall(BACKWARD) if path]


@pytest.mark.parametrize(
    ("path", "code"), QUOTES, ids=[code.splitlines()[0][:40] for _, code in QUOTES]
)
def test_quoted_lines_are_in_the_source(path: str, code: str) -> None:
    assert is_quoted(path, code)


def is_quoted(path: str, code: str) -> bool:
    """Whether the lines of `code` stand in a source file, apart from their indentation."""
    quoted = code.splitlines()
    source = (SOURCE / path).read_text(encoding="utf-8").splitlines()
    places = (source[start : start + len(quoted)] for start in range(len(source) - len(quoted) + 1))
    return any(textwrap.dedent("\n".join(place)).splitlines() == quoted for place in places)


# -- the README and the pages ----------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 900
    assert len([line for line in README.splitlines() if line.startswith("|")]) <= 25
    install = README.split("```bash\n")[1].split("```")[0].splitlines()
    assert install == [
        "pip install -e . && glasslm train",
        "pip install -e '.[test]' -c constraints.txt && pytest",
    ]


def test_the_readme_quotes_an_op_and_the_check() -> None:
    op, script = [code for path, code in FENCE.findall(README) if not path]
    assert is_quoted("engines/numpy/ops.py", op)
    assert "def backward(" in op
    assert script.startswith("import glasslm\n")
    assert len([line for line in script.splitlines() if line]) == 4
    summary = README.split("```text\n")[1].split("```")[0].strip()
    measurements = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert summary.split(";")[0] in measurements
    switches = [*gradient_check.single_switches()]
    combinations = [*gradient_check.combinations(50, 0)]
    models = len([*switches, *combinations, *gradient_check.SOFTMAX_TERMS, "weighted targets"])
    assert summary.startswith(f"{len(op_cases.OPS) + models} cases, ")
    cases, elements = re.findall(r"\d[\d,]*\b", summary)[:2]
    course = (DOCS / "course.md").read_text(encoding="utf-8")
    assert f"{elements} elements in {cases} cases here" in course
    in_float64 = len([*switches, *combinations, "weighted targets"])
    in_float32 = len([*switches, "weighted targets"])
    assert f"; {in_float64 + in_float32} models engine against engine; " in summary
    assert f"now it has {in_float64} in float64 and {in_float32} in float32" in measurements


def test_the_readme_measures_what_the_benchmarks_measure() -> None:
    """Each row has one number a cell, stands in docs/benchmarks.md too, and names its command."""
    table = README.split("\n## Measured\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    measurements = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert len(lines) == 4
    for line in lines:
        _, ours, theirs, _, command = (cell.strip() for cell in line.strip("|").split("|"))
        assert re.fullmatch(r"[\d,.]+", ours), line
        assert re.fullmatch(r"[\d,.]+", theirs), line
        assert (DOCS.parent / "benchmarks" / command.strip("`").split()[0]).exists(), line
        row = next(
            row
            for row in measurements.splitlines()
            if row.startswith("|") and ours in row and theirs in row
        )
        assert command.strip("`") in row, line


def test_the_readme_has_a_row_for_each_package() -> None:
    packages = set(re.findall(r"^\| `(\w+)/` ", README, re.MULTILINE))
    assert packages == {path.parent.name for path in SOURCE.glob("*/__init__.py")}


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = set(re.findall(r"\]\(([\w/-]+\.md)[#)]", index))
    assert pages == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {
        "index.md"
    }
    navigation = (DOCS.parent / "zensical.toml").read_text(encoding="utf-8")
    assert set(re.findall(r'"([\w/-]+\.md)"', navigation)) == pages | {"index.md"}


PAGES = sorted({*DOCS.rglob("*.md")} - {DOCS / "log.md"})  # entries of the log keep old names


@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_modules_named_in_the_pages_exist(page: Path) -> None:
    """A name such as `loop.py` or `lab/statistics.py` in code spans is a file of the project."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]*)`", text)
    modules = {name for span in spans for name in re.findall(r"[\w./-]*\w+\.py\b", span)}
    files = ["/" + path.relative_to(DOCS.parent).as_posix() for path in DOCS.parent.rglob("*.py")]
    missing = {name for name in modules if not any(path.endswith("/" + name) for path in files)}
    assert missing <= NOT_OF_THE_PROJECT


@pytest.mark.parametrize("page", [*PAGES, *DOCS.parent.glob("*.md")], ids=lambda path: path.stem)
def test_no_page_installs_the_other_project_of_this_name(page: Path) -> None:
    """glasslm on the public index is another project: pages install a clone, or its own wheel."""
    lines = page.read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if re.search(r"pip install[^`]*\bglasslm\b(?! train)", line)]
    assert [line for line in installs if "--no-index --find-links" not in line] == []


@pytest.mark.parametrize("page", [*PAGES, *DOCS.parent.glob("*.md")], ids=lambda path: path.stem)
def test_no_row_stands_outside_of_its_table(page: Path) -> None:
    """The first row after a line that is no row is a header, with a line of dashes below."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = ["", *text.splitlines(), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:]):
        if line.startswith("|") and not before.startswith("|"):
            assert re.match(r"\|[ :-]*-[| :-]*\|$", after), line


def test_the_quick_start_trains_with_a_tokenizer_that_reads_its_other_texts() -> None:
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^glasslm train (.* --run-dir runs/mine)$", page, re.MULTILINE)
    data = parse(shlex.split(command)).data
    assert data.tokenizer == "bpe"
    tokenizer = tokenizers.train_bpe("to be or not to be " * 50, data.vocab_size)
    text = README + page
    assert set(text) - set("to be or not to be ")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_terminals_of_the_readme_do_not_share_a_port() -> None:
    (port,) = re.findall(r"^glasslm serve \S+ --port (\d+) +# second terminal$", README, re.M)
    assert int(port) != look.Flags.port
    assert f"curl http://127.0.0.1:{port}/v1/" in README


def test_the_page_for_contributors_installs_what_the_hooks_run() -> None:
    page = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if "pre-commit install" in line]
    hooks = (DOCS.parent / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (install,) = re.findall(r"pip install -e '\.\[.*\]' -c constraints\.txt$", hooks, re.M)
    assert install.split("' ")[0] in line


def keys_of_returned_dict(function: Callable[..., Any]) -> set[str]:
    """The keys of the dictionary that a function writes down in its last statement."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    end = definition.body[-1]
    assert isinstance(end, ast.Return)
    assert isinstance(end.value, ast.Dict)
    return {str(key.value) for key in end.value.keys if isinstance(key, ast.Constant)}


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("try", attempt.TryResult.facts.fget),
        ("try --final", hidden_text.measure_final),
        ("reproduce", reproduction.json_facts),
        ("ablate", ablate._variant_facts),
    ],
)
def test_the_fields_of_json_are_on_the_page(command: str, function: Callable[..., Any]) -> None:
    lines = (DOCS / "formats.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{command}` | ")]
    keys = keys_of_returned_dict(function)
    assert len(keys) > 5
    assert {key for key in keys if f"`{key}`" not in row} == set()


# Files of readers: a script in docs/howto/lm-eval.md, and operations in docs/howto/own-operation.md
NOT_OF_THE_PROJECT = {"ask.py", "FILE.py", "own.py", "mish.py", "short_norm.py"}


def test_the_refusals_quoted_in_the_guides_are_those_of_the_code() -> None:
    cases = (
        ("transformers.md", families.choose_family, ModelConfig(norm_position="post")),
        ("llama-cpp.md", gguf_file.llama_cpp_config, ModelConfig(window=64)),
    )
    for page, convert, config in cases:
        with pytest.raises(InputError) as refusal:
            convert(config.resolve())
        text = (DOCS / "howto" / page).read_text(encoding="utf-8")
        assert f"\nglasslm export: {refusal.value}\n" in text


def test_the_variant_of_the_architecture_page_has_a_right_gradient() -> None:
    word, op = [code for _, code in FENCE.findall(ARCHITECTURE)]
    names = dict(vars(ops), Literal=Literal)
    exec(compile(word + op, "docs/architecture.md", "exec"), names)
    assert {*get_args(names["FeedForward"])} == {*get_args(FeedForward), "elu"}
    x, dy = random_array(3, 5).astype(np.float64), random_array(5, 3).T.astype(np.float64)
    y, backward = names["elu"](x, np.empty)
    np.testing.assert_allclose(y, np.where(x > 0, x, np.exp(x) - 1))
    ahead, behind = (names["elu"](x + h, np.empty)[0] for h in (1e-6, -1e-6))
    np.testing.assert_allclose(backward(dy), dy * (ahead - behind) / 2e-6, rtol=1e-6)
    for place in re.findall(r"\*\*\d\. [^*]+\*\*, in `([\w/.]+)`", ARCHITECTURE):
        assert (SOURCE / place).exists()
    assert "ACTIVATIONS" in (SOURCE / "engines/torch/layers.py").read_text(encoding="utf-8")


PARTS = (ops, softmax_terms, attention, flash, moe)


def list_ops(module: ModuleType) -> set[str]:
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
    ops_and_updates = set.union(updates, *map(list_ops, PARTS))
    assert {"linear", "attention", "adamw"} <= ops_and_updates
    assert sections >= ops_and_updates
    for section in sections:
        names = section.split(".")
        owner = next(
            module
            for module in (*PARTS, positions, optimizer, engine, public_ops, dpo, grpo)
            if hasattr(module, names[0])
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


# -- arrays kept for backward, and FLOPs ---------------------------------------------------

MODEL, V, B = presets.tiny().model.resolve(), 65, 2
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


def random_array(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def new(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


def dropout_keys() -> np.ndarray:
    return row_keys(0, 0, np.arange(B), 1)


def run_attention(drop: Any) -> tuple[Any, Any]:
    heads = random_array(B, T, H + 2 * K, Q)
    return attention.attention(heads[:, :, : H + K], heads[:, :, H + K :], None, drop, new)


def run_flash_attention() -> tuple[Any, Any]:
    heads = random_array(B, T, H + 2 * K, Q)
    return flash.flash_attention(heads[:, :, : H + K], heads[:, :, H + K :], None, 0, new)


def linear_case(inputs: int, outputs: int) -> Callable[[], tuple[Any, Any]]:
    return lambda: ops.linear(random_array(N, inputs), random_array(outputs, inputs), new)


CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "embedding": lambda: ops.embedding(np.arange(N) % V, random_array(V, D), new),
    "frozen_linear, q, k and v": lambda: ops.frozen_linear(
        random_array(N, D), random_array((H + 2 * K) * Q, D), new
    ),
    "adapter, q, rank 8": lambda: ops.adapter(
        random_array(N, D), random_array(8, D), random_array(H * Q, 8), 1.0, new
    ),
    "rms_norm": lambda: ops.rms_norm(random_array(N, D), random_array(D), new, 1e-5),
    "rms_norm_1p": lambda: ops.rms_norm_1p(random_array(N, D), random_array(D), new, 1e-5),
    "layer_norm": lambda: ops.layer_norm(
        random_array(N, D), random_array(D), random_array(D), new, 1e-5
    ),
    "linear, q, k and v": linear_case(D, (H + 2 * K) * Q),
    "rope": lambda: attention.rope(
        random_array(B, T, H + K, Q),
        *positions.rope_cos_sin(np.arange(T), H + K, Q, np.float32, "none", 1.0),
        new,
    ),
    "attention": lambda: run_attention(None),
    "attention with dropout": lambda: run_attention((0.1, dropout_keys())),
    "flash_attention": run_flash_attention,
    "linear, o": linear_case(H * Q, D),
    "linear, gate and up": linear_case(D, 2 * F),
    "gate with silu": lambda: ops.gate(random_array(N, 2 * F), ops.silu, new),
    "silu": lambda: ops.silu(random_array(N, F), new),
    "gelu": lambda: ops.gelu(random_array(N, F), new),
    "gelu_exact": lambda: ops.gelu_exact(random_array(N, F), new),
    "relu": lambda: ops.relu(random_array(N, F), new),
    "relu2": lambda: ops.relu2(random_array(N, F), new),
    "linear, down": linear_case(F, D),
    "dropout": lambda: ops.dropout(random_array(N, D), 0.1, dropout_keys(), new),
    "linear, head": linear_case(D, V),
    "cross_entropy": lambda: ops.cross_entropy(random_array(N, V), np.arange(N) % V, new),
    "smoothing": lambda: softmax_terms.smoothing(random_array(N, V), np.arange(N) % V, new),
    "z_loss": lambda: softmax_terms.z_loss(random_array(N, V), np.arange(N) % V, new),
}


def list_kept_arrays(backward: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name and memory of every array that a backward function refers to, also through functions."""
    for name, cell in zip(backward.__code__.co_freevars, backward.__closure__ or ()):
        with contextlib.suppress(ValueError):  # a variable of a branch that was not taken
            for value in flatten(cell.cell_contents):
                if isinstance(value, np.ndarray) and name not in SHARED:
                    while isinstance(value.base, np.ndarray):
                        value = value.base
                    yield name, value
                elif isinstance(value, FunctionType):
                    yield from list_kept_arrays(value)


def flatten(value: Any) -> list[Any]:
    """The items of a list, and of the tuples in it; the value itself if it is no list."""
    if not isinstance(value, list):
        return [value]
    return [x for item in value for x in (item if isinstance(item, tuple) else (item,))]


def count_bytes(arrays: list[np.ndarray]) -> int:
    return sum({id(array): array.nbytes for array in arrays}.values())


def read_op_table() -> dict[str, list[str]]:
    lines = BACKWARD.split("| op | kept |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].replace("`", ""): row[1:] for row in cells}


TABLE = read_op_table()


def test_the_table_has_every_op() -> None:
    assert set(TABLE) == set(CASES)
    in_words = list_ops(moe)  # what an expert keeps depends on how many tokens it gets
    assert set.union(*map(list_ops, PARTS)) - in_words == {
        re.split("[ ,]", case)[0] for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_what_an_op_keeps_is_what_the_table_says(case: str) -> None:
    _, backward = CASES[case]()
    arrays = list(list_kept_arrays(backward))
    named = re.findall(r"`(\w+)`", TABLE[case][0])
    assert set(named) <= {name for name, _ in arrays}
    assert count_bytes([array for name, array in arrays if name in named]) == count_bytes(
        [array for _, array in arrays]
    )
    assert count_bytes([array for _, array in arrays]) / N == parse_number(TABLE[case][1])


def parse_number(text: str) -> int:
    return int(re.match(r"[\d,]+", text)[0].replace(",", ""))  # type: ignore[index]


def test_what_a_pass_keeps_is_what_the_page_says() -> None:
    config = presets.tiny().resolve()
    whole = NumpyEngine(config, V, threads=1)
    whole.load(initial_weights(whole.table, seed=1))
    tokens = np.zeros((B, T), np.int64)
    _, backward = whole.forward(Batch(tokens, tokens, 0, np.arange(B)), 1 / N)
    sentence = re.search(r"a whole pass of tiny keeps \*\*([\d,]+) bytes a token", BACKWARD)
    assert sentence
    weights = whole.weights.flat
    assert count_bytes(
        [array for _, array in list_kept_arrays(backward) if array is not weights]
    ) / N == parse_number(sentence[1])


def test_the_products_cost_what_the_estimate_counts() -> None:
    of_a_block = (
        "linear, q, k and v",
        "attention",
        "linear, o",
        "linear, gate and up",
        "linear, down",
    )
    times = dict.fromkeys(of_a_block, MODEL.n_layers) | {"linear, head": 1}
    forward = sum(n * parse_number(TABLE[case][2]) for case, n in times.items())
    backward = sum(n * parse_number(TABLE[case][3]) for case, n in times.items())
    assert f"{forward:,} FLOPs forward" in BACKWARD
    assert backward == 2 * forward
    assert forward + backward == flops_per_token(MODEL, V)


def test_muon_costs_what_the_page_says() -> None:
    rows = NumpyEngine(presets.tiny().resolve(), V, threads=1).table.values()
    sides = [sorted(row.shape) for row in rows if row.group == "muon"]
    cost = sum(5 * (4 * short**2 * long + 2 * short**3) for short, long in sides)
    train = presets.tiny().train
    assert f"{cost / 1e9:.1f} GFLOP an update" in BACKWARD
    assert (
        f"{flops_per_token(MODEL, V) * train.batch_size * T / 1e9:.1f} GFLOP for the gradients"
        in BACKWARD
    )


# -- examples -----------------------------------------------------------------------


def run_examples(document: str) -> tuple[dict[str, Any], str]:
    """Run all examples of a document as one program; its names, and its output."""
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for path, code in FENCE.findall(document):
            if not path:
                exec(compile(code, "example", "exec"), names)
    return names, printed.getvalue()


def test_the_example_by_hand_is_right() -> None:
    names, _ = run_examples(BACKWARD)
    assert names["dw"][0, 1] == 4


def test_first_principles() -> None:
    names, printed = run_examples(FIRST_PRINCIPLES)
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


# -- faults ---------------------------------------------------------

TESTS = Path(__file__).parent
FAULTS = (DOCS / "faults.md").read_text(encoding="utf-8")


def read_fault_rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of docs/faults.md, without its head."""
    lines = FAULTS.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_fault_has_tests_and_every_test_exists() -> None:
    runs, texts = read_fault_rows("Runs and checkpoints"), read_fault_rows("Text in")
    assert len(runs) >= 18
    assert len(texts) >= 7
    calls = read_fault_rows("Calls of `glasslm.ops`")
    assert len(calls) >= 4
    for fault, what_happens, tests in runs + texts + calls:
        named = re.findall(r"`tests/([\w/]+\.py)::(\w+)`", tests)
        assert len(named) == tests.count("::") > 0, fault
        assert what_happens
        for path, name in named:
            source = (TESTS / path).read_text(encoding="utf-8")
            definition = re.search(
                rf"((?:^@.*\n(?:^[ )].*\n)*)*)^def {name}\(", source, re.MULTILINE
            )
            assert definition, f"{path} has no {name}"
            is_slow = re.search(r"^@pytest\.mark\.slow$", definition[1], re.MULTILINE) is not None
            assert is_slow == (
                tests.find("slow: ") != -1 and tests.find("slow: ") < tests.find(name)
            ), name


def test_the_numbers_of_the_faults_are_those_of_the_tests() -> None:
    def load_test_module(path: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"counted_{Path(path).stem}", TESTS / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    folder, resume, crafted = (
        load_test_module(f"faults/test_{name}.py") for name in ("damaged_runs", "resume", "crafted")
    )
    engines = len(resume.ENGINES)
    counts = {
        "kills in the middle of a step": engines * resume.STEPS,
        "deaths at an operation": folder.DEATHS,
        "flipped bits": folder.FLIPS,
        "cuts": folder.CUTS,
        "resumes from each step": engines * resume.RESUMES,
        "signals during a save": engines * (2 * len(resume.MOMENTS) + resume.DEATHS),
        "crafted files": len(crafted.CRAFTED),
        "crafted model folders": len(crafted.FOLDERS),
        "kinds of damage": len(load_test_module("lab/run_damage.py").DAMAGE),
        "races": folder.RACES,
        "edits of run.json": 2 * load_test_module("faults/test_protection.py").EDITS,
    }
    numbers_on_the_page = {what: parse_number(cell) for what, cell in read_fault_rows("In numbers")}
    assert len(numbers_on_the_page) == len(counts)
    for what, times in counts.items():
        assert [value for key, value in numbers_on_the_page.items() if key.startswith(what)] == [
            times
        ], what
