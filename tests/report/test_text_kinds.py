"""Known models get the right proportions of Python and of names, beside natural text."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from doubles import HistoryCache
from glasslm import cli
from glasslm.config.schema import DataConfig, ModelConfig
from glasslm.data.dataset import Dataset, Split
from glasslm.data.tokenizers import CharTokenizer
from glasslm.inference.cache_rows import CacheRows
from glasslm.inference.proportions import Proportion
from glasslm.inference.trained_model import Model
from glasslm.report import run_report, text_kinds
from html_pages import Page
from small_runs import train

# -- a model that is known -------------------------------------------------------------------------


class ScriptedEngine:
    """An engine that generates scripted texts after any prompt, one per row.

    The next cache gets the next texts.
    """

    row_tile = 1

    def __init__(self, tokenizer: CharTokenizer, texts: Sequence[str]) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.texts = [tokenizer.encode(text).tolist() for text in texts]
        self.started = 0
        self.prompt = 0

    def new_cache(self, rows: int, capacity: int) -> HistoryCache:
        cache = HistoryCache(rows, capacity)
        cache.numbers = range(self.started, self.started + rows)
        self.started, self.prompt = self.started + rows, 0
        return cache

    def logits(self, tokens: Any, cache: Any, counts: Any, every: bool = False) -> Any:
        self.prompt = self.prompt or int(max(counts))
        result = np.zeros((len(counts), self.vocab_size), np.float32)
        for row, count in enumerate(counts):
            cache.append(row, tokens[row, :count].tolist())
            text = self.texts[cache.numbers[row] % len(self.texts)]
            result[row, text[(len(cache.read[row]) - self.prompt) % len(text)]] = 200
        return result


def measure(
    texts: Sequence[str],
    train_part: str,
    val_part: str,
    seconds: float = math.inf,
    engine_class: Callable[..., Any] = ScriptedEngine,
    **data: Any,
) -> text_kinds.Domain | None:
    tokenizer = CharTokenizer("".join(texts) + train_part + val_part)
    splits = [
        Split(tokenizer.encode(part).astype(np.uint16), len(part.encode()))
        for part in (train_part, val_part)
    ]
    dataset = Dataset(tokenizer, splits[0], splits[1], None, {}, "")
    config: Any = SimpleNamespace(
        model=ModelConfig(block_size=1024).resolve(), data=DataConfig(**data)
    )
    run: Any = SimpleNamespace(config=config, record={"data": {"files": []}})
    return text_kinds.measure_domain(
        run, dataset, Model(config, tokenizer, engine_class(tokenizer, texts), 7), seconds
    )


@pytest.fixture(autouse=True)
def _shorter_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_kinds, "PYTHON_TEXT_BYTES", 160)
    # A scripted engine answers by row: no row may take over what another has read.
    monkeypatch.setattr(CacheRows, "_find_prefix", lambda rows, ids: (0, 0, None))


FUNCTIONS = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(300))
GARBAGE = "def )(:\n  ]] return x = = 3\n+ f{\n"


@pytest.mark.parametrize(
    ("texts", "share"),
    [([FUNCTIONS[:300]], 1.0), ([GARBAGE], 0.0), ([FUNCTIONS[:300], GARBAGE], 0.5)],
)
def test_a_model_that_writes_python_and_one_that_writes_garbage(
    texts: list[str], share: float
) -> None:
    domain = measure(texts, FUNCTIONS, FUNCTIONS, corpus="python")
    assert domain is not None
    assert domain.facts["kind"] == "python"
    assert domain.facts["parses"]["share"] == share
    assert domain.facts["broken"]["share"] == 1 - share
    assert (domain.facts["texts"], domain.facts["parses"]["of"]) == (20, 20)
    assert domain.facts["tokens"] == 160  # characters, of a byte each
    assert domain.facts["natural"]["parses"]["share"] == 1.0
    assert domain.facts["natural"]["texts"] == 100
    assert bool(domain.remark) == (share < 1)
    assert domain.rows[0][1].startswith(f"{share:.0%} (")


def test_garbage_in_natural_text_lowers_its_own_proportion() -> None:
    """Every second function of the natural text is invalid; the model's proportion stays."""
    half = "".join(f"def f{i}(x):\n    return x + {i}{')' * (i % 2)}\n\n\n" for i in range(300))
    natural = measure([FUNCTIONS[:300]], FUNCTIONS, half, corpus="python")
    assert natural is not None
    assert natural.facts["parses"]["share"] == 1.0
    assert natural.facts["natural"]["parses"]["share"] < 0.2  # each piece has several functions


def test_python_is_detected_by_its_corpus_and_by_its_files() -> None:
    def kind(corpus: str | None, **files: int) -> Any:
        listed = [
            {"path": f"/somewhere/{name.replace('_', '.')}", "bytes": size}
            for name, size in files.items()
        ]
        config = SimpleNamespace(data=DataConfig(corpus=corpus))  # type: ignore[arg-type]
        run: Any = SimpleNamespace(config=config, record={"data": {"files": listed}})
        return text_kinds.domain_kind(run, None)

    assert kind("python") == "python"
    assert kind("shakespeare", t_txt=9) is None
    assert kind(None, a_py=51, b_md=50) == "python"
    assert kind(None, a_py=50, b_md=50) is None
    assert kind(None) is None


