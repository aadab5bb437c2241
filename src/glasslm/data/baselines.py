"""Baselines in bits per byte: byte entropy, byte n-grams, gzip and xz.

The n-gram model and the compressors may read the training text first, as a trained model has.
Shapes: N bytes of text, G grams.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.data.library_call import run_interruptibly
from glasslm.data.tokenizers import Tokenizer

MAX_ORDER = 8  # bytes of the longest n-gram, as many as a 64-bit integer holds
DEFLATE_WINDOW_BYTES = 32 << 10  # before the current byte, that gzip can refer to
XZ_TRAIN_BYTES = 1 << 20  # of training text, which xz compresses in about a second

BITS_PER_BYTE = np.uint64(8)

Grams = NDArray[np.uint64]
Counts = NDArray[np.intp]


class Baselines(NamedTuple):
    """Bits per byte of a text."""

    ngrams: tuple[float, ...]  # (MAX_ORDER,) counted in the training text, from order 1
    gzip: float  # of the text alone
    gzip_after: float  # after the last DEFLATE_WINDOW_BYTES of the training text
    xz: float  # of the text alone
    xz_after: float  # after the last XZ_TRAIN_BYTES of the training text

    @property
    def best_order(self) -> int:
        """The order of the best n-grams. It is chosen on the text itself, in their favour."""
        return 1 + self.ngrams.index(min(self.ngrams))


def explain_baseline_text(tokenizer: Tokenizer) -> str:
    """A sentence on what the baselines leave out of a text of this tokenizer; empty for nothing."""
    if not tokenizer.special_tokens:
        return ""
    return (
        "The baselines read the text without special tokens; the model predicts them, too, and its "
        "bits per byte contain that."
    )


def simple_baselines(text: bytes) -> dict[str, float]:
    """Bits per byte without training: the entropy of single bytes, and gzip at level 9.

    >>> simple_baselines(b"abab" * 1000)["unigram_bpb"]
    1.0
    """
    shares = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    shares = shares[shares > 0]
    return {
        "unigram_bpb": float(-(shares * np.log2(shares)).sum()),
        "gzip_bpb": 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text),
    }


def trained_baselines(train: bytes, text: bytes) -> Baselines:
    """All baselines of `text` after they have read `train`; neither may be empty."""
    return run_interruptibly(lambda: _trained_baselines(train, text))


def _trained_baselines(train: bytes, text: bytes) -> Baselines:
    scale, read = 8 / len(text), train[-XZ_TRAIN_BYTES:]
    # xz takes longest and releases the interpreter lock, so it runs beside the others.
    with ThreadPoolExecutor(2) as pool:
        xz_both, xz_read = (pool.submit(_xz_bytes, part) for part in (read + text, read))
        return Baselines(
            ngrams=tuple(ngram_bpb(train, text)),
            gzip=scale * len(gzip.compress(text, compresslevel=9, mtime=0)),
            gzip_after=scale * _gzip_bytes_after(text, train[-DEFLATE_WINDOW_BYTES:]),
            xz=scale * _xz_bytes(text),
            xz_after=scale * (xz_both.result() - xz_read.result()),
        )


def ngram_bpb(train: bytes, text: bytes) -> list[float]:
    """(MAX_ORDER,) bits per byte of `text` by n-grams of order 1 to MAX_ORDER, counted in `train`.

    See `witten_bell_probabilities`.
    """
    return [float(-np.log2(p).mean()) for p in witten_bell_probabilities(train, pack_grams(text))]


def pack_grams(text: bytes) -> Grams:
    """(N,) each byte with the MAX_ORDER - 1 bytes before it, in one integer; the newest is lowest.

    NULs stand before the beginning of the text.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    grams = codes.copy()
    for back in range(1, MAX_ORDER):
        grams[back:] |= codes[:-back] << np.uint64(8 * back)
    return grams


def witten_bell_probabilities(train: bytes, grams: Grams) -> Iterator[NDArray[np.float64]]:
    """For each order from 1 to MAX_ORDER: (G,) probability of the last byte of each gram (G,).

    Method C of Witten and Bell, "The zero-frequency problem" (IEEE Transactions on Information
    Theory 37, 1991), interpolated: a context c that occurs n times in `train`, before t different
    bytes, gives the byte x the probability (n(c x) + t P(x)) / (n + t). P is the probability by the
    context without its oldest byte; without a context it is 1/256. The context of order 1 is empty.
    The probabilities of the 256 bytes add up to 1.
    """
    return interpolated_probabilities(count_grams(train), grams)


def interpolated_probabilities(
    counts: Sequence[tuple[Grams, Counts]], grams: Grams
) -> Iterator[NDArray[np.float64]]:
    """`witten_bell_probabilities` by the `counts` of count_grams, or of its first orders."""
    p = np.full(len(grams), 1 / 256)
    for order, (known_grams, count) in enumerate(counts, 1):
        contexts, begin = _unique(known_grams >> BITS_PER_BYTE)
        n, t = np.add.reduceat(count, begin), np.diff(begin, append=len(known_grams))
        target_grams = grams & _mask(order)
        gram, context = (
            _indices(known_grams, target_grams),
            _indices(contexts, target_grams >> BITS_PER_BYTE),
        )
        # Index -1 stands for grams that are not in `train`: count 0, and P stays as it is.
        count, n, t = np.append(count, 0), np.append(n, 0), np.append(t, 1)
        p = (count[gram] + t[context] * p) / (n[context] + t[context])
        yield p


def count_grams(text: bytes) -> list[tuple[Grams, Counts]]:
    """For each order from 1 to MAX_ORDER: different grams (G,), ascending, and their counts (G,).

    Raises ValueError for an empty text.
    """
    if not text:
        raise ValueError("n-grams cannot be counted in an empty text")
    grams, begin = _unique(np.sort(pack_grams(text)))
    levels = [(grams, np.diff(begin, append=len(text)))]
    for order in range(MAX_ORDER - 1, 0, -1):
        # One ascending run for each oldest byte, which a stable sort merges quickly.
        shorter = levels[-1][0] & _mask(order)
        merged = np.argsort(shorter, kind="stable")
        grams, begin = _unique(shorter[merged])
        levels.append((grams, np.add.reduceat(levels[-1][1][merged], begin)))
    return levels[::-1]


def _mask(order: int) -> np.uint64:
    return np.uint64(2 ** (8 * order) - 1)


def _unique(ordered: Grams) -> tuple[Grams, Counts]:
    """The different values of ascending integers, and the index where each begins."""
    begin = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[begin], begin


def _indices(ordered: Grams, target_grams: Grams) -> Counts:
    """Index of each of `target_grams` in different ascending integers; -1 where it is missing."""
    index = np.minimum(np.searchsorted(ordered, target_grams), len(ordered) - 1)
    return np.where(ordered[index] == target_grams, index, -1)


def _xz_bytes(text: bytes) -> int:
    """Size by xz at its default preset, with a dictionary that fits the input, to save memory."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2 * XZ_TRAIN_BYTES}]
    return len(lzma.compress(text, filters=filters))


def _gzip_bytes_after(text: bytes, before: bytes) -> int:
    """Size of `text` by gzip that may refer to `before`; header and trailer are 18 bytes."""
    deflate = zlib.compressobj(
        9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_DEFAULT_STRATEGY, before
    )
    return len(deflate.compress(text)) + len(deflate.flush()) + 18
