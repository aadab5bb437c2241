"""Measures of Python and of names: what is known to be right, wrong or copied is found to be, and natural text stands
beside it."""

from __future__ import annotations

import ast
import inspect
import json
import math
import random
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from doubles import HistoryCache
from glasslm import cli
from glasslm.config.schema import DataConfig, ModelConfig
from glasslm.data.shards import Dataset, Split
from glasslm.data.tokenizers import CharTokenizer
from glasslm.inference.trained_model import Model
from glasslm.report import domains, names, run_report, syntax
from glasslm.report.proportions import Share
from html_pages import Page
from small_runs import train

# -- shares ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(drawn: tuple[int, int]) -> None:
    low, high = Share(*drawn).interval
    scipys = binomtest(*drawn).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((scipys.low, scipys.high), abs=1e-12)
    assert 0 <= low <= Share(*drawn).value <= high <= 1


def test_none_and_all_have_exact_ends() -> None:
    assert {Share(0, n).interval[0] for n in range(1, 400)} == {0.0}
    assert {Share(n, n).interval[1] for n in range(1, 400)} == {1.0}


def test_of_nothing_nothing_is_known() -> None:
    assert Share(0, 0).interval == (0, 1)
    assert str(Share(0, 0)) == "-"
    assert math.isnan(Share(0, 0).facts["share"])


# -- Python ------------------------------------------------------------------------------------------------------------

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
    found = syntax.judge(code[:cut])
    assert found.outcome != "broken", found
    assert not found.error
    kept = [line for line in code[:cut].split("\n")[:-1] if line.strip()]
    assert found.lines <= len(kept)


@pytest.mark.parametrize("code", [VALID, *NATURAL])
def test_what_parses_is_a_beginning_that_parses(code: str) -> None:
    """The lines that are said to parse do, by the parser itself, and no more of them."""
    for cut in range(0, min(len(code), 1200), 7):
        found = syntax.judge(code[:cut])
        lines = code[:cut].split("\n")[:-1]
        told = [i + 1 for i, line in enumerate(lines) if line.strip()][: found.lines]
        beginning = "\n".join(lines[: told[-1] if told else 0])
        assert bool(ast.parse(beginning).body) == (found.outcome == "parses")


@pytest.mark.parametrize(
    "wrong", ["    return ]\n", "x = = 3\n", "def f(x]:\n", "  x = (3\n}\n", "a b\n", "x = 'a\n"]
)
@pytest.mark.parametrize("after", ["", "y = 3\n", "class A:\n    def f(self):\n"])
def test_a_fault_is_found_whatever_comes_after_it(wrong: str, after: str) -> None:
    before = "x = 1\n\n\ndef g(y):\n    return y\n\n\n"
    found = syntax.judge(before + wrong + after + "z")
    assert found.outcome == "broken"
    assert found.lines == 3
    assert found.error


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
    assert syntax.judge(text).outcome == "unfinished"


@pytest.mark.parametrize(
    "text",
    ["(" * 3000, "-" * 3900 + "1", "a." * 1900 + "a", "x\0y", "\ud800 = 1", "9" * 3900, "[" * 99],
    ids=["brackets", "signs", "dots", "NUL", "surrogate", "number", "open"],
)  # fmt: skip
def test_hostile_texts_are_judged(text: str) -> None:
    assert syntax.judge(f"y = 1\n{text}\nz = 1\n").lines in (1, 2, 3)


def test_dubious_code_is_no_error_and_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert syntax.judge('x = "\\d"\nif x is 3:\n    pass\n1or x\n').outcome == "parses"


def test_errors_are_counted_without_their_places() -> None:
    texts = ["x = 1\n" * n + "if x:\ny = 1\n" for n in range(5)] + ["x = (]\n"] * 2 + ["x = 1\n"]
    found = syntax.of(texts)
    assert found.errors[0] == ("expected an indented block after 'if' statement", 5)
    assert found.errors[1][1] == 2
    assert found.share("broken") == Share(7, 8)
    assert found.lines == (0 + 1 + 2 + 3 + 4 + 0 + 0 + 1) / 8


