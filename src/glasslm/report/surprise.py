"""What a model finds hard: for each character of an unseen text, how surprised it was and what it had expected."""

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
NAMED = 3  # of them, how many


@dataclass(frozen=True)
class Piece:
    """A stretch of text, usually one token; several where only together they make whole characters."""

    text: str
    nats: float  # -ln of the probability that the model gave it; 0 for the first, which nothing precedes
    expected: Expected  # at its start


def read(model: Model, tokens: NDArray[Any], deadline: float) -> list[Piece]:
    """Let the model read `tokens` (N,) and note its surprise, until a deadline of time.monotonic.

    Windows overlap by half, so that every token beyond the first window has at least half a context before it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    names = model.tokenizer.token_bytes
    pieces: list[Piece] = []
    nats, expected = 0.0, Expected()
    for token, (loss, likeliest) in zip(tokens, _predictions(model, tokens, deadline)):
        nats += loss
        expected = expected or tuple((names[i].decode("utf-8", "replace"), p) for i, p in likeliest)
        text = decoder.decode(names[int(token)])
        if text:
            pieces.append(Piece(text, nats, expected))
            nats, expected = 0.0, Expected()
    return pieces


def half_share(pieces: list[Piece]) -> float:
    """The smallest share of the pieces that together carry half of the surprise."""
    descending = np.sort([piece.nats for piece in pieces])[::-1]
    half = descending.sum() / 2
    return float(np.searchsorted(np.cumsum(descending), half) + 1) / max(1, len(pieces))


def _predictions(
    model: Model, tokens: NDArray[Any], deadline: float
) -> Iterator[tuple[float, list[tuple[int, float]]]]:
    """For each token its nats and the likeliest (token, probability)."""
    width = model.config.model.block_size
    ids = np.asarray(tokens, np.int64)
    cache = model.engine.new_cache(1, width)
    yield 0.0, []
    start, known = 0, 1  # of the tokens the first `known` are done; the window begins at `start`
    while known < len(ids) and time.monotonic() < deadline:
        window = ids[None, start : start + width]
        cache.clear(0)
        logits = model.engine.logits(window, cache, np.array([window.shape[1]]), every=True)[0]
        targets = ids[known : start + width + 1]
        for row, target in zip(logits[known - 1 - start :].astype(np.float64), targets):
            logs = row - row.max()
            logs -= math.log(np.exp(logs).sum())
            top = np.argsort(-logs, kind="stable")[:NAMED]
            yield float(-logs[target]), [(int(i), float(np.exp(logs[i]))) for i in top]
        known += len(targets)
        start = max(0, known - 1 - width // 2)
