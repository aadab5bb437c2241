"""Generation: prefill the prompts, then decode token by token with the engine's KV cache.

`generate` is an iterator over tokens. Several prompts, and several samples of each, are one batch
with rows of unequal length; the text of a row does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.data.stream_decoder import StreamDecoder
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.protocol import Engine
from glasslm.errors import InputError
from glasslm.inference.sampling import Sampling, log_probabilities, sample_tokens

Finish = Literal["length", "stop"]
Prompt = str | Sequence[int] | NDArray[np.integer[Any]]  # a text, or its tokens (T,)


class Piece(NamedTuple):
    """One token of one text.

    `prompt` and `sample` are the index of the prompt and of the text among those of its prompt.
    `text` is what can be shown now: it is empty while a character is incomplete or a stop string
    may follow. `logprob` is the natural log of the model's probability, before temperature and
    filters. `finish` is set in the last piece of a text: "length" where `max_new_tokens` are
    generated, "stop" where a stop string, the grammar or the end of the document ended the text.
    """

    prompt: int
    sample: int
    token: int
    text: str
    logprob: float
    finish: Finish | None


class Grammar(Protocol):
    """The state of one text in a grammar, which masks the tokens that may come next."""

    finished: bool  # the text is complete

    def allowed(self, remaining: int) -> NDArray[np.bool_]:
        """(V,): marks the tokens that may come next; `remaining` counts the next one, too."""
        ...

    def advance(self, token: int) -> None:
        """Append a token to the text."""
        ...


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


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The tokens of a prompt. An empty one is the end of the document before, or a newline.

    Without these tokens it is token 0. A prompt may be a text, or its tokens (T,). Raises
    InputError for characters that the tokenizer does not know, and tokens outside the vocabulary.
    """
    if isinstance(prompt, str):
        ids = [int(token) for token in tokenizer.encode(prompt)]
    else:
        ids = _require_ids(prompt, tokenizer.vocab_size)
    if ids:
        return ids
    if tokenizer.end_id is not None:
        return [tokenizer.end_id]
    return [tokenizer.token_bytes.index(b"\n") if b"\n" in tokenizer.token_bytes else 0]


def _require_ids(prompt: Prompt, vocab_size: int) -> list[int]:
    array = np.asarray(prompt)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"ids is {array.dtype} with the shape {array.shape}: expected integers (T,), one text"
        )
    outside = [int(token) for token in array if not 0 <= token < vocab_size]
    if outside:
        raise InputError(
            f"ids hold {outside[0]}: expected 0 to {vocab_size - 1}, the vocabulary of the model; "
            "encode the text with the tokenizer of its run"
        )
    return [int(token) for token in array]


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    model_config: ModelConfig,
    max_new_tokens: int = 200,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    samples: int = 1,
    stop: Sequence[str] = (),
    grammar: Callable[[int], Grammar] | None = None,
    use_cache: bool = True,
) -> Iterator[Piece]:
    """Generate up to `max_new_tokens` after each prompt, `samples` times; yields a Piece per token.

    A prompt is a text, or the tokens (T,) of one. Sample i of a prompt depends on the seed, i and
    the prompt. The joined pieces of a text are its continuation, without the stop string or the
    special token that ended it. An empty prompt is that special token, or a newline
    (`encode_prompt`). If a text is longer than the context, only its newest tokens are read
    (`visible_length`); with a rolling cache (ModelConfig.has_rolling_cache) all of them are read,
    one context at a time. `grammar(max_new_tokens)` returns the grammar of one text. Without
    `use_cache` the text so far is read again for every token, which shows what the cache is worth:
    the logits are the same up to rounding. Raises InputError for invalid arguments before anything
    is computed.
    """
    if max_new_tokens < 1 or samples < 1:
        raise InputError(
            f"max_new_tokens is {max_new_tokens} and the number of samples {samples}: expected 1 "
            "or more"
        )
    if "" in stop:
        raise InputError("a stop string is empty: give the text at which to stop")
    if stop and grammar:
        raise InputError(
            "a stop string could end a text before its grammar is complete: leave out --stop or "
            "--grammar"
        )
    rows = [
        _TextRow(prompt, sample, ids, tokenizer, stop, max_new_tokens, grammar)
        for prompt, ids in enumerate([encode_prompt(tokenizer, text) for text in prompts])
        for sample in range(samples)
    ]
    longest_prompt = max((len(row.ids) for row in rows), default=0)
    capacity = cache_capacity(longest_prompt, max_new_tokens, model_config)
    return _generate_steps(engine, rows, sampling, model_config, capacity, use_cache)


def cache_capacity(longest_prompt: int, max_new_tokens: int, config: ModelConfig) -> int:
    """The tokens that a row of the cache can take: one context, or a whole text if it rolls."""
    return longest_prompt + max_new_tokens if config.has_rolling_cache else config.block_size


