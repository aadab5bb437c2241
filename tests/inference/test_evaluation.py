"""Evaluation: every token but the first predicted once, bytes of exactly these, sums as by hand."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import glasslm.cli
import small_runs
from doubles import HistoryEngine, make_run
from glasslm.config.schema import DataConfig, ModelConfig
from glasslm.data.chat.conversation_rows import Conversations
from glasslm.data.dataset import Split, prepare_dataset
from glasslm.data.sources import corpora
from glasslm.data.tokenizers import CharTokenizer
from glasslm.errors import InputError
from glasslm.inference.evaluation import (
    TextWindows,
    evaluate,
    evaluate_windows,
    iterate_windows,
    standard_error,
)
from glasslm.inference.exact_answers import score_own_text


class UniformEngine:
    """Knows nothing: every token costs log V nats. Remembers what it was asked."""

    def __init__(self, vocab_size):
        self.vocab_size, self.asked = vocab_size, []

    def losses(self, inputs, targets):
        self.asked.append((inputs.copy(), targets.copy()))
        return np.where(targets >= 0, math.log(self.vocab_size), 0.0).astype(np.float32)


@given(
    st.integers(2, 200),
    st.integers(1, 30),
    st.integers(1, 9),
    st.sampled_from([np.uint16, np.uint32]),
)
def test_every_token_but_the_first_is_predicted_once_in_its_place(n, block_size, rows, dtype):
    text = np.arange(n, dtype=dtype)  # each token names its own place
    engine = UniformEngine(n)
    score = evaluate(engine, text, np.ones(n, np.int64), block_size, rows=rows)
    predicted = np.concatenate([targets[targets >= 0] for _, targets in engine.asked])
    assert predicted.tolist() == list(range(1, n))
    for inputs, targets in engine.asked:
        assert inputs.shape == targets.shape
        assert inputs.dtype == np.int64
        assert len(inputs) <= rows
        assert inputs.shape[1] <= block_size
        assert (inputs[targets >= 0] == targets[targets >= 0] - 1).all()
        assert ((inputs >= 0) & (inputs < n)).all()
    assert score.whole
    assert score.tokens == score.bytes == n - 1
    assert score.loss == pytest.approx(math.log(n), rel=1e-6)
    assert score.perplexity == pytest.approx(n, rel=1e-5)
    assert score.bpb == pytest.approx(math.log2(n), rel=1e-6)


def test_bits_per_byte_count_the_bytes_of_the_predicted_tokens_only():
    """A uniform model of 4 tokens spends 2 bits on each.

    The first token's 100 bytes are not predicted.
    """
    lengths = np.array([100, 1, 2, 5])
    score = evaluate(UniformEngine(4), np.array([0, 1, 2, 3, 3]), lengths, 3)
    assert score.bytes == 13
    assert score.bpb == pytest.approx(8 / 13)
    assert math.isnan(evaluate(UniformEngine(2), np.array([0, 1]), np.array([1, 0]), 3).bpb)


@given(st.integers(2, 120), st.integers(1, 10), st.integers(1, 8))
@settings(deadline=None, max_examples=30)
def test_the_loss_is_that_of_each_window_by_itself(n, block_size, rows):
    engine = HistoryEngine(5)
    text = np.random.default_rng(n).integers(0, 5, n).astype(np.uint16)
    by_hand = []
    for at in range(1, n):
        start = (at - 1) // block_size * block_size
        logits = engine.after(text[start:at]).astype(np.float64)
        by_hand.append(np.log(np.exp(logits).sum()) - logits[text[at]])
    score = evaluate(engine, text, np.ones(5, np.int64), block_size, rows=rows)
    assert score.loss == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_the_error_of_a_sample_is_that_of_the_mean_over_windows():
    """Samples of windows miss the loss of the whole by about as much as their errors say."""
    engine = HistoryEngine(5)
    text = np.random.default_rng(1).integers(0, 5, 4001).astype(np.uint16)
    lengths = np.ones(5, np.int64)
    whole = evaluate(engine, text, lengths, 4)
    assert whole.stderr is None
    losses = [evaluate(engine, text[i : i + 5], lengths, 4).loss for i in range(0, 4000, 4)]
    n = 100
    sample = evaluate(engine, text, lengths, 4, max_windows=n)
    chosen = np.array(losses)[np.arange(n) * 1000 // n]
    assert sample.loss == pytest.approx(chosen.mean(), rel=1e-6)
    error = chosen.std(ddof=1) / math.sqrt(n) * math.sqrt(1 - n / 1000)
    assert sample.stderr == pytest.approx(error, rel=1e-5)
    assert abs(sample.loss - whole.loss) < 4 * sample.stderr
    assert evaluate(engine, text, lengths, 4, max_windows=1).stderr is None


def test_the_error_of_windows_of_unequal_length_is_that_of_a_ratio():
    """Long windows count more in the loss, so the spread of the windows' means is not its error."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 60, 1000)
    nats = counts * (2 + 10 / counts) + np.sqrt(counts) * rng.standard_normal(1000)
    chosen = [rng.choice(1000, 100, replace=False) for _ in range(500)]
    losses = [nats[i].sum() / counts[i].sum() for i in chosen]
    errors = [standard_error(nats[i], counts[i], 1000) for i in chosen]
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.1)


