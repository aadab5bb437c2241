"""A request under way: its tokens so far, their text, and what the model has yet to read."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.data.stream_decoder import StreamDecoder
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import InputError
from glasslm.inference.request import (
    Alternatives,
    Event,
    Finished,
    FinishReason,
    PromptLogprobs,
    Request,
    Token,
    Usage,
)
from glasslm.inference.sampling import uniform_draw
from glasslm.inference.stop_strings import StopStringBuffer


def visible_length(length: int, block_size: int) -> int:
    """The number of newest tokens that a model reads of a text of `length` tokens.

    For models without a rolling cache. A text of up to `block_size` tokens is read whole. When it
    grows by one more, the newest half context is read again and grows to a full context. The rule
    depends on the length only: a text continues in the same way whether its tokens were a prompt
    or were generated.

    >>> [visible_length(length, 8) for length in (7, 8, 9, 10, 13, 14)]
    [7, 8, 4, 5, 8, 4]
    """
    if length <= block_size:
        return length
    half = max(1, block_size // 2)
    return half + (length - block_size - 1) % (block_size - half + 1)


class Stream:
    """The text of one request. The scheduler gives it tokens and returns its events.

    `unread` are the tokens that the model reads next, `row` the row of the KV cache, while there is
    one.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.ids = list(request.ids)
        self.unread: list[int] = []
        self.row = -1
        self.cached_tokens = 0
        # Streams of the same distribution are sampled together; each has a seed of its own.
        self.distribution = dataclasses.replace(request.sampling, seed=0)
        self.is_new = True  # nothing is read yet
        self.is_finished = False
        self.submitted = time.monotonic()
        self.prompt_logprobs = PromptLogprobs([None], [None])
        self.bias: NDArray[np.float64] | None = None
        if request.logit_bias:
            self.bias = np.zeros(tokenizer.vocab_size)
            self.bias[list(request.logit_bias)] = list(request.logit_bias.values())
        self.used_tokens = np.zeros(tokenizer.vocab_size, bool)
        self.used_tokens[self.ids] = True
        self._grammar = request.grammar(request.max_new_tokens) if request.grammar else None
        self._text = _ShownText(tokenizer, self.ids, request.stop)
        ends = tokenizer.other_end_ids | {tokenizer.end_id} | request.end_ids
        self._end_ids = [i for i in ends if i is not None and i < tokenizer.vocab_size]

    def visible_ids(self, config: ModelConfig) -> list[int]:
        """The tokens that the model reads for the next one: all, or the newest of a long text."""
        # Nothing is predicted after the last token of a prompt without a continuation.
        ids = self.ids if self.request.max_new_tokens else self.ids[:-1]
        if self.request.max_new_tokens == 0 and not self.request.prompt_logprobs:
            return []
        if config.has_rolling_cache:
            return list(ids)
        return ids[len(ids) - visible_length(len(ids), config.block_size) :]

    def add_prompt_logprobs(self, logprobs: NDArray[np.float64], n_read: int) -> None:
        """Note the log-probabilities (T, V) after the last T of the first `n_read` tokens."""
        for row, token in zip(logprobs, self.ids[n_read - len(logprobs) + 1 : n_read + 1]):
            self.prompt_logprobs.logprobs.append(float(row[token]))
            self.prompt_logprobs.top.append(top_alternatives(row, self.request.top_logprobs))

    @property
    def new_tokens(self) -> int:
        """The number of generated tokens."""
        return len(self.ids) - len(self.request.ids)

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(len(self.request.ids), self.cached_tokens, self.new_tokens)

    def allowed(self) -> NDArray[np.bool_] | None:
        """(V,): marks the tokens that the grammar allows next; None without a grammar.

        Raises InputError where the text may end or go on, and the model has no token that ends it.
        """
        if self._grammar is None:
            return None
        allowed = self._grammar.allowed(self.request.max_new_tokens - self.new_tokens)
        if self._grammar.can_end:
            if not self._end_ids:
                raise InputError(
                    "the schema allows a text that could go on where it is complete, such as a "
                    "number, and the model has no token that ends it: ask for an object or array"
                )
            allowed[self._end_ids] = True
        return allowed

    def draw(self) -> float:
        """The uniform number of the next token."""
        return uniform_draw(self.request.sampling.seed, self.request.sample, len(self.ids))

    def append(self, token: int, logprob: float, top: Alternatives) -> list[Event]:
        """Append a token to the text; returns its events."""
        self.ids.append(token)
        self.used_tokens[token] = True
        # In a grammar, a token that ends other texts may be a part of this one, as a line break.
        is_end = token in self._end_ids and (self._grammar is None or self._grammar.can_end)
        shown_text = "" if is_end else self._text.push(token)
        if self._grammar and not is_end:
            self._grammar.advance(token)
        event = Token(token, shown_text, logprob, top, self._text.shown)
        if is_end or self._text.stopped or (self._grammar and self._grammar.finished):
            return [event, self.finish("stop")]
        if self.new_tokens == self.request.max_new_tokens:
            return [event, self.finish("length")]
        return [event]

    def finish(self, reason: FinishReason, error: Exception | None = None) -> Finished:
        """End the text; returns the last event."""
        self.is_finished = True
        rest = self._text.flush()
        if self._text.stopped and reason == "length":  # the last half character was a stop string
            reason = "stop"
        return Finished(reason, self.usage, rest, self._text.shown, error)


class _ShownText:
    """The text of the tokens that can be shown: whole characters without a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, prompt)
        self._buffer = StopStringBuffer(stop)
        self.shown = 0  # tokens
        # The characters decoded and released so far, and for each token that is not shown yet the
        # number of decoded characters at its end.
        self._decoded = self._released = 0
        self._ends: deque[int] = deque()
        self._shown_end = 0  # decoded characters at the end of the last shown token
        self._undecoded = 0  # tokens whose last character is not complete

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._buffer.stopped

    def push(self, token: int) -> str:
        """The text that can be shown after one more token."""
        text = self._decoder.push(token)
        self._undecoded += 1
        if text or not self._tokenizer.token_bytes[token]:
            self._end_undecoded(len(text))
        return self._release(self._buffer.push(text))

    def flush(self) -> str:
        """The rest of the text, once no more tokens come."""
        if self._buffer.stopped:
            if self._ends and self._ends[0] > self._released > self._shown_end:
                self.shown += 1  # the stop string begins inside this token
            return ""
        text = self._decoder.flush()
        self._end_undecoded(len(text))
        return self._release(self._buffer.push(text)) + self._release(self._buffer.flush())

    def _end_undecoded(self, characters: int) -> None:
        self._decoded += characters
        self._ends.extend([self._decoded] * self._undecoded)
        self._undecoded = 0

    def _release(self, text: str) -> str:
        self._released += len(text)
        while self._ends and self._ends[0] <= self._released:
            self._shown_end = self._ends.popleft()
            self.shown += 1
        return text


def top_alternatives(logprobs: NDArray[Any], count: int) -> Alternatives:
    """The `count` likeliest tokens of logprobs (V,), the likeliest first; equal ones by number."""
    count = min(count, len(logprobs))
    if not count:
        return []
    candidates = np.argpartition(-logprobs, count - 1)[:count]
    threshold = logprobs[candidates].min()
    above = np.flatnonzero(logprobs > threshold)
    equal = np.flatnonzero(logprobs == threshold)[: count - len(above)]
    tokens = np.concatenate([above[np.argsort(-logprobs[above], kind="stable")], equal])
    return [(int(token), float(logprobs[token])) for token in tokens]
