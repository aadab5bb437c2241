"""A file imports only what stands above it, so that a stranger can read the project from top to bottom."""

import ast
import re
from pathlib import Path

import pytest

import glasslm

ROOT = Path(glasslm.__file__).parent

# From top to bottom, in the order in which text becomes a model and a model is used. Where a package's __init__ joins
# its files it stands below them.
LAYERS = """
    errors
    quantities
    config
    settings
    presets
    wording
    files

    corpora.cache
    corpora.download
    corpora.texts
    corpora.child
    corpora.wikitext
    corpora.mediawiki
    corpora.parquet
    corpora.converted
    corpora.files
    corpora.shakespeare
    corpora.python_code
    corpora.arxiv
    corpora.hub
    corpora.hub_reader
    corpora.wikipedia
    corpora
    tokenizers
    tokens
    corpus_facts

    parameters
    lora
    engines
    engines.dropout
    engines.objective
    engines.positions
    engines.state
    engines.inspection
    engines.choice
    engines.numpy
    engines.numpy.arena
    engines.numpy.weights
    engines.numpy.ops
    engines.numpy.attention
    engines.numpy.flash
    engines.numpy.moe
    engines.numpy.model
    engines.numpy.optimizer
    engines.numpy.inference
    engines.numpy.engine
    engines.torch
    engines.torch.hardware
    engines.torch.layers
    engines.torch.attention
    engines.torch.moe
    engines.torch.model
    engines.torch.inspection
    engines.torch.optimizer
    engines.torch.engine
    engines.torch.distributed

    sampling
    json_grammar
    generation
    evaluation
    baselines
    overlap

    schedule
    estimate
    memory
    metrics
    checkpoint
    guard
    interruption
    runs
    provenance
    trained
    finetune
    panel
    display
    training
    pace
    trackers

    report.facts
    report.figures
    report.samples
    report.surprise
    report.findings
    report.honesty
    report.shares
    report.syntax
    report.names
    report.domains
    report.page
    report
    launch
    interop
    interop.reading
    interop.llama
    interop.gpt2
    interop.families
    interop.leaving
    interop.vocabulary
    interop.card
    interop.hf
    interop.gguf_vocabulary
    interop.gguf_file
    interop.peft_settings
    interop.peft_files
    interop.arriving
    lab
    lab.statistics
    lab.proofs
    lab.proofs.differences
    lab.proofs.check
    lab.proofs.parity
    lab.proofs.overlay
    lab.diagnosis
    lab.diagnosis.curve_files
    lab.diagnosis.curves
    lab.diagnosis.signals
    lab.diagnosis.trials
    lab.diagnosis.drawings
    lab.diagnosis.diagnose
    lab.diagnosis.replay
    lab.diagnosis.recipes
    lab.diagnosis.experiments
    lab.diagnosis.plates
    lab.diagnosis.cookbook
    lab.records
    lab.records.comparison
    lab.records.cross
    lab.records.verification
    lab.records.resumption
    lab.records.reproduction
    lab.scaling
    lab.scaling.power_terms
    lab.scaling.law
    lab.scaling.checks
    lab.scaling.isoflop
    lab.scaling.plan
    lab.scaling.table
    lab.scaling.fitted
    lab.study
    lab.study.adapters
    lab.study.worker
    lab.study.process
    lab.study.ray_runner
    lab.study.sweep
    lab.study.setting
    lab.study.results
    lab.study.axes
    lab.study.ablation
    lab.study.ablation_report
    lab.study.ladder
    lab.study.scaling
    lab.study.scaling_report
    lab.capstone
    lab.capstone.questions
    lab.capstone.specimen
    lab.capstone.about_attention
    lab.capstone.about_order
    lab.capstone.about_size
    lab.capstone.about_text
    lab.capstone.answers
    lab.capstone.quiz
    lab.capstone.capstone
    lab.capstone.handout
    cli.parsing
    cli.train
    cli.finetune
    cli.merge
    cli.resume
    cli.generate
    cli.evaluate
    cli.check
    cli.diagnose
    cli.compare
    cli.reproduce
    cli.verify
    cli.ablate
    cli.scale
    cli.capstone
    cli.export
    cli.import
    cli.corpus
    cli.report
    cli
    __main__
    glasslm
"""
ORDER = LAYERS.split()

