"""Shards and batches: the split that everyone has, every window once, and the batch as a pure function of its place."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.schema import DataConfig
from glasslm.data import batch_sampler, shards, tokenizers
from glasslm.data.batch_sampler import Order
from glasslm.data.shards import Dataset
from glasslm.data.sources import corpora
from glasslm.data.sources.files import Source, source_file
from glasslm.errors import DamagedError, InputError


def quiet(message: str) -> None:
    pass


def source_of(folder: Path, text: str, name: str = "text.txt") -> Source:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return Source("text", (source_file(path),))


def prepared(folder: Path, text: str, data: DataConfig) -> Dataset:
    return shards.prepare(data, source_of(folder, text), quiet)


def test_shakespeare_splits_as_everyone_has_it(data_dir: Path) -> None:
    source = Source("shakespeare", (source_file(data_dir / "tinyshakespeare.txt"),))
    text = (data_dir / "tinyshakespeare.txt").read_text(encoding="utf-8")
    dataset = shards.prepare(DataConfig(), source, quiet)
    assert dataset.facts == {
        "files": [
            {
                "path": source.files[0].path,
                "bytes": 1_115_394,
                "sha256": source.files[0].sha256,
                "origin": "",
            }
        ],
        "train_tokens": 1_003_854,
        "val_tokens": 111_540,
        "train_bytes": 1_003_854,
        "val_bytes": 111_540,
        "sha256": dataset.sha256,
    }
    assert dataset.tokenizer.vocab_size == 65
    assert dataset.train.tokens.dtype == np.uint16
    assert dataset.tokenizer.decode(np.asarray(dataset.train.tokens)) == text[:1_003_854]
    assert dataset.tokenizer.decode(np.asarray(dataset.val.tokens)) == text[1_003_854:]


@given(
    text=st.text(min_size=1),
    val=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    test=st.sampled_from([0.0, 0.05, 0.09]),
    piece=st.integers(1, 5),
)
def test_parts_are_the_text_cut_at_the_characters_of_the_boundaries(
    tmp_path_factory: pytest.TempPathFactory, text: str, val: float, test: float, piece: int
) -> None:
    source = source_of(tmp_path_factory.mktemp("parts"), text)
    body = text.removeprefix("\ufeff").encode()  # a mark at the beginning of a file is not text
    data = DataConfig(val_fraction=val, test_fraction=test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glasslm.data.sources.files.CHUNK", piece + 2)
        pieces = list(shards.parts_of(source, data, len(body)))
    parts = {
        name: "".join(t for n, t in pieces if n == name).encode()
        for name in ("train", "val", "test")
    }
    assert parts["train"] + parts["val"] + parts["test"] == body
    nominal = round(len(body) * (100 - 100 * val - 100 * test)) // 100
    assert nominal - 4 < len(parts["train"]) <= nominal
    if not test:
        assert not parts["test"]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_the_second_run_reads_what_the_first_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    data = DataConfig(tokenizer=tokenizer, vocab_size=300, test_fraction=0.1)
    text = f"{tokenizer} äöü and so on, again and again\n" * 500
    first = prepared(tmp_path, text, data)
    monkeypatch.setattr(shards, "_build", None)  # a second build would now fail
    second = prepared(tmp_path, text, data)
    third = shards.prepare(data, source_of(tmp_path, text, "moved.txt"), quiet, second.tokenizer)
    for again in (second, third, shards.reopen(first.sha256)):
        assert again is not None
        assert again.test is not None
        assert first.test is not None
        assert (again.sha256, again.tokenizer.sha256) == (first.sha256, first.tokenizer.sha256)
        assert first.train.tokens.tolist() == again.train.tokens.tolist()
        assert first.test.tokens.tolist() == again.test.tokens.tolist()
    assert third.facts["files"][0]["path"].endswith("moved.txt")
    joined = b"".join(
        first.tokenizer.decode(np.asarray(part.tokens)).encode()
        for part in (first.train, first.val, first.test)
        if part
    )
    assert joined == text.encode()
    assert (
        first.facts["test_bytes"]
        == len(text.encode()) - first.facts["train_bytes"] - first.facts["val_bytes"]
    )


def test_identity_changes_with_text_split_and_tokenizer(tmp_path: Path) -> None:
    configs = [
        DataConfig(),
        DataConfig(val_fraction=0.2),
        DataConfig(tokenizer="byte"),
        DataConfig(test_fraction=0.1),
    ]
    keys = [
        prepared(tmp_path, text, data).sha256
        for text in ("abc" * 50, "abd" * 50)
        for data in configs
    ]
    assert len(set(keys)) == 8


def test_bpe_is_trained_on_the_training_part_only(tmp_path: Path) -> None:
    data = DataConfig(tokenizer="bpe", vocab_size=300, val_fraction=0.5)
    train = "the cat sat on the mat. " * 100
    one = prepared(tmp_path, train + "x" * len(train), data)
    other = prepared(tmp_path, train + "zebra " * (len(train) // 6), data)
    assert one.tokenizer.sha256 == other.tokenizer.sha256


def test_a_large_text_trains_bpe_on_a_sample_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BPE_SAMPLE", 20_000)
    monkeypatch.setattr(shards, "PIECE", 1_000)
    text = "".join(f"chapter {i // 1000} " for i in range(20_000))
    said: list[str] = []
    data = DataConfig(tokenizer="bpe", vocab_size=300)
    dataset = shards.prepare(data, source_of(tmp_path, text), said.append)
    assert any("evenly spaced" in message for message in said)
    assert " chapter" in {
        token.decode("utf-8", "replace") for token in dataset.tokenizer.token_bytes
    }
    known = shards.survey(source_of(tmp_path, text), "strict")
    sample = "".join(shards._bpe_sample(data, source_of(tmp_path, text), known, quiet))
    assert 10_000 < len(sample) < 30_000
    assert {f"chapter {i} " in sample for i in range(17)} == {
        True
    }  # all of the training part, not its beginning


def test_a_wide_vocabulary_gets_wide_tokens(tmp_path: Path) -> None:
    text = "".join(chr(i) for i in range(0x20, 0xD800)) + "".join(
        chr(i) for i in range(0x10000, 0x14000)
    )
    dataset = prepared(tmp_path, text, DataConfig())
    assert dataset.tokenizer.vocab_size > 1 << 16
    assert dataset.val.tokens.dtype == np.uint32
    both = np.concatenate([dataset.train.tokens, dataset.val.tokens])
    assert dataset.tokenizer.decode(both) == text


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(36):
            file.write(f"line {i} of a text that repeats itself\n" * 28_000)
    assert path.stat().st_size > 36e6
    source = Source("large", (source_file(path),))
    tracemalloc.start()
    try:
        dataset = shards.prepare(DataConfig(), source, quiet)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dataset.facts["train_bytes"] + dataset.facts["val_bytes"] == path.stat().st_size
    assert peak < 24e6


def test_a_text_by_itself_is_encoded_in_bounded_memory_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    text = "".join(f"line {i} of a text, ümlaut included\n" for i in range(150_000))
    source = source_of(tmp_path, text)
    tokenizer = tokenizers.CharTokenizer(text)
    tracemalloc.start()
    try:
        ids = shards.encoded(source, tokenizer, "strict")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(text) > 5_000_000
    assert peak < 24e6  # the ids alone would take as much, as the tokenizer gives them
    assert ids.dtype == np.uint16
    assert tokenizer.decode(np.asarray(ids)) == text
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(shards.encoded(source_of(tmp_path, "", "empty.txt"), tokenizer, "strict")) == 0


def test_the_tokens_of_a_run_are_made_again_from_its_text_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(text_file=(str(tmp_path / "text.txt"),), tokenizer="bpe", vocab_size=260)
    with monkeypatch.context() as patch:
        patch.setenv("GLASSLM_CACHE", str(tmp_path / "first"))
        before = prepared(tmp_path, "the cat and the dog\n" * 60, data)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "second"))
    again = shards.of_run(data, before.facts, before.tokenizer, quiet)
    assert (again.sha256, again.facts) == (before.sha256, before.facts)
    (tmp_path / "text.txt").unlink()
    assert (
        shards.of_run(data, before.facts, before.tokenizer, quiet).sha256 == before.sha256
    )  # from the cache
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "third"))
    with pytest.raises(DamagedError, match="gone"):
        shards.of_run(data, before.facts, before.tokenizer, quiet)


def test_a_named_corpus_that_has_changed_is_refused_with_both_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library does with every version of Python."""
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    found = [
        source_of(tmp_path, "one " * 60, "one.txt"),
        source_of(tmp_path, "two " * 60, "two.txt"),
    ]
    monkeypatch.setattr(corpora, "find", lambda data, say: found.pop())
    data = DataConfig(corpus="python", tokenizer="byte")
    before = shards.prepare(data, corpora.find(data, quiet), quiet)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        DamagedError, match=f"its sha256 was {before.sha256}, it is [0-9a-f]{{64}} now"
    ):
        shards.of_run(data, before.facts, before.tokenizer, quiet)


