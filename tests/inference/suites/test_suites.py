"""Suites with planted models: one that knows the rule passes, one that breaks it fails."""

from __future__ import annotations

import json
import math
import shutil
import string
from types import SimpleNamespace

import numpy as np
import pytest

from glasslm import cli
from glasslm.config.schema import ModelConfig
from glasslm.data.dataset import Dataset, Split
from glasslm.data.ngram_model import text_nats
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.protocol import NO_TARGET
from glasslm.errors import InputError
from glasslm.inference.suites.copying import measure_copying
from glasslm.inference.suites.grammar import measure_grammar, sum_nats
from glasslm.inference.suites.induction import measure_induction
from glasslm.inference.suites.minimal_pairs import CATEGORIES, make_pairs
from glasslm.inference.suites.random_texts import repeated_tokens
from glasslm.inference.suites.suite_result import SuiteResult, read_results, save_result
from glasslm.inference.suites.vocabulary import Vocabulary
from small_runs import train, write_text

LETTERS = string.ascii_letters + "\n"
NOUNS = ("king", "lord", "house", "sword", "hand", "word", "day", "friend", "eye", "arm")
PROSE = "\n".join(
    f"the {noun} is {adjective}, and the {noun}s are {adjective}. this {noun} of these {noun}s "
    f"goes; the {noun} was there; those {noun}s were in the {noun}. a {noun} has an arm, "
    f"his {noun}s have it."
    for noun in NOUNS
    for adjective in ("old", "red", "sad", "dead")
)
FUNCTIONS = ("read", "write", "close", "flush", "seek", "tell", "find", "split", "strip", "join")
CODE = "\n".join(
    f"    def {name}(self):\n        return len(self) + {name}('{name}')[0] + min(\"{name}\") - "
    f"open(self)\n    x = {name}(self)"
    for name in FUNCTIONS
    for _ in range(4)
)


def make_dataset(text: str) -> Dataset:
    tokenizer = CharTokenizer("".join(sorted(set(text) | {"\n"})))
    tokens = tokenizer.encode(text)
    split = Split(tokens, len(text))
    return Dataset(tokenizer, split, split, None, {}, "")


class Judge:
    """An engine that finds the right texts of all pairs likelier; with -1 the wrong ones."""

    def __init__(self, dataset: Dataset, sign: int = 1) -> None:
        self.decode, self.sign = dataset.tokenizer.decode, sign
        vocabulary = Vocabulary(self.decode(dataset.train.tokens))
        self.right = {pair.right for c in CATEGORIES for pair in make_pairs(vocabulary, c)}

    def losses(self, tokens, targets):
        texts = [self.decode(row[row != NO_TARGET]) for row in targets]
        is_likely = np.array([text in self.right for text in texts]) == (self.sign > 0)
        return (targets != NO_TARGET) * np.where(is_likely, 1.0, 2.0)[:, None]


class Copier:
    """An engine that attends to the token after the last copy, and predicts it."""

    def __init__(self, vocab_size: int, copies: bool = True) -> None:
        self.vocab_size, self.copies = vocab_size, copies

    def new_cache(self, rows, capacity):
        return None

    def places(self, row):
        """For each position the place after the last earlier copy; its own place without one."""
        last, places = {}, []
        for t, token in enumerate(row.tolist()):
            places.append(last.get(token, t - 1) + 1)
            last[token] = t
        return places

    def logits(self, tokens, cache, counts, every=False):
        logits = np.zeros((*tokens.shape, self.vocab_size))
        for b, row in enumerate(tokens):
            for t, place in enumerate(self.places(row)):
                if place < t or not self.copies:
                    logits[b, t, row[place] if self.copies else 0] = 9.0
        return logits

    def losses(self, tokens, targets):
        logits = self.logits(tokens, None, None, every=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]

    def inspect(self, batch, names):
        B, T = batch.tokens.shape
        weights = np.zeros((B, 2, T, T))
        for b, row in enumerate(batch.tokens):
            weights[b, 0, range(T), self.places(row)] = 1
            weights[b, 1, range(T), np.maximum(0, np.arange(T) - 1)] = 1
        return dict.fromkeys(names, weights)


