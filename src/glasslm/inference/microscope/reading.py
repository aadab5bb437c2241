"""How a model reads a text: the surprise of each token, and what it expected instead."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.inference.microscope.recorded_pass import RecordedPass, choose_candidates, top_tokens
from glasslm.inference.sampling import Sampling, probabilities

TOP = 8


class Reading(NamedTuple):
    """T tokens of a text. Position t of `entropy` and `top` is about the token after t."""

    nats: NDArray[np.float64]  # (T,) surprise of each token; nan for the first, unpredicted one
    rank: NDArray[np.int64]  # (T,) number of tokens that were likelier; -1 for the first
    entropy: NDArray[np.float64]  # (T,) nats, of the prediction after each token
    top_ids: NDArray[np.int64]  # (T, TOP) the likeliest next tokens
    top_logprobs: NDArray[np.float64]  # (T, TOP)
    bits_per_byte: float | None  # of all tokens but the first; None where no bytes are known
    n_bytes: int  # of these tokens


def read_text(recorded: RecordedPass) -> Reading:
    """The reading of a recorded text."""
    logprobs, ids = recorded.log_probabilities, recorded.ids
    after = np.take_along_axis(logprobs[:-1], ids[1:, None], -1)[:, 0]
    rank = (logprobs[:-1] > after[:, None]).sum(-1)
    top_ids = top_tokens(logprobs, TOP)
    n_bytes = int(recorded.model.tokenizer.scored_bytes[ids[1:]].sum())
    return Reading(
        nats=np.concatenate([[np.nan], -after]),
        rank=np.concatenate([[-1], rank]),
        entropy=-(np.exp(logprobs) * logprobs).sum(-1),
        top_ids=top_ids,
        top_logprobs=np.take_along_axis(logprobs, top_ids, -1),
        bits_per_byte=float(-after.sum()) / math.log(2) / n_bytes if n_bytes else None,
        n_bytes=n_bytes,
    )


class Distribution(NamedTuple):
    """The next token's candidates, likeliest first, before and after sampling's filters."""

    ids: NDArray[np.int64]  # (C,)
    before: NDArray[np.float64]  # (C,) probabilities by the model
    after: NDArray[np.float64]  # (C,) probabilities of being drawn
    others: int  # tokens outside the candidates that may still be drawn


def next_token_distribution(
    recorded: RecordedPass, t: int, sampling: Sampling, count: int = 12
) -> Distribution:
    """The distribution of the token after position t, of which the text's own is shown too."""
    logits = recorded["logits"][t]
    used = np.zeros(logits.shape, bool)
    used[recorded.ids[: t + 1]] = True
    before = np.exp(recorded.log_probabilities_at(t))
    after = probabilities(logits, sampling, used)
    ids = choose_candidates(np.log(before), count, int(recorded.targets[t]))
    others = int(np.count_nonzero(after)) - int(np.count_nonzero(after[ids]))
    return Distribution(ids, before[ids], after[ids], others)


def logprobs_of(recorded: RecordedPass, t: int, ids: NDArray[Any]) -> NDArray[np.float64]:
    """(C,): log-probabilities of the tokens `ids` (C,) after position t."""
    return recorded.log_probabilities_at(t)[ids]