def test_targets_are_counted_once_for_all_batches():
    counted = []

    class CountedWindows(TextWindows):
        @property
        def n_targets(self):
            counted.append(1)
            return super().n_targets

    windows = CountedWindows(np.arange(101), 10)
    n_windows = len(windows)
    counted.clear()
    score = evaluate_windows(UniformEngine(101), windows, np.ones(101, np.int64), rows=1)
    assert (n_windows, score.tokens) == (10, 100)
    assert len(counted) == 2  # once more for the length of the windows


def test_a_sample_is_fixed_evenly_spaced_and_says_so():
    n, block_size = 1001, 10
    text = np.arange(n)
    engine = UniformEngine(n)
    score = evaluate(engine, text, np.ones(n, np.int64), block_size, rows=4, max_windows=20)
    starts = np.concatenate([inputs[:, 0] for inputs, _ in engine.asked])
    assert starts.tolist() == list(range(0, 1000, 50))
    assert (score.whole, score.tokens) == (False, 200)
    assert evaluate(UniformEngine(n), text, np.ones(n, np.int64), block_size, max_windows=100).whole
    uneven = np.concatenate(
        [
            i[:, 0]
            for i, _ in iterate_windows(TextWindows(np.arange(72), 10), np.arange(3) * 8 // 3, 2)
        ]
    )
    assert uneven.tolist() == [0, 20, 50]


def test_sums_are_float64():
    """2^25 tokens would not add up in float32; here large and small losses stand in for many."""

    class Engine:
        def losses(self, inputs, targets):
            return np.where(inputs == 0, np.float32(2.0**24), np.float32(1.0))

    text = np.array([0] + [1] * 64)
    score = evaluate(Engine(), text, np.ones(2, np.int64), 8, rows=2)
    assert score.loss * 64 == 2.0**24 + 63


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_a_diverged_model_has_a_score(bad):
    class Engine:
        def losses(self, inputs, targets):
            return np.full(targets.shape, bad, np.float32)

    score = evaluate(Engine(), np.arange(4), np.ones(4, np.int64), 8)
    assert math.isnan(score.perplexity) if math.isnan(bad) else score.perplexity == math.inf


@pytest.mark.parametrize("n", [0, 1])
def test_too_short_a_text_is_refused(n):
    with pytest.raises(InputError, match="at least 2"):
        evaluate(UniformEngine(3), np.zeros(n, np.uint16), np.ones(3, np.int64), 8)


def test_answers_behind_the_context_are_counted_and_named():
    """Two conversations of 4 and 9 tokens, of which the second half is the answer."""
    starts, marks = np.array([0, 4, 13]), np.array([0] * 2 + [1] * 2 + [0] * 5 + [1] * 4, np.uint8)
    split = Split(np.arange(13), 13, Conversations(starts, marks, -1))

    def score(context):
        config = SimpleNamespace(data=DataConfig(), model=ModelConfig(block_size=context))
        tokenizer = SimpleNamespace(scored_bytes=np.ones(13, np.int64))
        model = SimpleNamespace(config=config, tokenizer=tokenizer, engine=UniformEngine(13))
        return score_own_text(model, split, notes.append)

    notes = []
    assert score(8)[3:6] == (6, 6, True)
    assert notes == []
    assert score(6)[3:6] == (4, 4, False)
    (note,) = notes
    assert "2 of 6 tokens of answers lie behind the context of 6 and are not scored" in note
    with pytest.raises(InputError, match="behind the context of 1 token: give a larger --context"):
        score(1)


def test_the_command_scores_files_and_splits(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    corpus, other = tmp_path / "corpus.txt", tmp_path / "other.txt"
    text = "abc abd\n" * 60
    corpus.write_bytes(text.encode())
    other.write_bytes(b"abba cad\n")
    data = DataConfig(text_file=(str(corpus),))
    prepared = prepare_dataset(data, corpora.find_source(data, print), print)
    run = make_run(tmp_path / "run", text, prepared.sha256)
    capsys.readouterr()

    assert glasslm.cli.main(["evaluate", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tokens"], result["whole"], result["text"], result["step"]) == (
        47,
        True,
        "val",
        0,
    )
    assert result["bpb"] == pytest.approx(
        result["loss"] / math.log(2), rel=1e-9
    )  # one byte a character
    assert {"unigram_bpb", "gzip_bpb", "perplexity", "bytes"} <= set(result)

    assert glasslm.cli.main(["evaluate", str(run), "--text-file", str(other)]) == 0
    out = capsys.readouterr().out
    assert "8 tokens, 8 bytes" in out
    assert "bits per byte" in out

    other.write_text("abba cäd", encoding="utf-8")
    assert glasslm.cli.main(["evaluate", str(run), "--text-file", str(other)]) == 2
    assert "U+00E4" in capsys.readouterr().err
    assert glasslm.cli.main(["evaluate", str(run), "--split", "test"]) == 2
    assert "--test-fraction" in capsys.readouterr().err
    assert (
        glasslm.cli.main(["evaluate", str(run), "--split", "val", "--text-file", str(other)]) == 2
    )
    assert "choose one" in capsys.readouterr().err


@pytest.mark.parametrize("piped", [False, True])
def test_the_text_of_a_run_is_found_again_from_anywhere(tmp_path, capsys, monkeypatch, piped):
    """The run was given a relative path or standard input; the cache has lost its tokens since."""
    text = small_runs.write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    with open("text.txt", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        small_runs.train(
            text, tmp_path / "run", text_file=("-",) if piped else ("text.txt",), max_steps=1
        )
    monkeypatch.setattr(sys, "stdin", None)
    command = ["evaluate", str(tmp_path / "run"), "--json"]
    assert glasslm.cli.main(command) == 0
    first_output = capsys.readouterr().out
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "new cache"))
    monkeypatch.chdir(tmp_path / "run")
    assert glasslm.cli.main(command) == 0
    assert capsys.readouterr().out == first_output
    for cache in ("cache", "new cache"):
        shutil.rmtree(tmp_path / cache)
    text.write_bytes(text.read_bytes().replace(b"king", b"sing"))
    assert glasslm.cli.main(command) == 4
    assert (
        "a copy of what came through a pipe" if piped else "text.txt has changed"
    ) in capsys.readouterr().err


def test_shakespeare_is_no_longer_than_its_file(data_dir):
    """The course's text, scored by a model of 65 equal symbols: log2(65) bits per byte."""
    text = (data_dir / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = CharTokenizer(text)
    score = evaluate(
        UniformEngine(65), tokenizer.encode(text), tokenizer.byte_lengths, 128, rows=64
    )
    assert (score.tokens, score.bytes) == (1_115_393, 1_115_393)
    assert score.bpb == pytest.approx(math.log2(65), rel=1e-6)
