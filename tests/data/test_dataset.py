"""Datasets: the split that everyone has, one build for many runs, and errors for unusable texts."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from glasslm.config.schema import DataConfig
from glasslm.data import dataset as dataset_module
from glasslm.data import tokenizers
from glasslm.data.cache import cache_dir
from glasslm.data.dataset import (
    Dataset,
    load_run_dataset,
    prepare_dataset,
    reopen_dataset,
    require_enough_tokens,
    tokenize_source,
)
from glasslm.data.sources import corpora
from glasslm.data.sources.text_files import Source, source_file
from glasslm.data.text_split import survey_text
from glasslm.data.tokenizers import SubwordTokenizer
from glasslm.errors import DamagedError, InputError


def quiet(message: str) -> None:
    pass


def source_of(folder: Path, text: str, name: str = "text.txt") -> Source:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return Source("text", (source_file(path),))


def prepare_text(folder: Path, text: str, data: DataConfig) -> Dataset:
    return prepare_dataset(data, source_of(folder, text), quiet)


def test_shakespeare_splits_as_everyone_has_it(data_dir: Path) -> None:
    source = Source("shakespeare", (source_file(data_dir / "tinyshakespeare.txt"),))
    text = (data_dir / "tinyshakespeare.txt").read_text(encoding="utf-8")
    dataset = prepare_dataset(DataConfig(), source, quiet)
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
    assert dataset.train.tokens[:].dtype == np.uint16
    assert dataset.tokenizer.decode(dataset.train.tokens[:]) == text[:1_003_854]
    assert dataset.tokenizer.decode(dataset.val.tokens[:]) == text[1_003_854:]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_the_second_run_reads_what_the_first_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    data = DataConfig(tokenizer=tokenizer, vocab_size=300, test_fraction=0.1)
    text = f"{tokenizer} äöü and so on, again and again\n" * 500
    first = prepare_text(tmp_path, text, data)
    monkeypatch.setattr(dataset_module, "_build_dataset", None)  # a second build would now fail
    second = prepare_text(tmp_path, text, data)
    third = prepare_dataset(data, source_of(tmp_path, text, "moved.txt"), quiet, second.tokenizer)
    for again in (second, third, reopen_dataset(data, first.sha256)):
        assert again is not None
        assert again.test is not None
        assert first.test is not None
        assert (again.sha256, again.tokenizer.sha256) == (first.sha256, first.tokenizer.sha256)
        assert first.train.tokens[:].tolist() == again.train.tokens[:].tolist()
        assert first.test.tokens[:].tolist() == again.test.tokens[:].tolist()
    assert third.facts["files"][0]["path"].endswith("moved.txt")
    joined = b"".join(
        first.tokenizer.decode(part.tokens[:]).encode()
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
        prepare_text(tmp_path, text, data).sha256
        for text in ("abc" * 50, "abd" * 50)
        for data in configs
    ]
    assert len(set(keys)) == 8


def test_tokens_that_dropout_drew_are_those_of_their_older_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the cat sat on the mat, and the dog sat on the cat. " * 40
    library = Library.from_str(tokenizers.train_bpe([text], 300).to_json())
    library.model.dropout = 0.5
    library.save(str(tmp_path / "tokenizer.json"))
    source = source_of(tmp_path, text)
    data = DataConfig(tokenizer=str(tmp_path / "tokenizer.json"), text_file=(source.files[0].path,))
    with monkeypatch.context() as older:
        older.setattr(SubwordTokenizer, "encoding_identity", SubwordTokenizer.sha256, False)
        old = prepare_dataset(data, source, quiet)
    for tokenizer in (None, old.tokenizer):
        assert prepare_dataset(data, source, quiet, tokenizer).sha256 != old.sha256
    assert load_run_dataset(data, old.facts, old.tokenizer, quiet).sha256 == old.sha256
    shutil.rmtree(cache_dir("tokens") / old.sha256)
    assert load_run_dataset(data, old.facts, old.tokenizer, quiet).old_sha256 == old.sha256
    with pytest.raises(DamagedError, match="has changed"):
        load_run_dataset(data, old.facts | {"sha256": "0" * 64}, old.tokenizer, quiet)


def test_bpe_is_trained_on_the_training_part_only(tmp_path: Path) -> None:
    data = DataConfig(tokenizer="bpe", vocab_size=300, val_fraction=0.5)
    train = "the cat sat on the mat. " * 100
    first = prepare_text(tmp_path, train + "x" * len(train), data)
    other = prepare_text(tmp_path, train + "zebra " * (len(train) // 6), data)
    assert first.tokenizer.sha256 == other.tokenizer.sha256


def test_a_vocabulary_that_cannot_be_reached_is_said_each_time(tmp_path: Path) -> None:
    data = DataConfig(tokenizer="bpe", vocab_size=5000)
    for _ in ("trained", "from the cache"):
        messages: list[str] = []
        dataset = prepare_dataset(data, source_of(tmp_path, "abcd " * 50), messages.append)
        assert dataset.tokenizer.vocab_size < 300
        (message,) = messages
        assert f"{dataset.tokenizer.vocab_size} tokens instead of the 5,000 of --vocab" in message
    enough = DataConfig(tokenizer="bpe", vocab_size=dataset.tokenizer.vocab_size)
    messages.clear()
    prepare_dataset(enough, source_of(tmp_path, "abcd " * 50), messages.append)
    assert messages == []


def test_a_large_text_trains_bpe_on_a_sample_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MAX_BPE_SAMPLE_BYTES", 20_000)
    monkeypatch.setattr(dataset_module, "PIECE_CHARACTERS", 1_000)
    text = "".join(f"chapter {i // 1000} " for i in range(20_000))
    messages: list[str] = []
    data = DataConfig(tokenizer="bpe", vocab_size=300)
    dataset = prepare_dataset(data, source_of(tmp_path, text), messages.append)
    assert any("evenly spaced" in message for message in messages)
    assert " chapter" in {
        token.decode("utf-8", "replace") for token in dataset.tokenizer.token_bytes
    }
    survey = survey_text(source_of(tmp_path, text), "strict")
    sample = "".join(dataset_module._sample_for_bpe(data, source_of(tmp_path, text), survey, quiet))
    assert 10_000 < len(sample) < 30_000
    assert {f"chapter {i} " in sample for i in range(17)} == {
        True
    }  # all of the training part, not its beginning


def test_a_wide_vocabulary_gets_wide_tokens(tmp_path: Path) -> None:
    text = "".join(chr(i) for i in range(0x20, 0xD800)) + "".join(
        chr(i) for i in range(0x10000, 0x14000)
    )
    dataset = prepare_text(tmp_path, text, DataConfig())
    assert dataset.tokenizer.vocab_size > 1 << 16
    assert dataset.val.tokens[:].dtype == np.uint32
    both = np.concatenate([dataset.train.tokens[:], dataset.val.tokens[:]])
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
        dataset = prepare_dataset(DataConfig(), source, quiet)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dataset.facts["train_bytes"] + dataset.facts["val_bytes"] == path.stat().st_size
    assert peak < 24e6


def test_tokenize_source_takes_bounded_memory_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    text = "".join(f"line {i} of a text, ümlaut included\n" for i in range(150_000))
    source = source_of(tmp_path, text)
    tokenizer = tokenizers.CharTokenizer(text)
    tracemalloc.start()
    try:
        ids = tokenize_source(source, tokenizer, "strict")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(text) > 5_000_000
    assert peak < 24e6  # the ids alone would take as much, as the tokenizer gives them
    assert ids.dtype == np.uint16
    assert tokenizer.decode(np.asarray(ids)) == text
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(tokenize_source(source_of(tmp_path, "", "empty.txt"), tokenizer, "strict")) == 0


def test_the_tokens_of_a_run_are_made_again_from_its_text_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(text_file=(str(tmp_path / "text.txt"),), tokenizer="bpe", vocab_size=260)
    with monkeypatch.context() as patch:
        patch.setenv("GLASSLM_CACHE", str(tmp_path / "first"))
        before = prepare_text(tmp_path, "the cat and the dog\n" * 60, data)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "second"))
    again = load_run_dataset(data, before.facts, before.tokenizer, quiet)
    assert (again.sha256, again.facts) == (before.sha256, before.facts)
    (tmp_path / "text.txt").unlink()
    assert (
        load_run_dataset(data, before.facts, before.tokenizer, quiet).sha256 == before.sha256
    )  # from the cache
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "third"))
    with pytest.raises(DamagedError, match="gone"):
        load_run_dataset(data, before.facts, before.tokenizer, quiet)


def test_a_named_corpus_that_has_changed_is_refused_with_both_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library does with every version of Python."""
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    sources = [
        source_of(tmp_path, "one " * 60, "one.txt"),
        source_of(tmp_path, "two " * 60, "two.txt"),
    ]
    monkeypatch.setattr(corpora, "find_source", lambda data, notify: sources.pop())
    data = DataConfig(corpus="python", tokenizer="byte")
    before = prepare_dataset(data, corpora.find_source(data, quiet), quiet)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        DamagedError, match=f"its sha256 was {before.sha256}, not [0-9a-f]{{64}}: put the"
    ):
        load_run_dataset(data, before.facts, before.tokenizer, quiet)


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
    dataset = prepare_text(tmp_path, text, DataConfig())
    with pytest.raises(InputError, match=says):
        require_enough_tokens(dataset, block, batch)


