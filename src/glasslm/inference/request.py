"""A request for one text, and the events with which the scheduler answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.inference.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "failed"]
Alternatives = list[tuple[int, float]]  # the likeliest tokens and their log-probabilities


class Grammar(Protocol):
    """The state of one text in a grammar, which masks the tokens that may come next."""

    finished: bool  # the text is complete and cannot go on
    can_end: bool  # the text is complete and may go on: the model chooses, by a token that ends it

    def allowed(self, remaining: int) -> NDArray[np.bool_]:
        """(V,): marks the tokens that may come next; `remaining` counts the next one, too."""
        ...

    def advance(self, token: int) -> None:
        """Append a token to the text."""
        ...


@dataclass(frozen=True)
class Request:
    """One text to generate. Log-probabilities are natural, and of the raw logits."""

    ids: Sequence[int]
    """The tokens of the prompt, at least one (`encode_prompt`)."""
    max_new_tokens: int = 200
    """The most tokens to generate; 0 only reads the prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0
    """The number of this text among those of the same prompt and seed: each has its own draws."""
    stop: tuple[str, ...] = ()
    """Texts that end the text and are not part of it."""
    grammar: Callable[[int], Grammar] | None = None
    """Called with `max_new_tokens`; returns the grammar of the text."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Addends to the logits of some tokens."""
    top_logprobs: int = 0
    """The number of likeliest tokens whose log-probabilities are returned at each position."""
    prompt_logprobs: bool = False
    """Whether to return the log-probabilities of the prompt's tokens, too."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end the text, besides those of the tokenizer."""


class Token(NamedTuple):
    """A generated token.

    `text` is what can be shown now: whole characters only, and nothing that may become part of a
    stop string. The joined texts of a request are its continuation. `shown` counts the tokens of
    the request whose text has been shown in full; the others may still turn out to be part of a
    stop string.
    """

    id: int
    text: str
    logprob: float
    top: Alternatives
    shown: int


class PromptLogprobs(NamedTuple):
    """The log-probabilities of the prompt's tokens; None for the first one, which has none."""

    logprobs: list[float | None]
    top: list[Alternatives | None]


class Usage(NamedTuple):
    """The tokens of a request; `cached_tokens` of the prompt were taken from another request."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Finished(NamedTuple):
    """The last event of a request.

    `reason` is "length" where `max_new_tokens` are generated, "stop" where a stop string, the
    grammar or the end of the document ended the text, "failed" where `error` was raised. `text` is
    the rest of the text. `shown` counts the tokens that have a part in the whole text: the tokens
    after them belong to the stop string or are the end of the document.
    """

    reason: FinishReason
    usage: Usage
    text: str = ""
    shown: int = 0
    error: Exception | None = None


Event = PromptLogprobs | Token | Finished