def test_pieces_begin_where_something_new_does() -> None:
    text = "".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(40))
    assert syntax.opening(text, 20) == "\n\n\n"
    assert syntax.opening(text.replace("\n\n\n", "\n\n"), 20) == "\n\n"
    assert syntax.opening(text.replace("\n\n\n", "\n"), 20) == "\n"
    assert syntax.opening(text.replace("\n", "\r\n"), 20) == "\r\n\r\n\r\n"
    found = syntax.pieces(text, "\n\n\n", [9, 20], 10)
    assert [len(piece) for piece in found] == [9, 20] * 5
    assert all(piece.startswith("def f") for piece in found)
    numbers = [int(re.findall(r"\d+", piece)[0]) for piece in found]
    assert np.ptp(np.diff(numbers)) <= 1  # evenly spaced
    assert np.diff(numbers).min() >= 3
    assert (
        len(syntax.pieces(text, "\n\n\n", [20], 100)) == 39
    )  # before the first there is no line break
    assert syntax.pieces(text, "\n\n\n", [5000]) == []
    assert syntax.judge(VALID.replace("\n", "\r\n")).outcome == "parses"
    assert syntax.judge("x = 1\r\ny = 2 + \\\r\n").outcome == "parses"


# -- names -------------------------------------------------------------------------------------------------------------


def test_what_a_list_of_names_is() -> None:
    people = [
        f"{a}{b}"
        for a in ("Ann", "Jo", "Li", "Per", "Zo\u00eb")
        for b in ("", "a", "ette", "-Mae", " O'Neill")
    ]
    assert names.is_list("\n".join(people * 8) + "\n")
    assert names.is_list("\r\n".join(people * 8) + "\r\n")
    assert names.is_list("\u738b\u5c0f\u660e\n\u674e\u96ea\n" * 60)
    assert names.is_list("Names of people in alphabetical order:\n" + "\n".join(people * 8) + "\n")
    assert not names.is_list("\n".join(people * 3))  # too few to say
    assert not names.is_list("Floccinaucinihilipilification Honorificabilitudinitatibus\n" * 120)
    assert not names.is_list("3.14\n2.72\n1.41\n" * 60)
    assert not names.is_list("x = y\nreturn x\n" * 90)
    assert not names.is_list("ann,1\njo,2\n" * 90)
    assert not names.is_list("To be, or not to be\n" * 120)
    assert not names.is_list(
        ("We show that this holds in all cases that matter to us. " * 20 + "\n\n") * 120
    )
    assert not any(names.is_list(code) for code in NATURAL)


def test_lists_among_well_known_texts(data_dir: Path) -> None:
    found = {
        path.name: names.is_list(path.read_text(encoding="utf-8")[: 64 << 10])
        for path in data_dir.glob("*.txt")
    }
    assert {name for name, is_list in found.items() if is_list} == {"names.txt"}


def test_names_are_known_unseen_or_invented() -> None:
    train_part, val_part = "emma\nolivia\nava\nemma\nanna\nhann", "ah\nemma\nmia\nann\nmia\nxyz\n"
    written = ["emma", "ava", "mia", "emava", "ah", "hann", "emava", "", " ", None]
    found = names.examine(written, train_part, val_part)
    assert found.known == Share(2, 10)
    assert found.unseen == Share(1, 10)  # mia
    assert found.invented == Share(4, 10)  # the name that is cut between the parts is in neither
    assert found.nothing == Share(3, 10)
    assert found.distinct == Share(6, 7)
    assert found.examples == ("emava", "ah", "hann")
    assert found.natural_known == Share(1, 5)  # emma of emma, mia, ann, mia, xyz
    assert found.natural_distinct == Share(4, 5)
    # emava: ^em, ema, mav ... mav is nobody's; ah: ^ah; hann: ^ha; mia and xyz neither; ann: nn$ is not anna's
    assert found.well_formed == Share(0, 4)
    assert found.natural_well_formed == Share(0, 4)
    whole = names.examine(["hann"], "emma\nhann\n", "ah\nmia\n")
    assert (whole.known, whole.natural_known) == (Share(1, 1), Share(0, 2))


def test_well_formed_is_made_of_known_trigrams() -> None:
    found = names.examine(
        ["anna", "banan", "bana", "nanana", "ananas"], "banana\nanan\n", "banan\nnanas\nx\n"
    )
    assert found.invented == Share(4, 5)
    assert found.well_formed == Share(
        1, 4
    )  # bana: ^ba ban ana na$; anna: nna; nanana: ^na; ananas: nas
    assert found.natural_well_formed == Share(1, 3)  # banan: an$ is that of anan


# -- a model that is known -------------------------------------------------------------------------------------------


