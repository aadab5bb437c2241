"""Answers of a server's /v1/chat/completions, as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from glasslm.data.chat.conversations import Conversation
from glasslm.errors import InputError
from glasslm.inference.chat_session import ContextFullError
from glasslm.inference.sampling import Sampling
from glasslm.text import to_one_line

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 300.0
MAX_PLAIN_BYTES = 1 << 20  # of an answer that is no stream of events
START_EXAMPLE = "glasslm serve RUN"


class RemoteAnswers:
    """Answers of a model of a server with OpenAI's API."""

    def __init__(
        self, url: str, model: str, api_key: str, sampling: Sampling, max_new_tokens: int
    ) -> None:
        """`url`: the address of the server, with or without /v1."""
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        own = {"top_k": sampling.top_k, "min_p": sampling.min_p}
        if sampling.repetition_penalty != 1:
            own["repetition_penalty"] = sampling.repetition_penalty
        self._body: dict[str, Any] = {
            "model": model, "stream": True, "max_tokens": max_new_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p,
            **{name: value for name, value in own.items() if value},
        }  # fmt: skip

    def stream(self, messages: Conversation, seed: int) -> Iterator[str]:
        """As in AnswerSource. Raises InputError where the server refuses or is not there."""
        import requests

        try:
            response = requests.post(
                self._url, json={**self._body, "messages": messages, "seed": seed}, stream=True,
                headers=self._headers, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
            )  # fmt: skip
        except (requests.RequestException, ValueError) as error:
            reason = to_one_line(str(error), 100)
            raise InputError(
                f"{self._url} does not answer ({reason}): start it with `{START_EXAMPLE}`"
            ) from None
        if response.status_code != 200:
            with response:
                _raise_refusal(response.status_code, response.content)
        return self._read_pieces(response)

    def _read_pieces(self, response: Any) -> Iterator[str]:
        import requests

        has_events, plain_body = False, b""
        with response:
            try:
                for line in response.iter_lines():
                    if not line.startswith(b"data:"):
                        # A comment keeps the connection open; another line may be no stream.
                        if not (has_events or line.startswith(b":")):
                            plain_body += line[: MAX_PLAIN_BYTES - len(plain_body)]
                        continue
                    has_events = True
                    data = line.removeprefix(b"data:").removeprefix(b" ")
                    if data == b"[DONE]":
                        return
                    yield _piece_of(json.loads(data))
            except InputError:  # of _piece_of; it is a ValueError
                raise
            except (requests.RequestException, ValueError) as error:
                raise InputError(
                    f"the answer of {self._url} broke off: {to_one_line(str(error), 100)}"
                ) from None
        if not has_events:
            yield _piece_of(self._parse_plain(plain_body))

    def _parse_plain(self, body: bytes) -> Any:
        """The JSON of an answer that is no stream: some servers answer at once all the same."""
        try:
            return json.loads(body)
        except ValueError:
            start = to_one_line(body.decode("utf-8", "replace"), 60) or "an empty answer"
            raise InputError(
                f"{self._url} answers 200 without an event of a stream ({start}): expected a "
                "server with OpenAI's API, is this its address?"
            ) from None


def _piece_of(chunk: Any) -> str:
    """The text of one event of the stream, or of a whole answer."""
    if isinstance(chunk, dict) and "error" in chunk:
        raise InputError(f"the server ended the answer: {to_one_line(str(chunk['error']), 200)}")
    try:
        choice = chunk["choices"][0] if chunk["choices"] else {"delta": {}}
        content = choice["message" if "message" in choice else "delta"].get("content")
    except (KeyError, TypeError, IndexError, AttributeError):
        raise InputError(
            "the server's answer has no choices: is it an API like OpenAI's?"
        ) from None
    return content if isinstance(content, str) else ""


def _raise_refusal(status: int, body: bytes) -> None:
    """Raise the error that a server answered with."""
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = to_one_line(body.decode("utf-8", "replace"), 100), None
    kind = ContextFullError if code == "context_length_exceeded" else InputError
    raise kind(f"the server answers {status}: {message}")
