"""What a model has to beat: bits per byte of a text by its own bytes, by counted n-grams of bytes, by gzip and by xz.

The n-gram model and the compressors may have read the training text first, as a model has.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDERS = 8  # bytes of the longest n-gram: as many as an integer of 64 bits holds
DEFLATE_WINDOW = 32 << 10  # bytes before the current one that gzip can refer to
XZ_READS = 1 << 20  # bytes of training text, about a second of xz

BYTE = np.uint64(8)  # bits

Grams = NDArray[np.uint64]
Counts = NDArray[np.intp]


class Baselines(NamedTuple):
    """Bits per byte of a text by those who are no neural network."""

    ngrams: tuple[float, ...]  # (ORDERS,) counted in the training text; the first knows no context
    gzip: float  # the text by itself
    gzip_after: float  # the text after the end of the training text, which is all that gzip can look back on
    xz: float
    xz_after: float  # the text after the last XZ_READS bytes of the training text

    @property
    def best_order(self) -> int:
        """The bytes of the best n-grams, the predicted one included: chosen on the text itself, in their favour."""
        return 1 + self.ngrams.index(min(self.ngrams))


def baselines(text: bytes) -> dict[str, float]:
    """Bits per byte without a model: the entropy of the text's own bytes taken one by one, and gzip at its best.

    >>> baselines(b"abab" * 1000)["unigram_bpb"]
    1.0
    """
    shares = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    shares = shares[shares > 0]
    return {
        "unigram_bpb": float(-(shares * np.log2(shares)).sum()),
        "gzip_bpb": 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text),
    }


def after_reading(train: bytes, text: bytes) -> Baselines:
    """All of them on `text` after they have read `train`; neither may be empty."""
    bits, read = 8 / len(text), train[-XZ_READS:]
    with ThreadPoolExecutor(
        2
    ) as pool:  # xz takes longer than all else, and leaves the interpreter to others meanwhile
        xz_both, xz_read = (pool.submit(_xz, part) for part in (read + text, read))
        return Baselines(
            ngrams=tuple(ngram_bpb(train, text)),
            gzip=bits * len(gzip.compress(text, compresslevel=9, mtime=0)),
            gzip_after=bits * _deflated(text, train[-DEFLATE_WINDOW:]),
            xz=bits * _xz(text),
            xz_after=bits * (xz_both.result() - xz_read.result()),
        )


def ngram_bpb(train: bytes, text: bytes) -> list[float]:
    """(ORDERS,) bits per byte of `text` by n-grams of 1 to ORDERS bytes, counted in `train`; see `witten_bell`."""
    return [float(-np.log2(p).mean()) for p in witten_bell(train, packed(text))]


def packed(text: bytes) -> Grams:
    """(len(text),) each byte with the ORDERS - 1 before it, in one integer; the newest is the lowest.

    Before its beginning a text is taken to hold NULs.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    grams = codes.copy()
    for back in range(1, ORDERS):
        grams[back:] |= codes[:-back] << np.uint64(8 * back)
    return grams


def witten_bell(train: bytes, grams: Grams) -> Iterator[NDArray[np.float64]]:
    """For each order from 1 to ORDERS: (len(grams),) the probability of each gram's last byte after those before it.

    Interpolated by method C of Witten and Bell, "The zero-frequency problem" (IEEE Transactions on Information Theory
    37, 1991): a context c that was seen n times, and before t different bytes, gives the byte x
    (n(c x) + t P(x)) / (n + t), where P is the same by the context without its oldest byte, and at last 1/256.
    Without any context before it: the order 1 has c empty. Over the 256 bytes the probabilities add up to 1.
    """
    p = np.full(len(grams), 1 / 256)
    for order, (seen, count) in enumerate(counted(train), 1):
        contexts, begin = _different(seen >> BYTE)
        n, t = np.add.reduceat(count, begin), np.diff(begin, append=len(seen))
        wanted = grams & _mask(order)
        gram, context = _find(seen, wanted), _find(contexts, wanted >> BYTE)
        # What was never seen is found at -1: there it counts nothing, and P is left as it is.
        count, n, t = np.append(count, 0), np.append(n, 0), np.append(t, 1)
        p = (count[gram] + t[context] * p) / (n[context] + t[context])
        yield p


def counted(text: bytes) -> list[tuple[Grams, Counts]]:
    """For each order from 1 to ORDERS the different grams of `text`, ascending, and how often each stands there.

    Raises ValueError for an empty text.
    """
    if not text:
        raise ValueError("n-grams cannot be counted in an empty text")
    seen, begin = _different(np.sort(packed(text)))
    levels = [(seen, np.diff(begin, append=len(text)))]
    for order in range(ORDERS - 1, 0, -1):
        shorter = levels[-1][0] & _mask(
            order
        )  # ascending runs, one for each oldest byte: soon merged, by a stable sort
        merged = np.argsort(shorter, kind="stable")
        seen, begin = _different(shorter[merged])
        levels.append((seen, np.add.reduceat(levels[-1][1][merged], begin)))
    return levels[::-1]


def _mask(order: int) -> np.uint64:
    return np.uint64(2 ** (8 * order) - 1)


def _different(ordered: Grams) -> tuple[Grams, Counts]:
    """The different ones of ascending integers, and where each begins."""
    begin = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[begin], begin


def _find(ordered: Grams, wanted: Grams) -> Counts:
    """Where each of `wanted` stands among different ascending integers; -1 where it does not."""
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[at] == wanted, at, -1)


def _xz(text: bytes) -> int:
    """Bytes that xz writes at its usual preset, with a dictionary no larger than what it reads here: less memory."""
    return len(
        lzma.compress(
            text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2 * XZ_READS}]
        )
    )


def _deflated(text: bytes, before: bytes) -> int:
    """Bytes that gzip writes for `text` when it may refer to `before`, with its header and trailer of 18 bytes."""
    deflate = zlib.compressobj(
        9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_DEFAULT_STRATEGY, before
    )
    return len(deflate.compress(text)) + len(deflate.flush()) + 18