class Scribe:
    """An engine that writes given texts after any prompt, each in its row, and the next ones in the next cache."""

    def __init__(self, tokenizer: CharTokenizer, texts: Sequence[str]) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.texts = [tokenizer.encode(text).tolist() for text in texts]
        self.begun = 0
        self.prompt = 0

    def new_cache(self, rows: int, capacity: int) -> HistoryCache:
        cache = HistoryCache(rows, capacity)
        cache.first, self.begun, self.prompt = self.begun, self.begun + rows, 0
        return cache

    def logits(self, tokens: Any, cache: Any, counts: Any, every: bool = False) -> Any:
        self.prompt = self.prompt or int(max(counts))
        result = np.zeros((len(counts), self.vocab_size), np.float32)
        for row, count in enumerate(counts):
            cache.read[row] += tokens[row, :count].tolist()
            text = self.texts[(cache.first + row) % len(self.texts)]
            result[row, text[(len(cache.read[row]) - self.prompt) % len(text)]] = 200
        return result


def taken(
    texts: Sequence[str],
    train_part: str,
    val_part: str,
    seconds: float = math.inf,
    scribe: Callable[..., Any] = Scribe,
    **data: Any,
) -> domains.Domain | None:
    tokenizer = CharTokenizer("".join(texts) + train_part + val_part)
    splits = [
        Split(tokenizer.encode(part).astype(np.uint16), len(part.encode()))
        for part in (train_part, val_part)
    ]
    dataset = Dataset(tokenizer, splits[0], splits[1], None, {}, "")
    config: Any = SimpleNamespace(
        model=ModelConfig(block_size=1024).resolved(), data=DataConfig(**data)
    )
    run: Any = SimpleNamespace(config=config, record={"data": {"files": []}})
    return domains.examine(
        run, dataset, Model(config, tokenizer, scribe(tokenizer, texts), 7), seconds
    )


@pytest.fixture(autouse=True)
def _shorter_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "BYTES", 160)


FUNCTIONS = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(300))
GARBAGE = "def )(:\n  ]] return x = = 3\n+ f{\n"


@pytest.mark.parametrize(
    ("texts", "share"),
    [([FUNCTIONS[:300]], 1.0), ([GARBAGE], 0.0), ([FUNCTIONS[:300], GARBAGE], 0.5)],
)
def test_a_model_that_writes_python_and_one_that_writes_garbage(
    texts: list[str], share: float
) -> None:
    found = taken(texts, FUNCTIONS, FUNCTIONS, corpus="python")
    assert found is not None
    assert found.facts["kind"] == "python"
    assert found.facts["parses"]["share"] == share
    assert found.facts["broken"]["share"] == 1 - share
    assert (found.facts["texts"], found.facts["parses"]["of"]) == (20, 20)
    assert found.facts["tokens"] == 160  # characters, of a byte each
    assert found.facts["natural"]["parses"]["share"] == 1.0
    assert found.facts["natural"]["texts"] == 100
    assert bool(found.remark) == (share < 1)
    assert found.rows[0][1].startswith(f"{share:.0%} (")


def test_garbage_among_natural_text_is_the_yardstick() -> None:
    """Every second function of the natural text is none: it says so, and not of the model."""
    half = "".join(f"def f{i}(x):\n    return x + {i}{')' * (i % 2)}\n\n\n" for i in range(300))
    natural = taken([FUNCTIONS[:300]], FUNCTIONS, half, corpus="python")
    assert natural is not None
    assert natural.facts["parses"]["share"] == 1.0
    assert natural.facts["natural"]["parses"]["share"] < 0.2  # each piece has several functions


def test_python_is_known_by_its_corpus_and_by_its_files() -> None:
    def found(corpus: str | None, **files: int) -> Any:
        listed = [
            {"path": f"/somewhere/{name.replace('_', '.')}", "bytes": size}
            for name, size in files.items()
        ]
        config = SimpleNamespace(data=DataConfig(corpus=corpus))  # type: ignore[arg-type]
        run: Any = SimpleNamespace(config=config, record={"data": {"files": listed}})
        return domains.kind(run, None)

    assert found("python") == "python"
    assert found("shakespeare", t_txt=9) is None
    assert found(None, a_py=51, b_md=50) == "python"
    assert found(None, a_py=50, b_md=50) is None
    assert found(None) is None


def test_what_cannot_be_measured_is_said() -> None:
    slow = taken([FUNCTIONS], FUNCTIONS, FUNCTIONS, seconds=-1.0, corpus="python")
    short = taken([FUNCTIONS], FUNCTIONS, "def f(x):\n    return x\n", corpus="python")
    assert slow is not None
    assert short is not None
    assert slow.facts == {"kind": "python", "missing": domains.TOO_SLOW}
    assert short.facts == {"kind": "python", "missing": domains.TOO_SHORT}
    assert (
        taken(["abc"], "To be, or not to be, that is the question.\n" * 200, "Or so.\n" * 50)
        is None
    )


SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
KNOWN = [a + b for a in SYLLABLES[:40] for b in SYLLABLES[:20]]
UNSEEN = [a + b for a in SYLLABLES[:40] for b in SYLLABLES[20:25]]


def test_a_model_that_knows_half_of_its_names_by_heart() -> None:
    """Of eight names four are in the training text, one in the validation text, two are invented, one has no end."""
    draw = random.Random(0)
    draw.shuffle(KNOWN)
    texts = [f"{name}\n" for name in [*KNOWN[:4], UNSEEN[7], "zuzu", "qqq"]] + ["a" * 60]
    found = taken(texts, "\n".join(KNOWN) + "\n", "\n".join([*UNSEEN, *KNOWN[:50]]) + "\n")
    assert found is not None
    facts = found.facts
    assert facts["kind"] == "names"
    assert facts["texts"] == 200
    shares = {name: facts[name]["share"] for name in ("known", "unseen", "invented", "nothing")}
    assert shares == {"known": 4 / 8, "unseen": 1 / 8, "invented": 2 / 8, "nothing": 1 / 8}
    assert facts["examples"] == ["zuzu", "qqq"]
    assert facts["well_formed"]["of"] == 50
    assert facts["distinct"] == Share(7, 175).facts
    assert facts["natural"]["known"] == Share(50, 250).facts
    assert found.examples == ("zuzu", "qqq")


class Flat(Scribe):
    """All tokens are equally likely, or `logit` is not even a number."""

    logit = 0.0

    def logits(self, tokens: Any, cache: Any, counts: Any, every: bool = False) -> Any:
        return np.full_like(super().logits(tokens, cache, counts), self.logit)


def test_no_text_is_written_twice() -> None:
    tokenizer = CharTokenizer("abcdefgh\n")
    config: Any = SimpleNamespace(model=ModelConfig(block_size=64).resolved())
    engine: Any = Flat(tokenizer, ["a"])
    written = domains.write(Model(config, tokenizer, engine, 0), "\n", 60, 30, "", math.inf)
    assert len(set(written)) == 60


def test_a_model_that_lost_its_numbers_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flat, "logit", math.nan)
    found = taken([FUNCTIONS], FUNCTIONS, FUNCTIONS, scribe=Flat, corpus="python")
    assert found is not None
    assert "finite" in found.facts["missing"]


# -- the command and the report ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def code_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "code.py").write_text(FUNCTIONS * 3, encoding="utf-8", newline="\n")
    train(folder / "code.py", folder / "run", max_steps=2, sample_interval=0, checkpoint_interval=2)
    return folder / "run"


@pytest.mark.usefixtures("no_figures")
def test_evaluate_and_the_report_tell_the_same(
    code_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domains, "TEXTS", 4)
    monkeypatch.setattr(run_report, "MODEL_S", 0.1)
    assert cli.main(["evaluate", str(code_run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["domain"]
    assert facts["parses"]["of"] == 4
    assert facts["natural"]["parses"]["share"] == 1.0
    assert cli.main(["evaluate", str(code_run)]) == 0
    told = capsys.readouterr().out
    share = Share(facts["parses"]["count"], 4)
    assert f"parses, as far as it goes                        {share}" in told
    assert "It took" in told
    page = Page(run_report.write(code_run).read_text(encoding="utf-8"))
    markdown = (code_run / "report.md").read_text(encoding="utf-8")
    for words in ("Does it write Python?", "natural text", str(share)):
        assert words in page.text
        assert words in markdown
    assert (
        cli.main(
            ["evaluate", str(code_run), "--text-file", str(code_run.parent / "code.py"), "--json"]
        )
        == 0
    )
    assert "domain" not in json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("no_figures")
def test_hostile_names_stay_text(code_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = domains.Domain(
        "names", "What names?", how="so", header=("", "a", "b"), rows=(("x", "1", "2"),), remark="<script>",
        examples=("</pre><script>alert(1)</script>", "```", "\x1b[31m"),
    )  # fmt: skip
    monkeypatch.setattr(domains, "examine", lambda *given: hostile)
    monkeypatch.setattr(run_report, "MODEL_S", 0.1)
    page = Page(run_report.write(code_run).read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "</pre><script>alert(1)</script>\n```\n\u241b[31m" in page.text
    assert "````" in (code_run / "report.md").read_text(encoding="utf-8")
