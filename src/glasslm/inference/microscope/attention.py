"""Attention of all heads of a model on one text: rows, pictures, averages, and scores.

Letters: L layers, H heads, T positions, S pixels, K kinds of scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.inference.head_scores import SCORE_NAMES, head_scores
from glasslm.inference.microscope.recorded_pass import RecordedPass
from glasslm.inference.suites.random_texts import repeated_tokens
from glasslm.inference.trained_model import Model

Array = NDArray[Any]

THUMBNAIL_PIXELS, AVERAGE_PIXELS = 64, 512
PROBE_TOKENS = 64  # of the random text that is repeated once, for scores of induction


def attention_from(recorded: RecordedPass, t: int) -> Array:
    """(L, H, T): where each head looks from position t; 0 after t."""
    return np.stack([weights[:, t] for weights in recorded.all_weights()])


def attention_thumbnails(recorded: RecordedPass) -> Array:
    """(L, H, S, S): the weights of all heads, at most THUMBNAIL_PIXELS wide, as area means."""
    return np.stack([shrink(weights, THUMBNAIL_PIXELS) for weights in recorded.all_weights()])


def attention_averages(recorded: RecordedPass) -> Array:
    """(L + 1, S, S): the mean of the heads of each layer, then that of all heads."""
    means = [shrink(weights.mean(0), AVERAGE_PIXELS) for weights in recorded.all_weights()]
    return np.stack([*means, np.mean(means, axis=0)])


def shrink(weights: Array, pixels: int) -> Array:
    """(..., T, T) as area means (..., S, S) of at most `pixels`, weighted to whole positions."""
    T = weights.shape[-1]
    if pixels >= T:
        return weights
    edges = np.arange(pixels) * T // pixels
    sizes = np.diff(edges, append=T)
    rows = np.add.reduceat(weights, edges, axis=-2)
    return np.add.reduceat(rows, edges, axis=-1) / np.outer(sizes, sizes)


def score_heads(recorded: RecordedPass) -> NDArray[np.float64]:
    """(K, L, H): `head_scores` of this text, in the order of SCORE_NAMES; nan where none exist."""
    by_layer = [
        head_scores(weights[None], recorded.ids[None]) for weights in recorded.all_weights()
    ]
    return np.array([[scores[name] for scores in by_layer] for name in SCORE_NAMES])


def induction_probe(model: Model, seed: int = 0) -> NDArray[np.int64]:
    """(T,): `repeated_tokens` of the whole vocabulary, special tokens left out.

    T is at most 2 x PROBE_TOKENS and fits the context. The suite "induction" draws from the
    tokens that are frequent in the training text; here the model may have none.
    """
    special = set(model.tokenizer.special_tokens.values())
    ordinary = np.array([i for i in range(model.tokenizer.vocab_size) if i not in special])
    half = max(1, min(PROBE_TOKENS, model.config.model.block_size // 2))
    return repeated_tokens(ordinary, half, rows=1, seed=seed)[0]