def _generate_steps(
    engine: Engine,
    rows: list[_TextRow],
    sampling: Sampling,
    model_config: ModelConfig,
    capacity: int,
    use_cache: bool,
) -> Iterator[Piece]:
    block_size, rolling = model_config.block_size, model_config.has_rolling_cache
    cache = engine.new_cache(len(rows), capacity)

    def visible_ids(row: _TextRow) -> list[int]:
        return row.ids if rolling else row.newest_ids(visible_length(len(row.ids), block_size))

    unread = [visible_ids(row) for row in rows]
    while any(unread):
        portions = [ids[:block_size] for ids in unread]
        unread = [ids[block_size:] for ids in unread]
        tokens, counts = _pad_rows(portions)
        logits = engine.logits(tokens, cache, counts)
        # Rows whose text is read to its end get their next token.
        ready = [index for index in range(len(rows)) if portions[index] and not unread[index]]
        ready_rows = [rows[index] for index in ready]
        pieces = dict(zip(ready, _sample_pieces(ready_rows, logits[ready], sampling)))
        for index, piece in pieces.items():
            if piece.finish:
                continue
            if use_cache and (rolling or cache.lengths[index] < block_size):
                unread[index] = [piece.token]
            else:
                cache.clear(index)
                unread[index] = visible_ids(rows[index])
        yield from pieces.values()  # after the last use of `logits`, which the engine may overwrite


def _sample_pieces(
    rows: list[_TextRow], logits: NDArray[Any], sampling: Sampling
) -> Iterator[Piece]:
    """The next piece of each row, given the logits (rows, V) after the texts so far."""
    if not rows:
        return
    used = np.stack([row.used_tokens for row in rows]) if sampling.repetition_penalty != 1 else None
    masks = [mask for row in rows if (mask := row.allowed()) is not None]
    allowed = np.stack(masks) if masks else None
    positions, samples = [len(row.ids) for row in rows], [row.sample for row in rows]
    tokens = sample_tokens(logits, sampling, positions, samples, used, allowed)
    logprobs = log_probabilities(logits, tokens)
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
        yield row.append(token, logprob)


def _pad_rows(rows: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens (rows, longest), padded with 0, and their number in each row (rows,)."""
    counts = np.array([len(ids) for ids in rows])
    tokens = np.zeros((len(rows), counts.max()), np.int64)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = ids
    return tokens, counts


class _TextRow:
    """One text: its tokens so far, its decoder, stop strings and grammar."""

    def __init__(
        self,
        prompt: int,
        sample: int,
        ids: list[int],
        tokenizer: Tokenizer,
        stop: Sequence[str],
        max_new_tokens: int,
        grammar: Callable[[int], Grammar] | None,
    ) -> None:
        self.prompt, self.sample, self.ids = prompt, sample, list(ids)
        self._remaining = max_new_tokens
        self.used_tokens = np.zeros(tokenizer.vocab_size, bool)
        self.used_tokens[ids] = True
        self._decoder = StreamDecoder(tokenizer, ids)
        self._buffer = StopStringBuffer(tuple(stop))
        self._grammar = grammar(max_new_tokens) if grammar else None
        self._end_id = tokenizer.end_id

    def newest_ids(self, count: int) -> list[int]:
        """The last `count` tokens."""
        return self.ids[len(self.ids) - count :]

    def allowed(self) -> NDArray[np.bool_] | None:
        """(V,): marks the tokens that the grammar allows next; None without a grammar."""
        return self._grammar.allowed(self._remaining) if self._grammar else None

    def append(self, token: int, logprob: float) -> Piece:
        """Append a token to the text; returns its piece."""
        self.ids.append(token)
        self.used_tokens[token] = True
        self._remaining -= 1
        text = self._buffer.push(self._decoder.push(token))
        finish: Finish | None = None
        if self._grammar:
            self._grammar.advance(token)
        if self._buffer.stopped or (self._grammar and self._grammar.finished):
            finish = "stop"
        elif not self._remaining or token == self._end_id:
            text += self._buffer.push(self._decoder.flush())
            is_stopped = self._buffer.stopped or token == self._end_id
            finish = "stop" if is_stopped else "length"
        if finish:
            text += self._buffer.flush()
        return Piece(self.prompt, self.sample, token, text, logprob, finish)


@dataclass
class StopStringBuffer:
    """Holds text back while it may be the start of a stop string.

    >>> buffer = StopStringBuffer(("END",))
    >>> [buffer.push(text) for text in ("say E", "N", "TER E", "ND")], buffer.stopped
    (['say ', '', 'ENTER ', ''], True)
    """

    stops: tuple[str, ...]
    stopped: bool = False
    _text: str = ""

    def push(self, text: str) -> str:
        """Append text; returns the text that cannot become part of a stop string any more."""
        self._text += text
        matches = [
            (start + len(stop), start)
            for stop in self.stops
            if (start := self._text.find(stop)) >= 0
        ]
        if matches:
            self.stopped = True
            # The match that is complete first counts, so that the portions make no difference.
            _, start = min(matches)
            released, self._text = self._text[:start], ""
            return released
        n_held = max((_partial_match_length(self._text, stop) for stop in self.stops), default=0)
        end = len(self._text) - n_held
        released, self._text = self._text[:end], self._text[end:]
        return released

    def flush(self) -> str:
        """The text still held back, once no more text comes."""
        released, self._text = self._text, ""
        return released


def _partial_match_length(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper prefix of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