EXCEPTIONS = {
    ("engines", "engines.choice"): "make_engine chooses the engine, inside the function, so that nobody else does",
    ("engines", "engines.numpy.engine"): "likewise",
    ("engines", "engines.torch.engine"): "likewise",
    ("engines", "engines.torch.distributed"): "likewise",
    ("engines.choice", "engines.torch.hardware"): "what PyTorch sees is asked when PyTorch is going to compute",
    ("provenance", "glasslm"): "the version",
    ("corpora.arxiv", "glasslm"): "the version, which its server is told",
    ("cli", "glasslm"): "the version",
    ("interop.gguf_file", "glasslm"): "the version, which its reader is told",
}
# What chooses an engine, what arrays are called that leave it, what may be looked at inside, and how order enters.
ANYBODYS = {"engines.choice", "engines.state", "engines.inspection", "engines.positions"}
HEAVY = {
    "matplotlib",
    "tokenizers",
    "tiktoken",
    "requests",
    "pooch",
    "torch",
    "scipy",
    "ray",
    "transformers",
    "peft",
    "gguf",
    "datasets",
    "huggingface_hub",
    "pyarrow",
    "mwparserfromhell",
    "wandb",
    "tensorboard",
}  # imported inside the function using them


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "glasslm"] = path
    return found


MODULES = modules()


def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax but what only type checkers see."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        found.append(node)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def imported(name: str) -> set[str]:
    """The modules of glasslm that a module imports, anywhere in it."""
    found = set()
    for node in nodes(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "glasslm":
            package = node.module.removeprefix("glasslm").removeprefix(".")
            for alias in node.names:
                whole = f"{package}.{alias.name}".removeprefix(".")
                found.add(whole if whole in MODULES else package or "glasslm")
        assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are absolute here"
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("glasslm.") for alias in node.names if alias.name.startswith("glasslm")}
    return found


def test_the_list_has_every_file() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_above_it(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)]) | {other for this, other in EXCEPTIONS if this == name}
    assert imported(name) <= above


def test_the_map_of_the_readme_has_every_file_in_this_order() -> None:
    """Each row names files of one folder, or a package with all that is in it."""
    rows = re.findall(
        r"^\| (`[^|]+`) \|", (ROOT.parents[1] / "README.md").read_text("utf-8").split("| `src/glasslm/` |")[1], re.M
    )
    listed = []
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        for path in (first, *(f"{first.rpartition('/')[0]}/{other}".lstrip("/") for other in others)):
            name = path.removesuffix("/").removesuffix(".py").replace("/", ".")
            whole = "glasslm" if name == "__init__" else name.removesuffix(".__init__")
            inside = [other for other in ORDER if other.startswith(f"{whole}.")] if path.endswith("/") else []
            listed += [other for other in ORDER if other == whole or other in inside]
    unnamed = {"engines.numpy", "engines.torch", "lab"}  # empty files
    assert [name for name in ORDER if name not in unnamed] == listed


def test_every_exception_is_needed() -> None:
    for this, other in EXCEPTIONS:
        assert other in imported(this)


@pytest.mark.parametrize("name", ORDER)
def test_nobody_asks_which_engine_runs(name: str) -> None:
    """Only the engines themselves and the check of their gradients know the NumPy engine's files."""
    if not name.startswith("engines") and name not in ("lab.proofs.check", "lab.proofs.parity"):
        leading = {"engines.torch.distributed"} if name == "cli" else set()  # torchrun's processes part there
        assert {other for other in imported(name) if other.startswith("engines.")} - leading <= ANYBODYS


@pytest.mark.parametrize("name", ORDER)
def test_slow_libraries_are_imported_where_they_are_used(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    at_the_top = {
        root.split(".")[0]
        for node in tree.body
        for root in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    allowed = {"torch"} if name.startswith("engines.torch.") else set()
    assert at_the_top & HEAVY <= allowed


@pytest.mark.parametrize("name", ORDER)
def test_no_pickle_and_torch_only_in_its_engine(name: str) -> None:
    allowed = ("engines.torch.", "interop.")  # what is written for another program is read again by it
    banned = {"pickle", "marshal", "shelve"} | (set() if name.startswith(allowed) else {"torch"})
    for node in nodes(MODULES[name]):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & banned
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in banned
