"""--json-field: one field of each line of JSON is a document; faults are named with their line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli
from glasslm.config.schema import DataConfig
from glasslm.data.dataset import load_run_dataset, prepare_dataset
from glasslm.data.sources import corpora, json_lines
from glasslm.errors import InputError


def ignore_message(message: str) -> None:
    pass


def write_lines(path: Path, *values: Any) -> Path:
    """Each of `values` as a line of JSON; a string as it is."""
    lines = [value if isinstance(value, str) else json.dumps(value) + "\n" for value in values]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    return path


def read(*paths: Path, field: str = "text", errors: Any = "strict") -> str:
    data = DataConfig(text_file=tuple(map(str, paths)), json_field=field, encoding_errors=errors)
    return "".join(corpora.find_source(data, ignore_message).text(errors))


def test_documents_are_joined_by_a_blank_line_within_and_between_files(tmp_path: Path) -> None:
    one = write_lines(
        tmp_path / "a.jsonl", {"id": 1, "text": "ein\nzwei\n"}, "\r\n", {"text": ""},
        {"text": None}, {"text": "dr\u2028ei"},
    )  # fmt: skip
    empty = write_lines(tmp_path / "b.jsonl", {"text": ""})
    last = write_lines(tmp_path / "c.jsonl", '{"text": "vier"}')  # without a line end
    assert read(one, empty, last) == "ein\nzwei\n\ndr\u2028ei\n\nvier"
    assert read(tmp_path) == read(one, empty, last)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "no end\n', r"line 2 is not JSON \("),
        ("plain text\n", r"line 2 is not JSON \(.*one JSON object per line"),
        ("[" * 100_000 + "\n", r"line 2 is not JSON"),
        ('["text"]\n', r"line 2 is not a JSON object"),
        ('{"title": "a", "body": "b"}\n', r"line 2 has no field 'text': there are title, body"),
        ('{"text": 7}\n', r"line 2: the field 'text' holds no text, but int"),
        ('{"text": ["a"]}\n', r"line 2: the field 'text' holds no text, but list"),
        ('{"text": "\\ud800"}\n', r"line 2: the field 'text' has half of a surrogate"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line: str, says: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "good"}, line, {"text": "good"})
    with pytest.raises(InputError, match=rf"a\.jsonl, {says}"):
        read(path)


def test_half_a_surrogate_pair_may_be_replaced(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a\\ud800b\\ud83d\\ude42"}\n')
    assert read(path, errors="replace") == "a\ufffdb\U0001f642"


def test_a_file_without_line_ends_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_CHARACTERS", 1000)
    with pytest.raises(InputError, match="a line of more than 1,000 characters"):
        read(write_lines(tmp_path / "a.jsonl", "x" * 2000))


def test_a_field_needs_files_and_changes_the_identity(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--json-field needs --text-file"):
        DataConfig(json_field="text")
    path = write_lines(tmp_path / "a.jsonl", {"a": "x" * 99, "b": "y" * 99})
    identities = {
        corpora.find_source(DataConfig(text_file=(str(path),), json_field=field), print).sha256
        for field in (None, "a", "b")
    }
    assert len(identities) == 3


def test_each_line_is_a_document_for_special_tokens(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two\n\nparagraphs"})
    data = DataConfig(text_file=(str(path),), json_field="text", special_tokens=("<end>",))
    source = corpora.find_source(data, ignore_message)
    assert "".join(source.text()) == "one<end>two\n\nparagraphs<end>"
    with pytest.raises(InputError, match="leave out --document-separator"):
        DataConfig(
            text_file=("a",), json_field="a", special_tokens=("<end>",), document_separator="\n"
        )


def test_a_run_reads_the_field_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the cache is gone: the recorded files are those of the user."""
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"text {i}"} for i in range(50)))
    data = DataConfig(text_file=(str(path),), json_field="text")
    before = prepare_dataset(data, corpora.find_source(data, ignore_message), ignore_message)
    assert before.facts["files"] == [
        asdict(file) for file in corpora.find_source(data, ignore_message).files
    ]
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "other"))
    again = load_run_dataset(data, before.facts, before.tokenizer, ignore_message)
    assert again.sha256 == before.sha256
    assert again.train.tokens[:].tolist() == before.train.tokens[:].tolist()


def test_train_and_evaluate_take_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"text": f"the cat number {i} sat on the mat"} for i in range(80)]
    path, run = write_lines(tmp_path / "a.jsonl", *lines), tmp_path / "run"
    flags = "--json-field text --max-steps 2 --block-size 8 --batch-size 2 --d-model 16 --json"
    command = ["train", "--text-file", str(path), "--run-dir", str(run), "--engine", "numpy"]
    assert cli.main([*command, *flags.split()]) == 0
    assert json.loads((run / "run.json").read_text())["config"]["data"]["json_field"] == "text"
    assert '"' not in json.loads((run / "tokenizer.json").read_text())["alphabet"]
    assert cli.main(["evaluate", str(run), "--engine", "numpy"]) == 0
    other = write_lines(tmp_path / "b.jsonl", *lines[:9])
    command = ["evaluate", str(run), "--engine", "numpy", "--text-file", str(other)]
    assert cli.main([*command, "--json-field", "text"]) == 0
    assert cli.main(["evaluate", str(run), "--json-field", "text"]) == 2
    assert "--json-field needs --text-file" in capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(command) == 2  # the braces of JSON are unknown characters
    assert "does not know" in capsys.readouterr().err
