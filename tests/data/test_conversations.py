"""Conversations in files: three shapes are read, and everything else is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from glasslm.data.chat.conversations import MAX_LINE_BYTES, read_conversations
from glasslm.errors import InputError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def read(folder: Path, *lines: Any) -> list[Any]:
    """The conversations of a file with these lines: bytes as they are, other values as JSON."""
    path = folder / "chat.jsonl"
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(rows))
    return [messages for _, messages in read_conversations(path)]


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [USER, ANSWER], "id": 7},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
    ],
)
def test_the_shapes_that_people_have_are_one(line: Any, tmp_path: Path) -> None:
    assert read(tmp_path, line) == [[USER, ANSWER]]


def test_empty_lines_and_a_byte_order_mark_are_no_conversations(tmp_path: Path) -> None:
    line = json.dumps({"messages": [USER, ANSWER]}).encode()
    assert len(read(tmp_path, b"\xef\xbb\xbf" + line, b"", b"  \r", line)) == 2


FAULTY: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{messages", "not JSON"),
    "deep JSON": (b"[" * 100_000, "not JSON"),
    "no UTF-8": (b'{"messages": "\xff"}', "not UTF-8"),
    "a list": ([USER, ANSWER], "not a JSON object"),
    "no messages": ({"text": "Hi"}, "the fields are text"),
    "empty messages": ({"messages": []}, "the messages are empty"),
    "a text": ({"messages": "Hi"}, "the messages are empty or no list"),
    "no conversation": ({"conversations": {"from": "human"}}, "the messages are empty or no list"),
    "an unknown role": ({"messages": [{"role": "root", "content": "x"}]}, "has the role 'root'"),
    "a role of a list": ({"messages": [{"role": ["user"], "content": "x"}]}, "has the role"),
    "a tool": ({"messages": [USER, ANSWER | {"tool_calls": []}]}, "message 2 has"),
    "parts": ({"messages": [USER | {"content": [{"type": "text"}]}, ANSWER]}, "holds list"),
    "null": ({"messages": [USER, ANSWER | {"content": None}]}, "holds NoneType"),
    "a blank message": ({"messages": [USER | {"content": " \n"}, ANSWER]}, "message 1 is empty"),
    "no answer": ({"messages": [USER]}, "no message of the assistant"),
    "a surrogate": (b'{"prompt": "\\ud800", "response": "x"}', "half of a surrogate pair"),
    "an unknown speaker": ({"conversations": [{"from": "me", "value": "x"}]}, "turn 1 is from"),
    "a weight": (
        {"conversations": [{"from": "gpt", "value": "x", "weight": 0}]},
        "the fields from and value alone",
    ),
    "an enormous line": (b'"' + b"x" * MAX_LINE_BYTES, "16 MiB"),
}


@pytest.mark.parametrize(("line", "reason"), FAULTY.values(), ids=FAULTY)
def test_a_faulty_line_is_refused_with_its_number(line: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, {"messages": [USER, ANSWER]}, line)
    assert "line 2" in str(error.value)
    assert reason in str(error.value)
    assert len(str(error.value)) < 500


def test_a_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read"):
        list(read_conversations(tmp_path / "none.jsonl"))
