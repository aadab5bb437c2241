"""How a model writes on: the tokens that it draws, and the likeliest ones in the place of each.

Letters: N tokens, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.inference.microscope.variants import check_nothing
from glasslm.inference.request import Finished, Request, Token
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import Model

ALTERNATIVES = 6


class Continuation(NamedTuple):
    """N tokens that the model wrote. Probabilities are the model's own, before all filters."""

    ids: NDArray[np.int64]  # (N,)
    logprobs: NDArray[np.float64]  # (N,)
    top_ids: NDArray[np.int64]  # (N, K) the likeliest tokens in the place of each
    top_logprobs: NDArray[np.float64]  # (N, K)
    is_finished: bool  # the model ended the text


def write_on(
    model: Model,
    ids: Sequence[int],
    count: int,
    sampling: Sampling,
    sample: int = 0,
    check: Callable[[], None] = check_nothing,
) -> Continuation:
    """Up to `count` tokens after the tokens `ids`; each `sample` has draws of its own.

    A draw depends on the seed and the place in the text, so a text that is written in two parts is
    the one that is written at once. `check` is called before each token and may raise to stop.
    """
    scheduler = model.scheduler(slots=1)
    scheduler.submit(Request(list(ids), count, sampling, sample, top_logprobs=ALTERNATIVES))
    tokens: list[Token] = []
    reason = "length"
    while scheduler.has_work:
        check()
        for _, event in scheduler.step():
            if isinstance(event, Token):
                tokens.append(event)
            elif isinstance(event, Finished):
                reason = event.reason
                if event.error is not None:
                    raise event.error
    K = min(ALTERNATIVES, model.tokenizer.vocab_size)
    top = np.array([token.top[:K] for token in tokens]).reshape(len(tokens), K, 2)
    return Continuation(
        np.array([token.id for token in tokens], np.int64),
        np.array([token.logprob for token in tokens]),
        top[..., 0].astype(np.int64),
        top[..., 1],
        reason == "stop",
    )
