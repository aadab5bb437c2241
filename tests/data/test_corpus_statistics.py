"""Statistics of a text, against direct counts; and the commands `glasslm corpus`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm import cli
from glasslm.config.data_config import TaskCorpus
from glasslm.config.schema import DataConfig
from glasslm.data import corpus_statistics
from glasslm.data.corpus_statistics import WINDOW_CHARACTERS, hash_character_windows
from glasslm.data.dataset import prepare_dataset
from glasslm.data.sources import corpora

RUSSIAN = "Съешь ещё этих мягких французских булок, да выпей чаю.\n"
ENGLISH = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n"


def measure(path: Path, **settings: Any) -> dict[str, Any]:
    data = DataConfig(text_file=(str(path),), **settings)
    source = corpora.find_source(data, lambda message: None)
    dataset = prepare_dataset(data, source, lambda message: None)
    return corpus_statistics.measure_corpus(data, source, dataset)


@given(text=st.text("abé", max_size=140))
def test_window_hashes_are_equal_exactly_where_windows_are(text: str) -> None:
    windows = [text[i : i + WINDOW_CHARACTERS] for i in range(len(text) - WINDOW_CHARACTERS + 1)]
    hashes = hash_character_windows(text).tolist()
    assert len(hashes) == len(windows)
    assert len(set(zip(windows, hashes))) == len(set(windows)) == len(set(hashes))


def test_duplicates_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lines and windows lie across pieces of this size.
    monkeypatch.setattr(corpus_statistics, "PIECE_CHARACTERS", 100)
    train = [f"training line number {i} of this text\n" for i in range(180)]
    val = [train[i] if i % 4 == 0 else f"a line of validation, number {i:3}\n" for i in range(20)]
    text = "".join(train + val)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="")
    fraction = round(sum(map(len, val)) / len(text), 6)
    duplicates = measure(tmp_path / "text.txt", val_fraction=fraction)["duplicates"]
    # The split is within a character of the first line.
    assert duplicates["lines"] == pytest.approx(5 / 20, abs=0.06)
    part = text[int((1 - fraction) * len(text)) :]
    windows = [part[i : i + 50] for i in range(0, len(part) - 49, 50)]
    expected = sum(window in "".join(train) for window in windows) / len(windows)
    assert duplicates["windows"] == pytest.approx(expected, abs=1.01 / len(windows))
    assert duplicates["share_of_training_text"] == 1


def test_a_repeated_text_is_all_duplicates(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(ENGLISH * 300, encoding="utf-8")
    assert measure(tmp_path / "text.txt")["duplicates"]["windows"] == 1


def test_compression_is_measured_by_script_and_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text(ENGLISH * 50, encoding="utf-8", newline="")
    (tmp_path / "ru.md").write_text(RUSSIAN * 50, encoding="utf-8", newline="")
    facts = measure(tmp_path, tokenizer="byte")
    scripts = {row["script"]: row for row in facts["by_script"]}
    assert set(scripts) == {"LATIN", "CYRILLIC"}
    assert scripts["LATIN"]["characters_per_token"] == 1
    assert scripts["CYRILLIC"]["characters_per_token"] == pytest.approx(
        len(RUSSIAN) / len(RUSSIAN.encode())
    )
    suffixes = {row["suffix"]: row for row in facts["by_suffix"]}
    assert suffixes[".md"]["characters"] == 50 * len(RUSSIAN)
    assert suffixes[".md"]["characters_per_token"] == scripts["CYRILLIC"]["characters_per_token"]
    assert facts["bytes"] == facts["tokens"] == 50 * len((RUSSIAN + ENGLISH).encode()) + 2


def test_special_tokens_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_statistics, "SUFFIX_SAMPLE_CHARACTERS", 50)
    monkeypatch.setattr(corpus_statistics, "PIECE_CHARACTERS", 50)
    documents = [ENGLISH.rstrip("\n."), RUSSIAN[:44]]  # without the signs of the special token
    for suffix, text in zip(("txt", "md"), documents):
        (tmp_path / f"a.{suffix}").write_text("\n\n".join([text] * 40), encoding="utf-8")
    text = "".join(documents * 40)
    facts = measure(tmp_path, special_tokens=("<|e|>",), document_separator="\n\n")
    assert facts["bytes"] == len(text.encode())
    assert facts["characters"] == len(text)
    assert facts["tokens"] == len(text) + 80
    assert facts["characters_per_token"] < 1
    assert {row["characters"] for row in facts["by_suffix"]} == {50}
    assert sum(row["characters"] for row in facts["by_script"]) == len(text)
    assert all(row["characters_per_token"] == 1 for row in facts["by_script"] + facts["by_suffix"])


def test_one_script_and_one_suffix_need_no_table(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text(ENGLISH * 50 + "naïve\n", encoding="utf-8")
    facts = measure(tmp_path / "en.txt")
    assert facts["by_script"] == facts["by_suffix"] == []
    assert set(facts["vocabulary"]) == set(ENGLISH + "naïve")


def test_inspect_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text((ENGLISH + RUSSIAN) * 80, encoding="utf-8")
    flags = ["--text-file", str(tmp_path / "text.txt"), "--tokenizer", "bpe", "--vocab-size", "300"]
    assert cli.main(["corpus", "inspect", *flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokenizer"]["vocab_size"] == 300
    assert len(facts["first_merges"]) == 20
    assert facts["excerpt"] in (ENGLISH + RUSSIAN) * 80
    assert cli.main(["corpus", "inspect", *flags]) == 0
    shown = capsys.readouterr().out
    for part in (
        "first merges",
        "by script",
        "CYRILLIC",
        "start of the validation text",
        "windows of 50 characters",
    ):
        assert part in shown


def test_a_task_is_inspected_with_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "corpus",
        "inspect",
        "task:sort",
        "--task-examples",
        "50",
        "--task-size",
        "3",
        "--json",
    ]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 50 * 8


def test_list_and_get(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["corpus", "list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "size", "licence", "origin"]
    names = [row.split()[0] for row in rows if row]
    assert names[:4] == ["shakespeare", "python", "arxiv", "wikipedia"]
    assert set(get_args(TaskCorpus)) <= set(names)
    for row, licence in zip(rows, ("public domain", "PSF", "CC0", "CC BY-SA 3.0 and GFDL")):
        assert licence in row
        assert "MB" in row
    assert cli.main(["corpus", "get", "python"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("python: ")


def test_get_prints_the_hash_of_the_file_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "One line of a text, and its end.\n".encode("utf-8-sig") * 20
    (tmp_path / "a.txt").write_bytes(text)
    assert cli.main(["corpus", "get", "--text-file", str(tmp_path / "a.txt")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{len(text):,} bytes, sha256 {hashlib.sha256(text).hexdigest()}, " in line


@pytest.mark.parametrize(
    "words", [["show"], ["list", "all"], ["inspect", "--text-file", "no-such-file"]]
)
def test_bad_arguments_end_with_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["corpus", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
