"""Text, token by token: prefill the prompts, then feed each new token back through the engine's cache.

`generate` is an iterator that knows nothing of terminals or HTTP. Several prompts, and several samples of each, are
computed as one batch with rows of unequal length; what a row says does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.data.tokenizers import StreamDecoder, Tokenizer
from glasslm.engines.protocol import Engine
from glasslm.errors import InputError
from glasslm.inference.sampling import Sampling, choose, log_probabilities

Finish = Literal["length", "stop"]


class Piece(NamedTuple):
    """One token of one text."""

    prompt: int  # index of the prompt
    sample: int  # index among the texts from this prompt
    token: int
    text: str  # what may be shown now: empty while half a character or the start of a stop string is held back
    logprob: float  # natural log, by the model itself, before temperature and filters
    finish: (
        Finish | None
    )  # in the text's last piece: all tokens are spent, or a stop string or the grammar ended it


class Grammar(Protocol):
    """What one text must look like, asked before each of its tokens and told each of them."""

    finished: bool

    def allowed(self, remaining: int) -> NDArray[np.bool_]:
        """(V,) tokens that may come next, when `remaining` tokens, that one included, may still be written."""
        ...

    def advance(self, token: int) -> None: ...


def visible(length: int, block_size: int) -> int:
    """How many of a text's newest tokens a model that does not roll sees when it has `length` of them.

    All, up to the context. The token after that makes it read the newest half of a context afresh; the view then grows
    to a full context again, and so on. It is a rule of the length alone, so a text goes on in the same way whether
    its tokens were prompt or were written here.

    >>> [visible(length, 8) for length in (7, 8, 9, 10, 13, 14)]
    [7, 8, 4, 5, 8, 4]
    """
    if length <= block_size:
        return length
    half = max(1, block_size // 2)
    return half + (length - block_size - 1) % (block_size - half + 1)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's tokens; for an empty one a newline, or token 0 where the vocabulary has no newline.

    Raises InputError for characters that the tokenizer does not know.
    """
    ids = [int(token) for token in tokenizer.encode(prompt)]
    if ids:
        return ids
    return [tokenizer.token_bytes.index(b"\n") if b"\n" in tokenizer.token_bytes else 0]


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    block_size: int,
    rolling: bool = False,
    max_new_tokens: int = 200,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    samples: int = 1,
    stop: Sequence[str] = (),
    grammar: Callable[[int], Grammar] | None = None,
) -> Iterator[Piece]:
    """Write up to `max_new_tokens` after each prompt, `samples` times; yields a Piece a token, step by step.

    The text of a prompt's sample i depends on the seed, i and the prompt; pieces of one text, joined, are its
    continuation, without the stop string that ended it. An empty prompt starts from a newline (`encode_prompt`). Of a
    text longer than the context the newest tokens are read (`visible`); by a model that is `rolling` (ModelConfig) all
    of them, in portions of a context. `grammar(max_new_tokens)` makes the grammar of one text. Raises InputError for
    what cannot be used, before anything is computed.
    """
    if max_new_tokens < 1 or samples < 1:
        raise InputError(
            f"max_new_tokens is {max_new_tokens} and the number of samples {samples}: expected 1 or more"
        )
    if "" in stop:
        raise InputError("a stop string is empty: give the text at which to stop")
    if stop and grammar:
        raise InputError(
            "a stop string could end a text before its grammar is complete: leave out --stop or --grammar"
        )
    rows = [
        _Row(prompt, sample, ids, tokenizer, stop, max_new_tokens, grammar)
        for prompt, ids in enumerate([encode_prompt(tokenizer, text) for text in prompts])
        for sample in range(samples)
    ]
    longest = max((len(row.ids) for row in rows), default=0)
    capacity = cache_capacity(longest, max_new_tokens, block_size, rolling)
    return _steps(engine, rows, sampling, block_size, rolling, capacity)


def cache_capacity(longest: int, max_new_tokens: int, block_size: int, rolling: bool) -> int:
    """Tokens for which the cache has room: a context; or a whole text, of which a model that rolls keeps a window."""
    return longest + max_new_tokens if rolling else block_size


