"""Generation of the texts of some prompts: `generate` is an iterator over their tokens.

Each text is a request to a scheduler of its own, so that a text does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.protocol import Engine
from glasslm.errors import InputError
from glasslm.inference.request import Finished, FinishReason, Grammar, Request, Token
from glasslm.inference.sampling import Sampling
from glasslm.inference.scheduler import Scheduler
from glasslm.inference.stream import Stream

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
    finish: FinishReason | None


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
    return [start_id(tokenizer) or 0]


def encode_from_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a prompt at the start of a document, or of a line: with `start_id` before it.

    A text that begins with that token gets no second one. Raises InputError as `encode_prompt`.
    """
    ids, start = encode_prompt(tokenizer, text), start_id(tokenizer)
    return ids if start is None or ids[0] == start else [start, *ids]


def start_id(tokenizer: Tokenizer) -> int | None:
    """The token after which a text begins: the end of the document before, or else a newline."""
    if tokenizer.end_id is not None:
        return tokenizer.end_id
    return tokenizer.token_bytes.index(b"\n") if b"\n" in tokenizer.token_bytes else None


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
    (`stream.visible_length`); with a rolling cache (ModelConfig.has_rolling_cache) all of them are
    read, a chunk at a time. `grammar(max_new_tokens)` returns the grammar of one text. Without
    `use_cache` the text so far is read again for every token, which shows what the cache is worth:
    the logits are the same up to rounding. Raises InputError for invalid arguments before anything
    is computed.
    """
    if max_new_tokens < 1 or samples < 1:
        raise InputError(
            f"max_new_tokens is {max_new_tokens} and the number of samples {samples}: expected 1 "
            "or more"
        )
    if stop and grammar:
        raise InputError(
            "a stop string could end a text before its grammar is complete: leave out --stop or "
            "--grammar"
        )
    requests = [
        Request(ids, max_new_tokens, sampling, sample, tuple(stop), grammar)
        for ids in [encode_prompt(tokenizer, text) for text in prompts]
        for sample in range(samples)
    ]
    longest_prompt = max((len(request.ids) for request in requests), default=0)
    capacity = cache_capacity(longest_prompt, max_new_tokens, model_config)
    scheduler = Scheduler(
        engine, tokenizer, model_config,
        slots=len(requests), capacity=capacity, use_cache=use_cache,
    )  # fmt: skip
    streams = {
        scheduler.submit(request): divmod(index, samples) for index, request in enumerate(requests)
    }
    return _generate_pieces(scheduler, streams)


CACHE_STEP = 64  # tokens


def cache_capacity(longest_prompt: int, max_new_tokens: int, config: ModelConfig) -> int:
    """The tokens that a row of the cache can take: a whole text, up to one context.

    A rolling cache takes texts of any length. Others are rounded up to whole steps, because the
    shapes of products, and so their rounding, depend on whether a cache is shorter than a block.
    """
    tokens = longest_prompt + max_new_tokens
    if config.has_rolling_cache:
        return tokens
    return min(config.block_size, -(-tokens // CACHE_STEP) * CACHE_STEP)


def _generate_pieces(
    scheduler: Scheduler, streams: Mapping[Stream, tuple[int, int]]
) -> Iterator[Piece]:
    """The pieces of all texts; `streams` has the prompt and the sample of each."""
    while scheduler.has_work:
        events = scheduler.step()
        followers = [event for _, event in events[1:]]
        for (stream, event), following in zip_longest(events, followers):
            if isinstance(event, Finished) and event.error:
                raise event.error
            if not isinstance(event, Token):
                continue
            text, finish = event.text, None
            if isinstance(following, Finished):  # of the same stream
                text, finish = text + following.text, following.reason
            yield Piece(*streams[stream], event.id, text, event.logprob, finish)
