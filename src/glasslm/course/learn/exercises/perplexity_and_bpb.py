"""Perplexity and bits per byte, from the losses of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Sizes,
    VerdictName,
)
from glasslm.inference.evaluation import bits_per_byte, perplexity

Measure = Callable[[Array, Array], float]


def perplexity_and_bpb(nats: Array, byte_lengths: Array) -> tuple[float, float]:
    """nats (N,), byte_lengths (N,) -> perplexity, bits per byte."""
    return math.exp(nats.mean()), nats.sum() / math.log(2) / byte_lengths.sum()


def reference(
    nats: Array,
    byte_lengths: Array,
    *,
    perplexity_of: Measure = lambda nats, lengths: perplexity(float(nats.mean())),
    bits_of: Measure = lambda nats, lengths: bits_per_byte(float(nats.sum()), int(lengths.sum())),
) -> dict[str, float]:
    """The measures of `glasslm.inference`, or wrong ones."""
    return {
        "perplexity": perplexity_of(nats, byte_lengths),
        "bpb": bits_of(nats, byte_lengths),
    }


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N = sizes["N"]
    nats = abs(random.array(N)) + 0.3
    byte_lengths = random.integers(1, 7, N)
    n_bytes = int(byte_lengths.sum())
    return Case({**sizes, "bytes": n_bytes}, {"nats": nats, "byte_lengths": byte_lengths})


WRONG_PERPLEXITIES: tuple[tuple[VerdictName, str, Measure], ...] = (
    (
        "factor",
        "the power has the base 2: the losses are in nats, so the base is e",
        lambda nats, lengths: 2.0 ** nats.mean(),
    ),
    (
        "missing_term",
        "the exponent is the sum of the losses: it is their mean",
        lambda nats, lengths: np.exp(nats.sum()),
    ),
    (
        "other",
        "this is the mean of exp(loss): it is exp of the mean loss",
        lambda nats, lengths: np.exp(nats).mean(),
    ),
    (
        "sign",
        "the sign of the exponent: the losses are -log p already",
        lambda nats, lengths: np.exp(-nats.mean()),
    ),
    (
        "factor",
        "the sum of the losses is divided by the bytes: the perplexity is that per "
        "token, exp of the mean loss",
        lambda nats, lengths: np.exp(nats.sum() / lengths.sum()),
    ),
    (
        "other",
        "this is the mean loss: the perplexity is exp of it",
        lambda nats, lengths: nats.mean(),
    ),
    (
        "factor",
        "the exponent is in bits and the base is e: exp takes nats",
        lambda nats, lengths: np.exp(nats.mean() / math.log(2)),
    ),
    (
        "factor",
        "the base is 10: the losses are in nats, so the base is e",
        lambda nats, lengths: 10.0 ** nats.mean(),
    ),
)

WRONG_BITS: tuple[tuple[VerdictName, str, Measure], ...] = (
    (
        "factor",
        "these are nats per byte: divide by log(2)",
        lambda nats, lengths: nats.sum() / lengths.sum(),
    ),
    (
        "factor",
        "multiplied by log(2): a nat is 1 / log(2) bits, so divide by it",
        lambda nats, lengths: nats.sum() * math.log(2) / lengths.sum(),
    ),
    (
        "factor",
        "divided by log10(2): the losses are natural logarithms, so divide by log(2)",
        lambda nats, lengths: nats.sum() / math.log10(2) / lengths.sum(),
    ),
    (
        "factor",
        "these are bits per token: divide the sum by the bytes",
        lambda nats, lengths: nats.mean() / math.log(2),
    ),
    (
        "other",
        "this is the mean of each token's bits per byte: divide the sum of all bits by "
        "the sum of all bytes, so that long tokens count by their length",
        lambda nats, lengths: (nats / lengths).mean() / math.log(2),
    ),
    (
        "factor",
        "the mean loss is divided by the bytes of the whole text: it is the sum",
        lambda nats, lengths: nats.mean() / math.log(2) / lengths.sum(),
    ),
    (
        "factor",
        "multiplied by the bytes: divide by them",
        lambda nats, lengths: nats.sum() / math.log(2) * lengths.sum(),
    ),
    (
        "factor",
        "the sum is divided by the mean length: it is divided by the sum of all bytes",
        lambda nats, lengths: nats.sum() / math.log(2) / lengths.mean(),
    ),
    (
        "factor",
        "divided by bits in place of bytes, or the reverse: there is a factor of 8",
        lambda nats, lengths: nats.sum() / math.log(2) / lengths.sum() * 8,
    ),
    (
        "factor",
        "divided by bits in place of bytes, or the reverse: there is a factor of 8",
        lambda nats, lengths: nats.sum() / math.log(2) / lengths.sum() / 8,
    ),
)

EXERCISE = Exercise(
    name="perplexity_and_bpb",
    title="perplexity, bits per byte",
    task="Two measures of a text from the losses of its tokens: the perplexity exp(mean loss per "
    "token), and the bits per byte, the sum of the losses in bits over the bytes of the text.",
    signature="perplexity_and_bpb(nats, byte_lengths)",
    shapes="""nats          (N,)  the loss of each token, -log p, with the natural logarithm
byte_lengths  (N,)  the number of bytes of each token, integers
returns       perplexity, bpb: two floats""",
    reference=reference,
    sizes=Sizes.of("N", small="1, 2, 3", distinct="5, 8, 13", equal="6, 9, 14"),
    draw=draw,
    hints=(
        "The perplexity undoes the logarithm of the mean loss: of a uniform guess among V tokens "
        "it is V.",
        "A nat is 1 / log(2) bits, because log2(x) = log(x) / log(2).",
        "Tokenizers cut a text into different numbers of tokens, and its bytes stay the same. So "
        "divide the sum of all bits by the sum of all bytes.",
        "math.exp(nats.mean()), nats.sum() / math.log(2) / byte_lengths.sum().",
    ),
    derivation="Perplexity and bits per byte",
    solution="course/learn/exercises/perplexity_and_bpb.py:perplexity_and_bpb",
    needs=("cross_entropy",),
    outputs=("perplexity", "bpb"),
    mistakes=(
        *(
            Mistake(verdict, "perplexity", sentence, {"perplexity_of": measure})
            for verdict, sentence, measure in WRONG_PERPLEXITIES
        ),
        *(
            Mistake(verdict, "bpb", sentence, {"bits_of": measure})
            for verdict, sentence, measure in WRONG_BITS
        ),
    ),
    keeps_dtype=False,
)