def _steps(
    engine: Engine,
    rows: list[_Row],
    sampling: Sampling,
    block_size: int,
    rolling: bool,
    capacity: int,
) -> Iterator[Piece]:
    cache = engine.new_cache(len(rows), capacity)
    unread = [row.ids if rolling else row.newest(visible(len(row.ids), block_size)) for row in rows]
    while any(unread):
        fresh = [ids[:block_size] for ids in unread]
        unread = [ids[block_size:] for ids in unread]
        logits = engine.logits(*_padded(fresh, cache))
        read = [index for index in range(len(rows)) if fresh[index] and not unread[index]]
        pieces = dict(zip(read, _written([rows[index] for index in read], logits[read], sampling)))
        for index, piece in pieces.items():
            if piece.finish:
                continue
            if rolling or cache.lengths[index] < block_size:
                unread[index] = [piece.token]
            else:
                cache.clear(index)
                unread[index] = rows[index].newest(visible(len(rows[index].ids), block_size))
        yield from pieces.values()  # after the last look at `logits`, which the engine may write over


def _written(rows: list[_Row], logits: NDArray[Any], sampling: Sampling) -> Iterator[Piece]:
    """The next piece of each row, given the logits (rows, V) after the texts so far."""
    if not rows:
        return
    seen = np.stack([row.seen for row in rows]) if sampling.repetition_penalty != 1 else None
    masks = [row.allowed() for row in rows]
    allowed = (
        np.stack([mask for mask in masks if mask is not None]) if masks[0] is not None else None
    )
    positions, samples = [len(row.ids) for row in rows], [row.sample for row in rows]
    tokens = choose(logits, sampling, positions, samples, seen, allowed)
    logprobs = log_probabilities(logits, tokens)
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
        yield row.write(token, logprob)


def _padded(fresh: list[list[int]], cache: Any) -> tuple[NDArray[np.int64], Any, NDArray[np.int64]]:
    counts = np.array([len(ids) for ids in fresh])
    tokens = np.zeros((len(fresh), counts.max()), np.int64)
    for row, ids in zip(tokens, fresh):
        row[: len(ids)] = ids
    return tokens, cache, counts


class _Row:
    """One text: its tokens so far, what of it may be shown, and what may come next."""

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
        self.seen = np.zeros(tokenizer.vocab_size, bool)
        self.seen[ids] = True
        self._decoder = StreamDecoder(tokenizer)
        self._held = HeldBack(tuple(stop))
        self._grammar = grammar(max_new_tokens) if grammar else None

    def newest(self, count: int) -> list[int]:
        return self.ids[len(self.ids) - count :]

    def allowed(self) -> NDArray[np.bool_] | None:
        """(V,) the tokens that may come next, if there is a grammar."""
        return self._grammar.allowed(self._remaining) if self._grammar else None

    def write(self, token: int, logprob: float) -> Piece:
        """The text goes on with this token."""
        self.ids.append(token)
        self.seen[token] = True
        self._remaining -= 1
        text = self._held.push(self._decoder.push(token))
        finish: Finish | None = None
        if self._grammar:
            self._grammar.advance(token)
        if self._held.stopped or (self._grammar and self._grammar.finished):
            finish = "stop"
        elif not self._remaining:
            text += self._held.push(self._decoder.flush())
            finish = "stop" if self._held.stopped else "length"
        if finish:
            text += self._held.flush()
        return Piece(self.prompt, self.sample, token, text, logprob, finish)


@dataclass
class HeldBack:
    """Text on its way out, in which nothing of a stop string may be shown.

    >>> held = HeldBack(("END",))
    >>> [held.push("say E"), held.push("N"), held.push("TER E"), held.push("ND"), held.stopped]
    ['say ', '', 'ENTER ', '', True]
    """

    stops: tuple[str, ...]
    stopped: bool = False
    _text: str = ""

    def push(self, text: str) -> str:
        """Take further text; returns what can no longer become part of a stop string."""
        self._text += text
        found = [(at + len(stop), at) for stop in self.stops if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, start = min(
                found
            )  # the first to be complete, so that the portions of text make no difference
            shown, self._text = self._text[:start], ""
            return shown
        keep = max((_overlap(self._text, stop) for stop in self.stops), default=0)
        shown, self._text = (
            self._text[: len(self._text) - keep],
            self._text[len(self._text) - keep :],
        )
        return shown

    def flush(self) -> str:
        """The rest, once no more text comes."""
        shown, self._text = self._text, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning, but not the whole, of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
