"""Log-probabilities in the two shapes of OpenAI's API, one for each endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from glasslm.data.tokenizers import Tokenizer
from glasslm.serve.choice_text import ScoredToken

LOWEST = -9999.0  # OpenAI's value for a probability of zero, as JSON has no infinity


class TokenNames:
    """How tokens are written: as their text, their name, or their bytes.

    A token that is no whole character is written as escaped bytes; a special token has a name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes = tokenizer.token_bytes
        self._special = {i: name for name, i in tokenizer.special_tokens.items()}
        self.name: Callable[[int], str] = lru_cache(maxsize=None)(self._name)

    def _name(self, token: int) -> str:
        if token in self._special:
            return self._special[token]
        try:
            return self.bytes[token].decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in self.bytes[token])

    def is_partial(self, token: int) -> bool:
        """Whether the bytes of the token are no whole characters."""
        try:
            self.bytes[token].decode("utf-8")
        except UnicodeDecodeError:
            return True
        return False

    def completion_name(self, token: int) -> str:
        """The name in /v1/completions, where bytes are marked."""
        name = self.name(token)
        return f"bytes:{name}" if self.is_partial(token) else name


def completion_logprobs(tokens: Sequence[ScoredToken], names: TokenNames) -> dict[str, Any]:
    """The shape of /v1/completions: parallel lists."""
    return {
        "tokens": [names.completion_name(token.id) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_top_by_name(token, names) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _top_by_name(token: ScoredToken, names: TokenNames) -> dict[str, float] | None:
    """The likeliest tokens and the token itself; the likelier one of two with the same name."""
    if token.logprob is None or token.top is None:
        return None
    top: dict[str, float] = {}
    for other, logprob in (*token.top, (token.id, token.logprob)):
        top.setdefault(names.completion_name(other), max(logprob, LOWEST))
    return top


def chat_logprobs(tokens: Sequence[ScoredToken], names: TokenNames) -> dict[str, Any]:
    """The shape of /v1/chat/completions: one object a token."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        spelling = list(names.bytes[token])
        return {"token": names.name(token), "logprob": _finite(logprob), "bytes": spelling}

    return {
        "content": [
            entry(token.id, token.logprob)
            | {"top_logprobs": [entry(*other) for other in token.top or ()]}
            for token in tokens
        ],
        "refusal": None,
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