@pytest.mark.parametrize("letter", ["a", "\n", "é", "\0"])
def test_a_vocabulary_of_one_is_refused(letter: str, tmp_path: Path) -> None:
    """The loss of one token is always 0, and ratios to ln V divide by 0."""
    dataset = prepare_text(tmp_path, letter * 500, DataConfig())
    with pytest.raises(InputError, match=r"the single token .* nothing to predict") as caught:
        require_enough_tokens(dataset, 8)
    assert repr(letter) in str(caught.value)


def test_the_smallest_text_with_room_has_room(tmp_path: Path) -> None:
    dataset = prepare_text(tmp_path, "a" * 82 + "b" * 9, DataConfig())
    require_enough_tokens(dataset, 9, 81 - 9)
    for block, batch in ((10, 1), (9, 81 - 8)):
        with pytest.raises(InputError):
            require_enough_tokens(dataset, block, batch)


def test_an_unusable_tokenizer_is_refused_before_the_text_is_read(tmp_path: Path) -> None:
    source = Source("missing", (source_file(tokenizer_file(tmp_path)),))
    with pytest.raises(InputError, match="bpee"):
        prepare_dataset(DataConfig(tokenizer="bpee"), source, quiet)


def test_a_tokenizer_file_is_used_as_it_is(tmp_path: Path) -> None:
    dataset = prepare_text(
        tmp_path, "cabbage " * 40, DataConfig(tokenizer=str(tokenizer_file(tmp_path)))
    )
    assert (dataset.tokenizer.kind, dataset.tokenizer.vocab_size) == ("char", 26)


def tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(
        tokenizers.CharTokenizer(" abcdefghijklmnopqrstuvwxy").to_json(), encoding="utf-8"
    )
    return path
