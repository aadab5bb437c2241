"""A file of preference pairs: strict reading, and what is held out."""

import codecs
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from glasslm.data.preference_pairs import read_preference_pairs
from glasslm.errors import InputError

GOOD: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_pairs_of_one_prompt_are_on_one_side(tmp_path: Path) -> None:
    lines = [GOOD | {"prompt": f"p{i % 20}", "chosen": f"c{i}"} for i in range(60)]
    path = write(tmp_path / "pairs.jsonl", *lines, "", "  ")
    pairs = read_preference_pairs(path, 0.1)
    held_out = {pair.prompt for pair in pairs.held_out}
    assert len(held_out) == 2
    assert held_out.isdisjoint(pair.prompt for pair in pairs.train)
    assert len(pairs.train) + len(pairs.held_out) == 60
    assert pairs.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(read_preference_pairs(path, 0.0).held_out) == 3  # never none
    assert len(read_preference_pairs(path, 0.99).train) == 3  # nor all
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert read_preference_pairs(path, 0.1)[:2] == pairs[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2 holds list"),
        ({}, "line 2 holds nothing"),
        ({"prompt": "a", "chosen": "b"}, "line 2 holds prompt, chosen"),
        (GOOD | {"note": "x"}, "line 2 holds prompt, chosen, rejected, note"),
        (GOOD | {"chosen": 3}, "'chosen' is int, not a text"),
        (GOOD | {"prompt": None}, "'prompt' is NoneType, not a text"),
        (GOOD | {"chosen": "c"}, "both are equal"),
        (GOOD | {"rejected": ""}, "an answer is empty"),
        (GOOD | {"chosen": "\ud83d"}, r"line 2: 'chosen' has half of a surrogate pair \(U\+D83D\)"),
    ],
)
def test_another_line_is_refused_with_its_number(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD | {"prompt": "x"}, line, GOOD)
    with pytest.raises(InputError, match=message):
        read_preference_pairs(path, 0.1)


def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_preference_pairs(tmp_path / "missing.jsonl", 0.1)
    with pytest.raises(InputError, match=r"has 1 prompt\(s\): expected 2"):
        read_preference_pairs(write(tmp_path / "one.jsonl", GOOD), 0.1)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8"):
        read_preference_pairs(tmp_path / "bytes.jsonl", 0.1)