def test_a_domain_that_cannot_be_measured_has_a_reason() -> None:
    slow = measure([FUNCTIONS], FUNCTIONS, FUNCTIONS, seconds=-1.0, corpus="python")
    short = measure([FUNCTIONS], FUNCTIONS, "def f(x):\n    return x\n", corpus="python")
    assert slow is not None
    assert short is not None
    assert slow.facts == {"kind": "python", "missing": text_kinds.TOO_SLOW}
    assert short.facts == {"kind": "python", "missing": text_kinds.TOO_SHORT}
    assert (
        measure(["abc"], "To be, or not to be, that is the question.\n" * 200, "Or so.\n" * 50)
        is None
    )


SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
KNOWN = [a + b for a in SYLLABLES[:40] for b in SYLLABLES[:20]]
UNSEEN = [a + b for a in SYLLABLES[:40] for b in SYLLABLES[20:25]]


def test_a_model_that_memorized_half_of_its_names() -> None:
    """Of eight names, four are known, one is unseen, two are invented and one has no end."""
    draw = random.Random(0)
    draw.shuffle(KNOWN)
    texts = [f"{name}\n" for name in [*KNOWN[:4], UNSEEN[7], "zuzu", "qqq"]] + ["a" * 60]
    domain = measure(texts, "\n".join(KNOWN) + "\n", "\n".join([*UNSEEN, *KNOWN[:50]]) + "\n")
    assert domain is not None
    facts = domain.facts
    assert facts["kind"] == "names"
    assert facts["texts"] == 200
    shares = {name: facts[name]["share"] for name in ("known", "unseen", "invented", "nothing")}
    assert shares == {"known": 4 / 8, "unseen": 1 / 8, "invented": 2 / 8, "nothing": 1 / 8}
    assert facts["examples"] == ["zuzu", "qqq"]
    assert facts["well_formed"]["of"] == 50
    assert facts["distinct"] == Proportion(7, 175).facts
    assert facts["natural"]["known"] == Proportion(50, 250).facts
    assert domain.examples == ("zuzu", "qqq")


class FlatEngine(ScriptedEngine):
    """All tokens are equally likely, or `logit` is NaN."""

    logit = 0.0

    def logits(self, tokens: Any, cache: Any, counts: Any, every: bool = False) -> Any:
        return np.full_like(super().logits(tokens, cache, counts), self.logit)


def test_no_text_is_written_twice() -> None:
    tokenizer = CharTokenizer("abcdefgh\n")
    config: Any = SimpleNamespace(model=ModelConfig(block_size=64).resolve())
    engine: Any = FlatEngine(tokenizer, ["a"])
    written = text_kinds.generate_texts(
        Model(config, tokenizer, engine, 0), "\n", 60, 30, "", math.inf
    )
    assert len(set(written)) == 60


def test_a_model_with_logits_that_are_not_finite_cannot_generate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FlatEngine, "logit", math.nan)
    domain = measure([FUNCTIONS], FUNCTIONS, FUNCTIONS, engine_class=FlatEngine, corpus="python")
    assert domain is not None
    assert "finite" in domain.facts["missing"]


# -- the command and the report --------------------------------------------------------------------


@pytest.fixture(scope="module")
def code_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "code.py").write_text(FUNCTIONS * 3, encoding="utf-8", newline="\n")
    train(folder / "code.py", folder / "run", max_steps=2, sample_interval=0, checkpoint_interval=2)
    return folder / "run"


@pytest.mark.usefixtures("no_figures")
def test_evaluate_and_the_report_show_the_same_numbers(
    code_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_kinds, "PYTHON_TEXTS", 4)
    monkeypatch.setattr(run_report, "MODEL_BUDGET_S", 0.1)
    assert cli.main(["evaluate", str(code_run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["domain"]
    assert facts["parses"]["of"] == 4
    assert facts["natural"]["parses"]["share"] == 1.0
    assert cli.main(["evaluate", str(code_run)]) == 0
    output = capsys.readouterr().out
    share = Proportion(facts["parses"]["count"], 4)
    assert f"parses, up to the cut                   {share}" in output
    assert "It took" in output
    page = Page(run_report.write(code_run).read_text(encoding="utf-8"))
    markdown = (code_run / "report.md").read_text(encoding="utf-8")
    for words in ("Does the model write valid Python?", "natural text", str(share)):
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
    hostile = text_kinds.Domain(
        "names",
        "What names?",
        method="so",
        header=("", "a", "b"),
        rows=(("x", "1", "2"),),
        remark="<script>",
        examples=("</pre><script>alert(1)</script>", "```", "\x1b[31m"),
    )
    monkeypatch.setattr(text_kinds, "measure_domain", lambda *arguments: hostile)
    monkeypatch.setattr(run_report, "MODEL_BUDGET_S", 0.1)
    page = Page(run_report.write(code_run).read_text(encoding="utf-8"))
    page.require_own_scripts()
    assert "</pre><script>alert(1)</script>\n```\n\u241b[31m" in page.text
    assert "````" in (code_run / "report.md").read_text(encoding="utf-8")
