"""One text of an answer: its events, as text and scored tokens that are released together.

The scheduler says how many tokens are shown. So the log-probabilities of a stream belong to the
text that has been sent, and a token inside a stop string is never sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from glasslm.data.stream_decoder import StreamDecoder
from glasslm.data.tokenizers import Tokenizer
from glasslm.inference.request import Alternatives, Finished, PromptLogprobs, Token


class ScoredToken(NamedTuple):
    """A token with its log-probability and those of the likeliest tokens at its place.

    `offset` is the position of its first character in the returned text. The first token of an
    echoed prompt has no log-probability.
    """

    id: int
    logprob: float | None
    top: Alternatives | None
    offset: int


@dataclass
class Delta:
    """What a choice gains: text and tokens. `finish` is set in the last one."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish)

    def extend(self, other: Delta) -> None:
        """Append what comes after."""
        self.text += other.text
        self.tokens += other.tokens
        self.finish = other.finish


class ChoiceText:
    """Turns the events of one text into what its choice gains."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], n_chars: int, with_tokens: bool
    ) -> None:
        """`n_chars`: the characters of the answer before the first token, those of an echo.

        Without `with_tokens` the Deltas hold only text.
        """
        self._decoder = StreamDecoder(tokenizer, prompt_ids)
        self._with_tokens = with_tokens
        self._waiting: deque[ScoredToken] = deque()
        self._n_chars, self._n_shown = n_chars, 0

    def push(self, event: Token) -> Delta:
        """One more token."""
        if not self._with_tokens:
            return Delta(event.text)
        offset = self._n_chars + self._decoder.count_replaced(event.id)
        self._waiting.append(ScoredToken(event.id, event.logprob, event.top, offset))
        self._n_chars += len(self._decoder.push(event.id))
        return Delta(event.text, self._release(event.shown))

    def finish(self, event: Finished) -> Delta:
        """The rest of the text."""
        return Delta(event.text, self._release(event.shown), event.reason)

    def _release(self, n_shown: int) -> list[ScoredToken]:
        n_new = min(n_shown - self._n_shown, len(self._waiting))
        self._n_shown = max(n_shown, self._n_shown)
        return [self._waiting.popleft() for _ in range(n_new)]


def scored_prompt(
    ids: Sequence[int], scores: PromptLogprobs, offsets: Sequence[int]
) -> list[ScoredToken]:
    """The tokens of an echoed prompt, with the `prompt_offsets`; none where those are empty."""
    return [ScoredToken(*each) for each in zip(ids, scores.logprobs, scores.top, offsets)]


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int], names: Mapping[int, str]) -> list[int]:
    """(N,) the position of the first character of each token of an echoed prompt.

    `names`: special tokens that stand in its text by their names; others have no text.
    """
    decoder, n_chars, offsets = StreamDecoder(tokenizer), 0, []
    for token in ids:
        offsets.append(n_chars + decoder.count_replaced(token))
        n_chars += len(decoder.push(token)) + len(names.get(token, ""))
    return offsets