def make_model(engine, dataset: Dataset, block_size: int = 64):
    config = SimpleNamespace(model=ModelConfig(block_size=block_size, n_layers=1, n_heads=2))
    return SimpleNamespace(engine=engine, tokenizer=dataset.tokenizer, config=config, step=7)


# -- grammar ---------------------------------------------------------------------------------------


def test_a_model_that_knows_the_rules_passes_and_the_opposite_fails():
    dataset = make_dataset(PROSE)
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        result = measure_grammar(make_model(Judge(dataset, sign), dataset), dataset)
        names = set(result.facts) - {"ngram_order", "left_out"}
        assert {"agreement", "attraction", "number", "order"} <= names
        assert {result.facts[name]["model"]["share"] for name in names} == {expected}
    assert set(result.facts["left_out"]) == {"pronouns", "brackets", "quotes", "colons"}
    assert "brackets (needs words before an opening bracket)" in result.remark
    assert [row[0] for row in result.rows] == [c.name for c in CATEGORIES if c.name in names]


def test_ngrams_are_judged_by_their_own_nats():
    """Of each pair alone, by the order that is named."""
    dataset = make_dataset(PROSE)
    result = measure_grammar(make_model(Judge(dataset), dataset), dataset)
    order, train = result.facts["ngram_order"], PROSE.encode()
    (category,) = [c for c in CATEGORIES if c.name == "number"]
    right = [
        np.subtract(*text_nats(train, [text.encode() for text in pair])[order - 1]) < 0
        for pair in make_pairs(Vocabulary(PROSE), category)
    ]
    facts = result.facts["number"]["ngrams"]
    assert (facts["count"], facts["of"]) == (sum(right), len(right))


def test_code_is_judged_by_brackets_quotes_and_colons():
    dataset = make_dataset(CODE)
    result = measure_grammar(make_model(Judge(dataset), dataset), dataset)
    assert set(result.facts) == {"brackets", "quotes", "colons", "ngram_order", "left_out"}


def test_every_pair_differs_and_is_made_of_known_words():
    for text in (PROSE, CODE):
        vocabulary = Vocabulary(text)
        for category in CATEGORIES:
            for right, wrong in make_pairs(vocabulary, category):
                assert right != wrong
                words = set(Vocabulary(right + " " + wrong).counts) - {"x"}
                assert words <= set(vocabulary.counts), (category.name, right, wrong)


def test_nouns_are_found_in_both_forms():
    pairs = Vocabulary(PROSE).noun_pairs
    assert set(pairs) == {(noun, f"{noun}s") for noun in NOUNS}


def test_a_text_without_words_is_refused():
    dataset = make_dataset("01101001 " * 40)
    with pytest.raises(InputError, match=r"the training text lacks nouns in singular"):
        measure_grammar(make_model(Judge(dataset), dataset), dataset)


def test_nats_are_those_of_each_text_alone():
    dataset = make_dataset(PROSE)
    engine = Copier(dataset.tokenizer.vocab_size)
    texts = ["the king is", "a sad", "these swords of these kings"]
    model = make_model(engine, dataset)
    alone = [sum_nats(model, [text])[0] for text in texts]
    assert len(set(alone)) == 3
    engine.losses = lambda tokens, targets: np.where(targets == NO_TARGET, 0.0, targets + 1.0)
    expected = [sum(dataset.tokenizer.encode(text) + 1.0) for text in texts]
    np.testing.assert_allclose(sum_nats(model, texts), expected)


def test_a_context_that_is_too_short_is_refused():
    dataset = make_dataset(PROSE)
    with pytest.raises(InputError, match="the context of this run is 8"):
        measure_grammar(make_model(Judge(dataset), dataset, block_size=8), dataset)


