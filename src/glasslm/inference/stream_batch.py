"""Streams that one engine computes together: chunks of prompts, and a token of every text.

Letters: N streams, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.protocol import Engine
from glasslm.inference.cache_rows import CacheRows
from glasslm.inference.request import Event
from glasslm.inference.sampling import Sampling, log_probabilities, sample_tokens
from glasslm.inference.stream import Stream, top_alternatives

StreamEvents = list[tuple[Stream, Event]]


class StreamBatch:
    """The running streams of one engine, each in its own row of the cache.

    A stream first waits in `_reading` until its prompt is read, a chunk at a time and after those
    before it. Then it is in `_decoding`, with one token to read. A text that has outgrown the
    context is read again before the prompts that wait.
    """

    def __init__(
        self, engine: Engine, config: ModelConfig, rows: int, capacity: int, use_cache: bool
    ) -> None:
        self.engine, self.config = engine, config
        self.rows = CacheRows(engine, config, rows, capacity)
        self._use_cache = use_cache
        self._reading: deque[Stream] = deque()
        self._decoding: list[Stream] = []

    @property
    def streams(self) -> list[Stream]:
        """The running streams."""
        return [*self._reading, *self._decoding]

    def add(self, stream: Stream) -> None:
        """Take a stream into a free row."""
        stream.row, stream.unread = self.rows.acquire(), stream.visible_ids(self.config)
        self._reading.append(stream)

    def remove(self, stream: Stream) -> None:
        """Free the row of a stream that is finished or cancelled."""
        if stream in self._reading:  # no logits have shown yet that its numbers are finite
            self._reading.remove(stream)
            self.rows.erase(stream.row)
        else:
            if stream in self._decoding:
                self._decoding.remove(stream)
            self.rows.release(stream.row)
        stream.row = -1

    def step(self) -> StreamEvents:
        """Compute the next token of every text that is read, and read on in those that wait.

        An exception in the computation of some streams ends these streams, with the event
        `Finished` and the reason "failed".
        """
        decoding, events = list(self._decoding), self._read_prompts()
        if decoding:
            events += self._decode(decoding)
        return events

    def _read_prompts(self) -> StreamEvents:
        """Read up to a chunk of tokens of the first texts that wait.

        Texts that other rows have read begin at once.
        """
        events: StreamEvents = []
        n_read = 0
        while self._reading:
            stream = self._reading[0]
            try:
                logits = self._begin(stream) if stream.is_new else None
                if logits is None:
                    n_new = min(len(stream.unread), self.rows.chunk)
                    if n_read and n_read + n_new > self.rows.chunk:
                        break
                    n_read += n_new
                    events += self._read_chunk(stream)
                    continue
            except Exception as error:  # ends this stream only
                events.append(self._fail(stream, error))
                continue
            self._reading.popleft()
            events += self._sample([stream], logits[None])
        return events

    def _begin(self, stream: Stream) -> NDArray[Any] | None:
        """Copy what another row has read of a prompt; the logits (V,) after it, if that is all."""
        share = self._use_cache and not stream.request.prompt_logprobs
        stream.cached_tokens, logits = self.rows.begin(stream.row, stream.unread, share)
        stream.unread, stream.is_new = stream.unread[stream.cached_tokens :], False
        return logits

    def _read_chunk(self, stream: Stream) -> StreamEvents:
        """Read a chunk of a text, and after the last one generate a token."""
        chunk, is_prompt = stream.unread[: self.rows.chunk], not stream.new_tokens
        every = is_prompt and stream.request.prompt_logprobs
        row = self.rows.cache.part(slice(stream.row, stream.row + 1))
        logits = self.engine.logits(np.array([chunk]), row, np.array([len(chunk)]), every)[0]
        stream.unread = stream.unread[len(chunk) :]
        last = logits[-1] if every else logits
        if every:
            stream.add_prompt_logprobs(log_probabilities(logits), int(row.lengths[0]))
        if is_prompt:
            ids = stream.visible_ids(self.config)
            self.rows.record_chunk(
                stream.row,
                ids[: len(ids) - len(stream.unread)],
                None if stream.unread or every else last,
            )
        if stream.unread:
            return []
        self._reading.popleft()
        events: StreamEvents = [(stream, stream.prompt_logprobs)] if every else []
        if stream.request.max_new_tokens == 0:
            self.remove(stream)
            return [*events, (stream, stream.finish("length"))]
        return events + self._sample([stream], last[None])

    def _decode(self, streams: list[Stream]) -> StreamEvents:
        cache_rows = [stream.row for stream in streams]
        tokens = np.zeros((self.rows.count, 1), np.int64)
        counts = np.zeros(self.rows.count, np.int64)
        tokens[cache_rows, 0] = [stream.unread[0] for stream in streams]
        counts[cache_rows] = 1
        try:
            logits = self.engine.logits(tokens, self.rows.cache, counts)
        except Exception as error:  # ends these streams; the queue goes on
            return [self._fail(stream, error) for stream in streams]
        groups: dict[Sampling, list[int]] = {}
        for index, stream in enumerate(streams):
            groups.setdefault(stream.distribution, []).append(index)
        events = []
        for indices in groups.values():
            group = [streams[index] for index in indices]
            events += self._sample(group, logits[[stream.row for stream in group]])
        return events

    def _sample(self, streams: list[Stream], logits: NDArray[Any]) -> StreamEvents:
        """Append a token to each stream, given the logits (N, V) after its text.

        All streams have the same settings of sampling, except the seed.
        """
        try:
            tokens, logprobs = self._next_tokens(streams, logits), log_probabilities(logits)
        except Exception as error:
            if len(streams) == 1:
                return [self._fail(streams[0], error)]
            # One of the streams has failed, and the others have not.
            pairs = zip(streams, logits[:, None])
            return [event for stream, row in pairs for event in self._sample([stream], row)]
        lengths = self.rows.cache.lengths
        events: StreamEvents = []
        for stream, token, row in zip(streams, tokens.tolist(), logprobs):
            top = top_alternatives(row, stream.request.top_logprobs)
            try:
                new_events = stream.append(token, float(row[token]), top)
            except Exception as error:  # of its grammar: the other texts go on
                events.append(self._fail(stream, error))
                continue
            events += [(stream, event) for event in new_events]
            if stream.is_finished:
                self.remove(stream)
            else:
                self._continue(stream, int(lengths[stream.row]))
        return events

    def _next_tokens(self, streams: list[Stream], logits: NDArray[Any]) -> NDArray[np.int64]:
        """(N,): the next token of each stream."""
        distribution = streams[0].distribution
        used = allowed = bias = None
        if distribution.repetition_penalty != 1:
            used = np.stack([stream.used_tokens for stream in streams])
        masks = [stream.allowed() for stream in streams]
        if any(mask is not None for mask in masks):
            every = np.ones(logits.shape[1], bool)
            allowed = np.stack([every if mask is None else mask for mask in masks])
        if any(stream.bias is not None for stream in streams):
            zero = np.zeros(logits.shape[1])
            bias = np.stack([zero if stream.bias is None else stream.bias for stream in streams])
        draws = [stream.draw() for stream in streams]
        return sample_tokens(logits, distribution, draws, used, allowed, bias)

    def _continue(self, stream: Stream, length: int) -> None:
        """Let a stream, with `length` tokens in its row of the cache, read its newest token."""
        if self._use_cache and (self.config.has_rolling_cache or length < self.config.block_size):
            stream.unread = stream.ids[-1:]
            if stream not in self._decoding:
                self._decoding.append(stream)
            return
        self.rows.restart(stream.row)
        stream.unread = stream.visible_ids(self.config)
        if stream in self._decoding:
            self._decoding.remove(stream)
        self._reading.appendleft(stream)

    def _fail(self, stream: Stream, error: Exception) -> tuple[Stream, Event]:
        row = stream.row
        self.remove(stream)
        self.rows.erase(row)
        return stream, stream.finish("failed", error)
