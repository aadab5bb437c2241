"""The surprise of a model at each token of a validation text, and the tokens that it expected."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.inference.trained_model import Model

Expected = tuple[tuple[str, float], ...]  # the likeliest tokens, with their probabilities
EXPECTED_TOKENS = 3  # listed for each token


@dataclass(frozen=True)
class Piece:
    """A part of a text: one token, or several that only together make whole characters.

    A special token is a piece of its own, as it is spelled.
    """

    text: str
    nats: float  # -ln of the model's probability; 0 for the first token, which has no context
    expected: Expected  # at the start of the piece


def measure_surprise(model: Model, tokens: NDArray[Any], deadline: float) -> list[Piece]:
    """The surprise of the model at `tokens` (N,), until a deadline of time.monotonic.

    Windows overlap by half, so that every token after the first window has at least half a context
    before it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    token_bytes = model.tokenizer.token_bytes
    spellings = {i: token for token, i in model.tokenizer.special_tokens.items()}
    pieces: list[Piece] = []
    nats, expected = 0.0, Expected()
    for token, (loss, likeliest) in zip(tokens, _predictions(model, tokens, deadline)):
        special = spellings.get(int(token), "")
        if special and (text := decoder.decode(b"", final=True)):  # a character that has no end
            pieces.append(Piece(text, nats, expected))
            nats, expected = 0.0, Expected()
        nats += loss
        expected = expected or tuple(
            (spellings.get(i) or token_bytes[i].decode("utf-8", "replace"), p) for i, p in likeliest
        )
        if text := special or decoder.decode(token_bytes[int(token)]):
            pieces.append(Piece(text, nats, expected))
            nats, expected = 0.0, Expected()
    return pieces


def half_surprise_share(pieces: list[Piece]) -> float:
    """The smallest share of the pieces that together have half of the surprise."""
    descending = np.sort([piece.nats for piece in pieces])[::-1]
    half = descending.sum() / 2
    return float(np.searchsorted(np.cumsum(descending), half) + 1) / max(1, len(pieces))


def _predictions(
    model: Model, tokens: NDArray[Any], deadline: float
) -> Iterator[tuple[float, list[tuple[int, float]]]]:
    """For each of `tokens` (N,) its loss in nats and the likeliest tokens as (id, probability)."""
    width = model.config.model.block_size
    ids = np.asarray(tokens, np.int64)
    cache = model.engine.new_cache(1, width)
    yield 0.0, []
    start, done = 0, 1  # the window begins at `start`; the first `done` tokens have predictions
    while done < len(ids) and time.monotonic() < deadline:
        window = ids[None, start : start + width]
        cache.clear(0)
        logits = model.engine.logits(window, cache, np.array([window.shape[1]]), every=True)[0]
        targets = ids[done : start + width + 1]
        for row, target in zip(logits[done - 1 - start :].astype(np.float64), targets):
            log_probabilities = row - row.max()
            log_probabilities -= math.log(np.exp(log_probabilities).sum())
            top = np.argsort(-log_probabilities, kind="stable")[:EXPECTED_TOKENS]
            yield (
                float(-log_probabilities[target]),
                [(int(i), float(np.exp(log_probabilities[i]))) for i in top],
            )
        done += len(targets)
        start = max(0, done - 1 - width // 2)