# -- induction and copying -------------------------------------------------------------------------


def test_a_model_that_copies_has_induction_and_a_model_that_does_not_has_none():
    dataset = make_dataset(LETTERS * 20)
    V = dataset.tokenizer.vocab_size
    result = measure_induction(make_model(Copier(V), dataset, 16), dataset)
    assert result.facts["gain"] > 1.5
    assert result.facts["best_heads"]["induction"]["head"] == 0
    assert result.facts["best_heads"]["induction"]["score"] > 0.5  # of all copies, also by chance
    assert result.facts["best_heads"]["previous_token"] == {"layer": 0, "head": 1, "score": 1.0}
    other = measure_induction(make_model(Copier(V, copies=False), dataset, 16), dataset)
    assert abs(other.facts["gain"]) < 0.5


def test_lengths_are_copied_by_the_model_that_copies_alone():
    dataset = make_dataset(LETTERS * 20)
    V = dataset.tokenizer.vocab_size
    shares = {
        copies: measure_copying(make_model(Copier(V, copies), dataset), dataset).facts["4"]
        for copies in (True, False)
    }
    assert shares[True]["tokens"]["share"] > 0.8
    assert shares[False]["tokens"]["share"] < 0.2
    assert shares[False]["sequences"]["count"] == 0


def test_random_texts_are_written_twice_and_are_a_function_of_the_seed():
    known = np.array([3, 5, 9])
    first = repeated_tokens(known, 6, 4, seed=1)
    assert (first[:, :6] == first[:, 6:]).all()
    assert set(first.ravel().tolist()) <= {3, 5, 9}
    assert (first == repeated_tokens(known, 6, 4, seed=1)).all()
    assert (first != repeated_tokens(known, 6, 4, seed=2)).any()


def test_a_small_vocabulary_is_refused():
    dataset = make_dataset("abc" * 50)
    model = make_model(Copier(4), dataset)
    for measure in (measure_copying, measure_induction):
        with pytest.raises(InputError, match="expected 8 for random sequences"):
            measure(model, dataset)


# -- results in the run ----------------------------------------------------------------------------


def test_results_are_read_as_they_were_saved(tmp_path):
    result = SuiteResult(
        "copying", "How?", "So.", ("a", "b"), (("1", "2"),), 5, facts={"x": math.nan}
    )
    save_result(result, tmp_path)
    (read,) = read_results(tmp_path)
    assert read.rows == result.rows
    assert read.facts == {"x": None}
    assert read_results(tmp_path / "nothing") == []


def test_a_suite_stands_in_the_report_of_the_run(tmp_path, capsys):
    folder = train(write_text(tmp_path / "text.txt"), tmp_path / "run", max_steps=2).run_dir
    run = str(folder)
    assert cli.main(["evaluate", run, "--suite", "induction", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["suite"] == "induction"
    assert len(facts["scores"]["induction"]) == 2  # layers
    (saved,) = (folder / "suites").iterdir()
    content = saved.read_bytes()
    assert cli.main(["evaluate", run, "--suite", "induction", "--context", "12"]) == 0
    captured = capsys.readouterr()
    assert "texts of 6 random tokens" in captured.out
    assert "not saved in the run: leave out --ops, --context" in captured.err
    assert saved.read_bytes() == content
    assert cli.main(["report", run]) == 0
    for name in ("report.md", "report.html"):
        page = (folder / name).read_text(encoding="utf-8")
        assert "Does the model use what it has just read?" in page
    assert cli.main(["evaluate", run, "--suite", "copying", "--text-file", "x"]) == 2
    assert "leave out --text-file" in capsys.readouterr().err
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    imported = {"from": "x", "model_type": "llama", "sha256": {}}
    record |= {"imported": imported}  # as `glasslm import` writes it
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(folder / "checkpoints")  # they have the hash of run.json
    assert cli.main(["evaluate", run, "--suite", "copying"]) == 2
    assert "was imported without it: leave out --suite" in capsys.readouterr().err
