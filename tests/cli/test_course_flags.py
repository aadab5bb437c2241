"""The commands of docs/course.md parse, its links lead somewhere, and its lines of Python run."""

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import pytest

from glasslm.cli import COMMANDS, parsing
from glasslm.cli.train import parse
from glasslm.config import presets
from glasslm.config.schema import ALIASES
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table
from glasslm.runs import run_folder
from glasslm.training.learning_rate import lr_at
from small_runs import train, write_text

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCES, PROSE = FENCE.findall(PAGE), FENCE.sub("", PAGE)
FENCED = [line for language, code in FENCES if language == "bash" for line in code.splitlines()]
SPANS = re.findall(r"`([^`\n]+)`", PROSE)
LINES = list(
    dict.fromkeys([*FENCED, *(code for code in SPANS if re.match(r"(glasslm|python) ", code))])
)
PYTHON = [code for language, code in FENCES if language == "python"]
V = 65


class Understood(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and runs of a few steps on it under the names that they have on the page."""
    folder = tmp_path_factory.mktemp("course")
    text = write_text(folder / "shakespeare.txt")
    text.write_text("ROMEO: " + text.read_text(encoding="utf-8"), encoding="utf-8", newline="\n")
    for name, layers, position in (
        ("bag", 1, "none"),
        ("mask-only", 2, "none"),
        ("order-1", 1, "rope"),
    ):
        train(text, folder / "runs" / name, n_layers=layers, position=position, sample_interval=0)
    train(text, folder / "runs" / "default", sample_interval=0)
    return folder


@pytest.mark.parametrize("line", LINES)
def test_commands_are_understood(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command parses its flags. It stops before it does anything; every RUN exists."""
    program, name, *words = shlex.split(line)
    if program == "python":
        source = (ROOT / name).read_text(encoding="utf-8")
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []
        return
    assert name in COMMANDS
    if not words:
        return
    monkeypatch.setattr(run_folder, "find_run", lambda run: folder / "runs" / "default")
    understand = parsing.parse

    def understand_and_stop(*args: Any, **rest: Any) -> NoReturn:
        understand(*args, **rest)
        raise Understood

    module = importlib.import_module(f"glasslm.cli.{name}")
    monkeypatch.setattr(parsing, "parse", understand_and_stop)
    if getattr(module, "parse", None) is understand:
        monkeypatch.setattr(module, "parse", understand_and_stop)
    with pytest.raises(SystemExit if words == ["--help"] else Understood):
        module.main(words)


def fields(kind: Any) -> Iterator[str]:
    for name, inner in get_type_hints(kind).items():
        yield name
        if dataclasses.is_dataclass(inner):
            yield from fields(inner)


def test_flags_in_the_tables_exist() -> None:
    flags = {flag.replace("-", "_") for code in SPANS for flag in re.findall(r"--([a-z-]+)", code)}
    known = set(ALIASES)
    for name in COMMANDS:
        module = importlib.import_module(f"glasslm.cli.{name}")
        for kind in (kind for key, kind in vars(module).items() if key.endswith("Flags")):
            known |= set(fields(kind))
    assert len(flags) > 40
    assert flags <= known | {"help"}


DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/*.md")])


@pytest.mark.parametrize(
    "page", DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
)
def test_links_lead_somewhere(page: Path) -> None:
    """Each link leads to a file of the repository, and to a heading in it."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", text))
    assert page.name != "course.md" or len(links) > 50
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert ROOT in target.resolve().parents, link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {
                re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles
            }, link


def test_every_line_of_the_courses_says_what_does_it() -> None:
    """Each row names a command, a flag, a file or a step, or is an answer in words only."""
    tables = PAGE.split("\n## Course A")[1].split("\n## What the industry uses")[0]
    rows = [
        line.strip("|").split("|")
        for line in tables.splitlines()
        if re.match(r"\| (?!the page|checkpoint q)", line)
    ]
    assert len(rows) > 60
    for row in rows:
        assert all(cell.strip() for cell in row), row
        assert re.search(r"`|\]\(|steps? \d|in words only", row[1]), row


# -- examples -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[str]:
    """What each block of Python prints, on a text that is 1/250 of Shakespeare."""
    out = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in PYTHON:
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                exec(compile(code.replace("1_003_854", "3_000"), "example", "exec"), {})
            out.append(text.getvalue())
    return out


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)]


def test_pairs_tell_more_than_symbols(printed: list[str]) -> None:
    single, pairs = numbers(printed[0])
    assert 0 < pairs < single


def test_a_bag_sees_no_order_and_the_others_do(printed: list[str]) -> None:
    moved = {line.split()[0]: float(line.split()[1]) for line in printed[1].splitlines()}
    assert moved["bag"] < 1e-5
    assert moved["mask-only"] > 1e-3
    assert moved["order-1"] > 1e-3


def test_ops_pass(printed: list[str]) -> None:
    count, elements, largest_error = printed[2].split()
    assert float(largest_error) < 1e-6
    assert f"{count} ops and branches, {int(elements):,} elements," in PROSE
    assert f" cases of {count}," in PROSE


def test_counts_are_those_of_the_page(printed: list[str]) -> None:
    (block,) = [code for language, code in FENCES if language == "text"]
    assert printed[3] == block


def test_one_batch_is_off_and_a_line_bends(printed: list[str]) -> None:
    spread, line = printed[4].splitlines()
    whole, low, high, deviation = numbers(spread)
    assert low < whole < high
    assert 0 < deviation < high - low
    row = PAGE.split("\n| L = a N^-alpha |")[1].splitlines()[0]
    alpha, _, r2, _, promised, true = numbers(line)
    for number in (alpha, r2, promised, true):
        assert f" {number:g}" in row, number


# -- numbers ----------------------------------------------------------------------


def test_sizes_and_flops_are_those_of_the_code() -> None:
    for name in ("tiny", "small", "medium", "nanogpt", "capstone", "capstone-10m"):
        total = parameter_table(presets.PRESETS[name]().model.resolve(), V).total
        assert f"{total:,}" in PROSE, name
    capstone = presets.capstone().resolve()
    assert f"{flops_per_token(capstone.model, V):,.0f} a token" in PROSE
    kept = [row.size for row in parameter_table(capstone.model, V).values() if not row.decay]
    assert f"{sum(kept):,} numbers in {len(kept)} arrays" in PROSE
    gain, train = 1.0, capstone.train
    for step in range(train.max_steps):
        gain *= 1 - capstone.optimizer.weight_decay * lr_at(
            step, capstone.optimizer, train.max_steps
        )
    assert f"to {gain:.3f} over" in PROSE
    assert (
        f"{train.max_steps * train.batch_size * capstone.model.block_size / 1_003_854:.0f} epochs"
        in PROSE
    )
    course = next(line for line in FENCED if "--d-ff 341" in line)
    assert (
        f"{parameter_table(parse(shlex.split(course)[2:]).model.resolve(), V).total:,} parameters"
        in PROSE
    )


def test_numbers_that_others_measured_are_theirs() -> None:
    """Numbers that the page takes from the measurements and the notebook are there too."""
    measurements, log = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("benchmarks.md", "log.md")
    )
    for number in (
        "145 cases",
        "111,421 elements",
        "8.7e-7",
        "1.548",
        "1.573",
        "1,678",
        "274 MB",
        "1.6e-13",
    ):
        assert number in PROSE, number
        assert number in measurements, number
    for number in (
        "2.602",
        "3.304",
        "5.222",
        "3.136",
        "2.520",
        "3.433",
        "3.161",
        "3.159",
        "3.095",
        "2.539",
        "2.302",
        "1.652",
    ):
        assert number in PROSE, number
        assert number in log, number
