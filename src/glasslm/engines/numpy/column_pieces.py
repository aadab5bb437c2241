"""Matrices in pieces of columns, for products of a few rows without a copy.

OpenBLAS copies a matrix into another layout before it multiplies, which takes as long as 8 rows.
Its kernel for AVX-512 has a second way, for small products: it reads the matrix where it lies. Here
a large product consists of small ones, whose matrices are contiguous. The bits of a row do not
depend on the number of rows of a small product (docs/log.md, 2026-11-30).

N rows, I and O input and output of a matrix, P pieces, C columns of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from glasslm.engines.numpy.ops import Array

MAX_ROWS = 16  # of a product by pieces
MIN_ROWS = 2  # one row is computed by another function of BLAS, with other bits
# N I C of a small product, in OpenBLAS: kernel/x86_64/sgemm_small_kernel_permit_skylakex.c.
MAX_SMALL_PRODUCT = 1_000_000
WIDTHS = (64, 32, 16)  # C, the fastest first
MAX_PADDING = 1.25  # columns with those of zeros that fill the last piece, as a share of O


def has_small_products(libraries: Sequence[Any], shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether NumPy's kernel has small products, and pieces of all matrices (O, I) fit into them.

    `libraries` are the controllers of threadpoolctl of this process. With other kernels pieces gain
    nothing, and bits depend on the number of rows.
    """
    if not libraries:
        return False
    numpys = libraries[0]  # loaded first; PyTorch and SciPy may bring others
    has_kernel = numpys.internal_api == "openblas" and numpys.architecture == "SkylakeX"
    longest = max(shape[1] for shape in shapes if len(shape) == 2)
    return has_kernel and MAX_ROWS * longest * WIDTHS[-1] <= MAX_SMALL_PRODUCT


class ColumnPieces:
    """The pieces of matrices, a copy of each, made when it is first multiplied.

    A later change of a matrix is not seen: make a new object after it.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[Array, Array]] = {}  # by id: a matrix, kept alive, and pieces

    def product(self, x: Array, w: Array) -> Array:
        """x (N, I), MIN_ROWS <= N <= MAX_ROWS, w (O, I) -> x wᵀ (N, O).

        w must be the same object in every call.
        """
        if (entry := self._pieces.get(id(w))) is None:
            entry = self._pieces[id(w)] = (w, cut_columns(w))
        pieces, n_outputs = entry[1], len(w)
        P, _, C = pieces.shape
        y = np.empty((len(x), P * C), x.dtype)
        np.matmul(x, pieces, out=y.reshape(len(x), P, C).swapaxes(0, 1))
        return y if n_outputs == P * C else np.ascontiguousarray(y[:, :n_outputs])


def cut_columns(w: Array) -> Array:
    """w (O, I) -> the columns of wᵀ as (P, I, C), filled up with zeros."""
    n_outputs, n_inputs = w.shape

    def is_fast(width: int) -> bool:
        is_small = MAX_ROWS * n_inputs * width <= MAX_SMALL_PRODUCT
        return is_small and math.ceil(n_outputs / width) * width <= MAX_PADDING * n_outputs

    width = next(filter(is_fast, WIDTHS), WIDTHS[-1])
    padded = np.zeros((math.ceil(n_outputs / width) * width, n_inputs), w.dtype)
    padded[:n_outputs] = w
    return np.ascontiguousarray(padded.reshape(-1, width, n_inputs).swapaxes(1, 2))
