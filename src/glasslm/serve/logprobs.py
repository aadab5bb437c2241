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
        self.marked_name: Callable[[int], str] = lru_cache(maxsize=None)(self._marked_name)

    def _name(self, token: int) -> str:
        if token in self._special:
            return self._special[token]
        try:
            return self.bytes[token].decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in self.bytes[token])

    def _marked_name(self, token: int) -> str:
        """The name in /v1/completions, where bytes are marked."""
        name = self.name(token)
        is_text = token in self._special or name.encode() == self.bytes[token]
        return name if is_text else f"bytes:{name}"


def completion_logprobs(tokens: Sequence[ScoredToken], names: TokenNames) -> dict[str, Any]:
    """The shape of /v1/completions: parallel lists."""
    return {
        "tokens": [names.marked_name(token.id) for token in tokens],
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
        top.setdefault(names.marked_name(other), max(logprob, LOWEST))
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
