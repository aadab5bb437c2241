"""Byte n-grams as a model: nats of texts, and answers of a synthetic task.

The probabilities are those of baselines.py, interpolated by Witten and Bell's method. Of the orders
the best one counts, which is chosen on the measured texts, in favour of the n-grams.
Letters: N texts, G grams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.data.baselines import (
    BITS_PER_BYTE,
    pack_grams,
    witten_bell_probabilities,
)
from glasslm.data.tasks.task import Example

MAX_TRAIN_BYTES = 4 << 20  # whose n-grams are counted in about a second


class NgramAnswers(NamedTuple):
    """The examples of a task that n-grams answer exactly."""

    right: int
    order: int  # of the n-grams that answer most


def text_nats(train: bytes, texts: Sequence[bytes], start: bytes = b"\n") -> NDArray[np.float64]:
    """(MAX_ORDER, N) nats of each text after `start`, by n-grams of each order in `train`."""
    lengths = [len(text) for text in texts]
    grams = np.concatenate([pack_grams(start + text)[len(start) :] for text in texts])
    first = np.cumsum([0, *lengths[:-1]])
    return np.stack(
        [
            np.add.reduceat(-np.log(p), first)
            for p in witten_bell_probabilities(train[:MAX_TRAIN_BYTES], grams)
        ]
    )


def answer_by_ngrams(train: bytes, examples: Sequence[Example]) -> NgramAnswers:
    """The examples whose answers are the likeliest bytes by n-grams of the best order.

    As with a model, each byte must be the likeliest after the right bytes before it. `train` is
    the training text of the task, with line ends.
    """
    alphabet = np.frombuffer(bytes(sorted(set(train[:MAX_TRAIN_BYTES]))), np.uint8)
    grams, owners = [], []
    for index, example in enumerate(examples):
        packed = pack_grams(b"\n" + example.text.encode())[2 + len(example.question) :]
        grams.append(packed)
        owners += [index] * len(packed)
    right_grams = np.concatenate(grams)  # (G,) each byte of an answer with those before it
    candidates = (right_grams >> BITS_PER_BYTE << BITS_PER_BYTE)[:, None] | alphabet
    is_right_byte = (candidates & np.uint64(255)) == (right_grams & np.uint64(255))[:, None]
    best = NgramAnswers(-1, 1)
    flat = candidates.ravel().astype(np.uint64)
    for order, p in enumerate(witten_bell_probabilities(train[:MAX_TRAIN_BYTES], flat), 1):
        likeliest = p.reshape(candidates.shape).argmax(1)
        is_right = is_right_byte[np.arange(len(likeliest)), likeliest]
        wrong_examples = set(np.array(owners)[~is_right].tolist())
        best = max(best, NgramAnswers(len(examples) - len(wrong_examples), order))
    return best


def answer_by_frequency(train: Sequence[Example], examples: Sequence[Example]) -> int:
    """The number of examples whose answer is the most frequent one of the training examples."""
    counts = Counter(example.answer for example in train)
    most_frequent = max(sorted(counts), key=counts.__getitem__)
    return sum(example.answer == most_frequent for example in examples)
