"""Read conversations from JSON lines: messages with roles, in three common shapes.

A line is {"messages": [{"role", "content"}, ...]} as OpenAI and transformers write it,
{"conversations": [{"from", "value"}, ...]} as ShareGPT does, or {"prompt", "completion"} (or
"response"). Other fields beside these are ignored. A message has no other fields: they would be
lost without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glasslm.data.sources.texts import list_names
from glasslm.errors import InputError, explain_system_errors

Message = dict[str, str]  # role and content
Conversation = list[Message]

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant",
}  # fmt: skip
MAX_LINE_BYTES = 16 << 20  # of one conversation
SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'


def read_conversations(path: Path) -> Iterator[tuple[str, Conversation]]:
    """Each conversation of a file of JSON lines, after its place; empty lines are left out.

    Raises InputError, with the number of the line, for a line that is no conversation.
    """
    with (
        explain_system_errors(path, lambda why: InputError(f"--chat {path} cannot be read: {why}")),
        path.open("rb") as file,
    ):
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            place = f"{path}, line {number:,}"
            if len(line) > MAX_LINE_BYTES:
                raise InputError(
                    f"{place} has more than {MAX_LINE_BYTES >> 20} MiB: expected "
                    "one conversation a line (jq -c '.[]' makes lines of a list)"
                )
            if line.strip():
                try:
                    conversation = parse_conversation(line)
                except InputError as error:
                    raise InputError(f"{place}: {error}") from None
                yield place, conversation


def parse_conversation(line: bytes) -> Conversation:
    """The messages of one line. Raises InputError, which does not name the line."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8: write the file in UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise InputError(f"not JSON ({reason}): expected {SHAPE}") from None
    if not isinstance(value, dict):
        raise InputError(f"not a JSON object: expected {SHAPE}")
    return require_conversation(_find_messages(value))


def require_conversation(messages: Any) -> Conversation:
    """The messages, checked: roles, texts, and at least one answer. Raises InputError."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"the messages are empty or no list: expected {SHAPE}")
    for number, message in enumerate(messages, 1):
        _require_message(message, number)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("no message of the assistant: there is nothing to learn, leave it out")
    return messages


def _find_messages(value: dict[str, Any]) -> Any:
    """The messages of a line in one of the three shapes, as role and content."""
    if "messages" in value:
        return value["messages"]
    if "conversations" in value:
        turns = value["conversations"]
        if not isinstance(turns, list):
            return None
        return [_convert_turn(turn, number) for number, turn in enumerate(turns, 1)]
    answer = next((name for name in ("completion", "response") if name in value), "")
    if "prompt" in value and answer:
        return [
            {"role": "user", "content": value["prompt"]},
            {"role": "assistant", "content": value[answer]},
        ]
    names = list_names([str(name) for name in value]) or "none"
    raise InputError(
        f"the fields are {names}: expected messages, conversations (ShareGPT), or prompt and "
        "completion"
    )


def _convert_turn(turn: Any, number: int) -> Message:
    """A turn of ShareGPT as a message."""
    if not (isinstance(turn, dict) and turn.keys() == {"from", "value"}):
        raise InputError(f"turn {number} is not an object of the fields from and value alone")
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        expected = ", ".join(SHAREGPT_ROLES)
        raise InputError(f"turn {number} is from {turn['from']!r:.60}: expected one of {expected}")
    return {"role": role, "content": turn["value"]}


def _require_message(message: Any, number: int) -> None:
    if not (isinstance(message, dict) and message.keys() == {"role", "content"}):
        fields = list(message) if isinstance(message, dict) else type(message).__name__
        raise InputError(
            f"message {number} has {fields!s:.100}: expected the fields role and content alone"
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(
            f"message {number} has the role {role!r:.60}: expected one of {', '.join(ROLES)}"
        )
    if not isinstance(content, str):
        raise InputError(
            f"message {number} holds {type(content).__name__}: expected a text as content"
        )
    if not content.strip():
        raise InputError(f"message {number} is empty: expected a text, or leave it out")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"message {number} has half of a surrogate pair (U+{ord(content[error.start]):04X}): "
            "correct it"
        ) from None
