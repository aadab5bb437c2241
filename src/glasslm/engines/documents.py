"""Documents in a row of tokens: attention may be kept inside each of them.

The token that ends a document belongs to the next one: it is what the first prediction of the next
document attends to, so no logits depend on another document. Both engines use this module.
Letters: B rows, T positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig

Array = NDArray[Any]


def end_token(c: ModelConfig) -> int | None:
    """The token that ends documents, if attention is kept inside them."""
    if not c.document_attention:
        return None
    assert c.document_end_id >= 0, "with_document_end first"
    return c.document_end_id


def document_starts(c: ModelConfig, tokens: Array) -> NDArray[np.int64] | None:
    """(B, T): where the document of each token starts, of tokens (B, T) from position 0 on.

    None: attention is not kept inside documents.
    """
    B, T = tokens.shape
    return continued_starts(c, tokens, np.zeros(B, np.int64), np.full(B, T), np.zeros(B, np.int64))


def continued_starts(
    c: ModelConfig,
    tokens: Array,
    lengths: NDArray[np.int64],
    counts: NDArray[np.int64],
    last_starts: NDArray[np.int64],
) -> NDArray[np.int64] | None:
    """`document_starts` of the first counts[b] of tokens (B, T) after lengths[b] others, (B, T).

    last_starts (B,): where the last document of each row started.
    """
    end = end_token(c)
    if end is None:
        return None
    columns = np.arange(tokens.shape[1])
    is_end = (tokens == end) & (columns < counts[:, None])
    starts = np.where(is_end, lengths[:, None] + columns, last_starts[:, None])
    result: NDArray[np.int64] = np.maximum.accumulate(starts, axis=1)
    return result


def last_document_start(c: ModelConfig, tokens: NDArray[np.int64]) -> int:
    """Where the last document of tokens (T,) starts; 0 without attention inside documents."""
    starts = document_starts(c, tokens[None])
    return 0 if starts is None else int(starts[0, -1])
