"""Random sequences of tokens, written twice: what an induction head can complete."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glasslm.data.dataset import Dataset
from glasslm.errors import InputError

MAX_TEXT_TOKENS = 1 << 20  # of the training text, whose tokens are known to the model
MIN_TOKENS = 8  # different ones, in which a sequence repeats
MIN_COUNT = 10  # occurrences of a token that is known


def known_tokens(dataset: Dataset) -> NDArray[np.int64]:
    """The tokens that occur often in the training text: those of letters, if there are enough.

    Raises InputError where there are too few for a random sequence.
    """
    tokenizer = dataset.tokenizer
    tokens = np.asarray(dataset.train.tokens[:MAX_TEXT_TOKENS], np.int64)
    counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
    special = set(tokenizer.special_tokens.values())
    frequent = [int(t) for t in np.flatnonzero(counts >= MIN_COUNT) if int(t) not in special]
    letters = [t for t in frequent if tokenizer.token_bytes[t].strip().isalpha()]
    chosen = letters if len(letters) >= MIN_TOKENS else frequent
    if len(chosen) < MIN_TOKENS:
        raise InputError(
            f"the training text has {len(chosen)} tokens that occur {MIN_COUNT} times or more, "
            f"expected {MIN_TOKENS} for random sequences: use a run with a larger vocabulary"
        )
    return np.array(chosen, np.int64)


def repeated_tokens(
    choices: NDArray[np.int64], length: int, rows: int, seed: int
) -> NDArray[np.int64]:
    """(rows, 2 length) sequences of random tokens of `choices`, each written twice."""
    draws = np.random.Generator(np.random.Philox(seed)).random((rows, length))
    once: NDArray[np.int64] = choices[(draws * len(choices)).astype(np.int64)]
    return np.concatenate([once, once], axis=1)
