"""Baselines, against direct counts, known entropies and the compressors themselves."""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.data.baselines import (
    MAX_ORDER,
    count_grams,
    ngram_bpb,
    pack_grams,
    simple_baselines,
    trained_baselines,
    witten_bell_probabilities,
)

# Few different bytes, so that contexts come again; 0 and 255 among them, where integers end.
TEXTS = st.lists(st.sampled_from([0, 97, 98, 255]), min_size=1, max_size=60).map(bytes)


def witten_bell_by_hand(train: bytes, context: bytes, x: int, order: int) -> float:
    """Witten and Bell's probability of byte x after MAX_ORDER - 1 bytes, one count at a time."""
    padded = bytes(MAX_ORDER - 1) + train
    p = 1 / 256
    for width in range(order):  # bytes of context
        suffix = context[len(context) - width :]
        after = [
            padded[i] for i in range(MAX_ORDER - 1, len(padded)) if padded[i - width : i] == suffix
        ]
        if after:
            kinds = len(set(after))
            p = (after.count(x) + kinds * p) / (len(after) + kinds)
    return p


@given(TEXTS, TEXTS)
def test_ngrams_are_those_counted_by_hand(train: bytes, text: bytes) -> None:
    padded = bytes(MAX_ORDER - 1) + text
    for order, bpb in enumerate(ngram_bpb(train, text), 1):
        by_byte = [
            witten_bell_by_hand(
                train, padded[i : i + MAX_ORDER - 1], padded[i + MAX_ORDER - 1], order
            )
            for i in range(len(text))
        ]
        assert bpb == pytest.approx(-sum(map(math.log2, by_byte)) / len(text), rel=1e-12)


@given(TEXTS, st.binary(min_size=MAX_ORDER - 1, max_size=MAX_ORDER - 1) | st.just(b"ababab\x00"))
def test_after_any_context_the_probabilities_of_all_bytes_add_up_to_one(
    train: bytes, context: bytes
) -> None:
    grams = np.array([pack_grams(context + bytes([x]))[-1] for x in range(256)])
    for p in witten_bell_probabilities(train, grams):
        assert p.sum() == pytest.approx(1, rel=1e-12)
        assert p.min() > 0


@given(TEXTS)
def test_every_gram_is_counted(text: bytes) -> None:
    padded = bytes(MAX_ORDER - 1) + text
    for order, (grams, counts) in enumerate(count_grams(text), 1):
        wanted = Counter(padded[i - order : i] for i in range(MAX_ORDER, len(padded) + 1))
        assert {
            int(gram).to_bytes(order, "big"): int(n) for gram, n in zip(grams, counts)
        } == wanted


def test_a_text_from_a_known_chain_costs_its_entropy() -> None:
    """The next byte depends on the last two, so n-grams of order 3 are the best possible."""
    draw = np.random.default_rng(5)
    chain = draw.dirichlet(np.full(4, 0.4), size=(4, 4)).cumsum(-1)
    states, uniform = [0, 1], draw.random(120_000)
    for u in uniform:
        states.append(min(3, int(np.searchsorted(chain[states[-2], states[-1]], u))))
    text = np.array(states, np.uint8).tobytes()
    train, unseen = text[:100_000], text[100_000:]
    steps = np.diff(chain, axis=-1, prepend=0)
    entropy = -np.mean(
        [math.log2(steps[a, b, c]) for a, b, c in zip(unseen, unseen[1:], unseen[2:])]
    )
    bpb = ngram_bpb(train, unseen)
    assert bpb[2] == pytest.approx(entropy, rel=0.01)
    assert bpb[0] > bpb[1] > 1.05 * entropy
    assert min(bpb) > 0.99 * entropy
    assert trained_baselines(train, unseen).best_order == 3


def test_ngrams_know_a_text_that_they_have_read() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5_000, dtype=np.uint8).tobytes()
    assert min(ngram_bpb(noise, noise)) < 1.5
    assert min(ngram_bpb(noise[::-1], noise)) > 7.9


def test_compressors_alone_and_after_reading() -> None:
    draw = np.random.default_rng(1)
    words = [draw.integers(97, 123, 6, dtype=np.uint8).tobytes() + b" " for _ in range(300)]
    train, text = (b"".join(words[i] for i in draw.integers(0, 300, n)) for n in (20_000, 1_000))
    measured = trained_baselines(train, text)
    bits = 8 / len(text)
    assert measured.gzip == pytest.approx(bits * len(gzip.compress(text)))
    assert measured.xz == pytest.approx(bits * len(lzma.compress(text)))
    assert measured.xz_after == pytest.approx(
        bits * (len(lzma.compress(train + text)) - len(lzma.compress(train)))
    )
    difference = len(gzip.compress(train + text)) - len(gzip.compress(train))
    assert measured.gzip_after == pytest.approx(bits * difference, rel=0.05)
    assert measured.gzip_after < 0.9 * measured.gzip
    assert measured.xz_after < 0.9 * measured.xz
    assert measured.ngrams == tuple(ngram_bpb(train, text))


def test_baselines_are_entropy_and_gzip() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    assert simple_baselines(noise)["unigram_bpb"] == pytest.approx(8, abs=0.01)
    assert simple_baselines(noise)["gzip_bpb"] == pytest.approx(8, abs=0.01)
    assert simple_baselines(b"aaaa")["unigram_bpb"] == 0
    text = b"to be or not to be " * 50
    assert simple_baselines(text)["gzip_bpb"] == pytest.approx(
        8 * len(gzip.compress(text)) / len(text)
    )


def test_shakespeares_best_ngram(data_dir: Path) -> None:
    text = (data_dir / "tinyshakespeare.txt").read_bytes()
    bpb = ngram_bpb(text[:1_003_854], text[1_003_854:])
    assert min(bpb) == bpb[4] == pytest.approx(2.408, abs=0.001)
    assert bpb[0] == pytest.approx(4.829, abs=0.001)
