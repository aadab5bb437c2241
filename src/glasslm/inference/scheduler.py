"""Continuous batching: requests join and leave a running batch at any token.

The scheduler has no threads and knows nothing of HTTP. Its owner calls `step` repeatedly and
delivers the events.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import NamedTuple

from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.protocol import Engine
from glasslm.errors import InputError
from glasslm.inference.request import Finished, Request, Token
from glasslm.inference.stream import Stream
from glasslm.inference.stream_batch import StreamBatch, StreamEvents


class SchedulerCounts(NamedTuple):
    """The state of a scheduler, and its totals so far."""

    running: int  # requests with a row of the cache
    queued: int
    oldest_wait_s: float  # of the queue; 0 if it is empty
    prompt_tokens: int  # of admitted requests
    cached_tokens: int  # of finished requests, copied from the row of another request
    completion_tokens: int


class Scheduler:
    """Generates the texts of many requests with one engine, each independent of the others.

    Up to `slots` requests run at once; the others wait in the order of their arrival. `step`
    generates a token of every running text and reads at most a chunk of tokens of prompts, so that
    a long prompt does not stop the other texts. Memory is bounded by the KV cache of `slots` rows.

    `while scheduler.has_work: events = scheduler.step()` answers all requests.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        slots: int,
        capacity: int = 0,
        use_cache: bool = True,
    ) -> None:
        """`capacity`: the tokens that a row of the cache can take; 0: a context.

        With one slot, or a multiple of `engine.row_tile`, the logits of a text do not depend, bit
        for bit, on the others. Without `use_cache` the text so far is read again for every token.
        """
        self._tokenizer, self._config = tokenizer, config
        self._batch = StreamBatch(engine, config, slots, capacity or config.block_size, use_cache)
        self._queue: deque[Stream] = deque()
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._queue) or bool(self._batch.streams)

    @property
    def counts(self) -> SchedulerCounts:
        """The state and the totals so far; any thread may read them."""
        queue = list(self._queue)
        return SchedulerCounts(
            len(self._batch.streams),
            len(queue),
            time.monotonic() - queue[0].submitted if queue else 0.0,
            self._prompt_tokens,
            self._cached_tokens,
            self._completion_tokens,
        )

    def submit(self, request: Request) -> Stream:
        """Add a request to the queue; returns its stream, which `step` returns with each event.

        Raises InputError for a request that cannot be answered.
        """
        _require_valid(request, self._tokenizer.vocab_size, self._config)
        stream = Stream(request, self._tokenizer)
        self._queue.append(stream)
        return stream

    def cancel(self, stream: Stream) -> Finished:
        """End a request, whether it waits or runs; its row is free at once.

        Returns its last event; `step` returns no more of its events.
        """
        if stream in self._queue:
            self._queue.remove(stream)
        elif stream in self._batch.streams:
            self._batch.remove(stream)
        return stream.finish("cancelled")

    def step(self) -> StreamEvents:
        """Admit waiting requests, and compute a token of every running text.

        Returns the new events with their streams, those of one stream in order. A request that
        fails gets the event `Finished` with the reason "failed" and its error; the others go on.
        """
        events: StreamEvents = []
        while self._queue and self._batch.rows.has_free:
            stream = self._queue.popleft()
            self._prompt_tokens += len(stream.request.ids)
            if stream.visible_ids(self._config):
                self._batch.add(stream)
            else:  # nothing is to be predicted
                if stream.request.prompt_logprobs:
                    events.append((stream, stream.prompt_logprobs))
                events.append((stream, stream.finish("length")))
        events += self._batch.step()
        for stream, event in events:
            self._completion_tokens += isinstance(event, Token)
            if isinstance(event, Finished):
                self._cached_tokens += stream.cached_tokens
        return events


def _require_valid(request: Request, vocab_size: int, config: ModelConfig) -> None:
    """Raise InputError unless a model of this vocabulary and context can answer the request."""
    if not request.ids:
        raise InputError("ids is empty: a text starts from at least one token (encode_prompt)")
    outside = [
        token for token in (*request.ids, *request.logit_bias) if not 0 <= token < vocab_size
    ]
    if outside:
        raise InputError(
            f"the token {outside[0]} is not in the vocabulary: expected ids from 0 to "
            f"{vocab_size - 1:,}. Encode the text with the tokenizer of this model"
        )
    if request.max_new_tokens < 0 or request.top_logprobs < 0:
        raise InputError(
            f"max_new_tokens is {request.max_new_tokens} and top_logprobs {request.top_logprobs}: "
            "expected 0 or more"
        )
    if not all(map(math.isfinite, request.logit_bias.values())):
        raise InputError(
            "a logit bias is not finite: expected numbers, such as -100 to forbid a token"
        )
    if "" in request.stop:
        raise InputError("a stop string is empty: give the text at which to stop")
    n_read = len(request.ids) - (request.max_new_tokens == 0)
    if request.prompt_logprobs and n_read > config.block_size and not config.has_rolling_cache:
        raise InputError(
            f"the prompt has {len(request.ids):,} tokens and the context {config.block_size:,}: "
            "log-probabilities of a prompt need a prompt that fits into the context"
        )
