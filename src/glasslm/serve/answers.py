"""The JSON of answers: whole ones and the chunks of a stream, for both endpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import JSONResponse

from glasslm.serve.choice_text import Delta, ScoredToken
from glasslm.serve.logprobs import TokenNames, chat_logprobs, completion_logprobs

# JSON in ASCII, so that no text or name steers the terminal of who reads it with curl.
compact_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


@dataclass(frozen=True)
class Usage:
    """The tokens of a request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def content(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer share. `fingerprint` names the weights that computed it."""

    id: str
    created: int  # seconds since 1970
    model: str
    fingerprint: str

    def content(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Shape(Protocol):
    """The JSON of one endpoint. `with_logprobs`: the request asked for log-probabilities."""

    id_prefix: str

    def whole_choice(
        self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str
    ) -> dict[str, Any]:
        """A choice of an answer that is sent at once."""
        ...

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        """The choices that open a stream."""
        ...

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The choices of chunks that say what a choice gains; none for nothing."""
        ...

    @property
    def object_name(self) -> str: ...

    @property
    def chunk_name(self) -> str: ...


class CompletionShape:
    """/v1/completions."""

    id_prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, names: TokenNames, with_logprobs: bool) -> None:
        self._names, self._with_logprobs = names, with_logprobs

    def whole_choice(
        self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str
    ) -> dict[str, Any]:
        return self._choice(index, text, tokens, finish)

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        return [self._choice(index, delta.text, delta.tokens, delta.finish)] if delta else []

    def _choice(
        self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str | None
    ) -> dict[str, Any]:
        logprobs = completion_logprobs(tokens, self._names) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


class ChatShape:
    """/v1/chat/completions."""

    id_prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, names: TokenNames, with_logprobs: bool) -> None:
        self._names, self._with_logprobs = names, with_logprobs

    def whole_choice(
        self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str
    ) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish,
        }

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}, None)]

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        chunks = []
        if delta.text or delta.tokens:
            chunks.append(self._chunk(index, {"content": delta.text}, self._logprobs(delta.tokens)))
        if delta.finish:
            chunks.append(self._chunk(index, {}, None, delta.finish))
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: Any, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        return chat_logprobs(tokens, self._names) if self._with_logprobs else None


class AsciiJSONResponse(JSONResponse):
    """A response in `compact_json`."""

    def render(self, content: Any) -> bytes:
        return compact_json(content).encode()


def server_sent_event(content: dict[str, Any]) -> bytes:
    """A data line of a stream."""
    return f"data: {compact_json(content)}\n\n".encode()
