"""How surprising a text is to n-grams that were counted in the training text: a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glasslm.data.baselines import (
    Counts,
    Grams,
    count_grams,
    interpolated_probabilities,
    pack_grams,
)
from glasslm.data.tokenizers import Tokenizer

ORDER = 5
MAX_COUNTED_BYTES = 2 << 20  # of the training text, whose n-grams are counted in about two seconds

GramCounts = Sequence[tuple[Grams, Counts]]


def count_ngrams(train: bytes) -> GramCounts:
    """The n-grams of bytes in a training text, of order 1 to ORDER, which is cut off if long."""
    return count_grams(train[:MAX_COUNTED_BYTES])[:ORDER]


def ngram_nats(
    counts: GramCounts, tokenizer: Tokenizer, ids: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(T,): the nats of each token's bytes by n-grams, nan for one without bytes and the first."""
    pieces = [tokenizer.token_bytes[i] for i in ids]
    *_, p = interpolated_probabilities(counts, pack_grams(b"".join(pieces)))
    ends = np.cumsum([len(piece) for piece in pieces])
    sums = np.concatenate([[0.0], -np.log(p).cumsum()])
    nats = np.array([sums[end] - sums[end - len(piece)] for end, piece in zip(ends, pieces)])
    nats[[not piece for piece in pieces]] = np.nan
    nats[0] = np.nan
    return nats