@pytest.mark.parametrize(
    ("text", "block", "batch", "says"),
    [
        (
            "a",
            8,
            1,
            r"training part has 0 tokens \(0 bytes\), but a window of --block-size 8 takes 9",
        ),
        ("abcdefghij" * 5, 8, 1, "validation part has 5 tokens .* larger --val-fraction"),
        (
            "abcdefghij" * 10,
            8,
            100,
            "90 tokens, which make 82 different windows .* but a batch takes 100",
        ),
    ],
)
def test_a_text_too_short_says_how_short(
    tmp_path: Path, text: str, block: int, batch: int, says: str
) -> None:
    dataset = prepared(tmp_path, text, DataConfig())
    with pytest.raises(InputError, match=says):
        shards.require_room(dataset, block, batch)


def test_the_smallest_text_with_room_has_room(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, "a" * 82 + "b" * 9, DataConfig())
    shards.require_room(dataset, 9, 81 - 9)
    for block, batch in ((10, 1), (9, 81 - 8)):
        with pytest.raises(InputError):
            shards.require_room(dataset, block, batch)


@given(
    n_tokens=st.integers(2, 200),
    block=st.integers(1, 40),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 3),
)
def test_an_epoch_visits_every_window_once(
    n_tokens: int, block: int, batch: int, seed: int, first: int
) -> None:
    block = min(block, n_tokens - 1)
    order = Order(n_tokens, block, batch, seed, epochs=True)
    per_epoch = (n_tokens - 1) // block
    samples = np.arange(
        first * per_epoch, (first + 1) * per_epoch
    )  # of one epoch, which steps need not begin
    starts = np.array([order.starts(int(g) // batch, np.array([g % batch]))[0] for g in samples])
    assert sorted(starts - starts.min()) == [i * block for i in range(per_epoch)]
    assert starts.min() >= 0
    assert starts.max() + block + 1 <= n_tokens


@given(
    n=st.integers(3, 10**7),
    step=st.integers(0, 10**6),
    rows=st.lists(st.integers(0, 15), min_size=1),
    seed=st.integers(0, 2**63),
    epochs=st.booleans(),
)
def test_a_row_depends_on_nothing_but_seed_step_and_row(
    n: int, step: int, rows: list[int], seed: int, epochs: bool
) -> None:
    block = min(7, n - 1)
    everything = Order(n, block, 16, seed, epochs).starts(step, np.arange(16))
    some = Order(n, block, 16, seed, epochs).starts(step, np.array(rows))
    assert some.tolist() == everything[rows].tolist()
    assert everything.min() >= 0
    assert everything.max() + block + 1 <= n


def test_batches_are_windows_and_their_successors() -> None:
    numbers = np.arange(1000, dtype=np.uint16)
    for epochs in (False, True):
        order = Order(1000, 9, 4, 5, epochs)
        inputs, targets = order.batch(numbers, 3, range(4))
        assert inputs.shape == targets.shape == (4, 9)
        assert inputs.dtype == targets.dtype == np.int64
        assert (targets == inputs + 1).all()
        assert (np.diff(inputs) == 1).all()
        assert inputs[:, 0].tolist() == order.starts(3, np.arange(4)).tolist()
        assert inputs.tolist() != order.batch(numbers, 4, range(4))[0].tolist()
        assert (
            inputs.tolist() != Order(1000, 9, 4, 6, epochs).batch(numbers, 3, range(4))[0].tolist()
        )


def test_random_starts_are_uniform_over_every_start() -> None:
    order = Order(14, 4, 1000, 0, epochs=False)
    counts = np.bincount(
        np.concatenate([order.starts(step, np.arange(1000)) for step in range(20)])
    )
    expected = 20_000 / 10  # starts 0 to 9
    assert len(counts) == 10
    assert (
        ((counts - expected) ** 2) / expected
    ).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_epochs_differ_in_order_and_phase() -> None:
    order = Order(10_007, 10, 10, 0, epochs=True)
    passes = [order.starts(0, np.arange(order.windows) + e * order.windows) for e in range(8)]
    assert len({tuple(starts) for starts in passes}) == 8
    assert len({int(starts.min()) for starts in passes}) > 1
    for starts in passes:  # neighbours in the text are not neighbours in the order
        assert (np.abs(np.diff(starts)) == 10).mean() < 0.02
        assert abs(np.corrcoef(np.arange(len(starts)), starts)[0, 1]) < 0.15


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permuted_is_a_bijection(n: int, seed: int) -> None:
    keys = np.random.Philox(key=[seed, 0]).random_raw(shards.ROUNDS)
    assert sorted(batch_sampler.permuted(np.arange(n), n, keys)) == list(range(n))


def test_steps_and_epochs_count_alike() -> None:
    order = Order(1001, 10, 16, 0, epochs=True)  # 100 windows
    assert order.steps_for(1) == math.ceil(100 / 16)
    assert order.steps_for(1.1) == math.ceil(110 / 16)
    assert order.steps_for(0.16) == 1
    assert order.steps_for(1.12) == 7
    assert order.epoch(25) == 4.0


def test_an_unusable_tokenizer_is_refused_before_the_text_is_read(tmp_path: Path) -> None:
    source = Source("missing", (source_file(tokenizer_file(tmp_path)),))
    with pytest.raises(InputError, match="bpee"):
        shards.prepare(DataConfig(tokenizer="bpee"), source, quiet)


def test_a_tokenizer_file_is_used_as_it_is(tmp_path: Path) -> None:
    dataset = prepared(
        tmp_path, "cabbage " * 40, DataConfig(tokenizer=str(tokenizer_file(tmp_path)))
    )
    assert (dataset.tokenizer.kind, dataset.tokenizer.vocab_size) == ("char", 26)


def tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(
        tokenizers.CharTokenizer(" abcdefghijklmnopqrstuvwxy").to_json(), encoding="utf-8"
    )
    return path
