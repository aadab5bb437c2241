"""The range of token ids: both engines refuse the same ids with the same message."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from glasslm.engines.protocol import NO_TARGET
from glasslm.errors import InputError


def require_token_ids(
    vocab_size: int, tokens: NDArray[Any], targets: NDArray[Any] | None = None
) -> None:
    """Raise InputError for an id outside the vocabulary, of any shapes; targets may be NO_TARGET.

    NumPy would clip such an id or count it from the end, PyTorch on a GPU would end the process.
    """
    for name, ids, lowest in (("token", tokens, 0), ("target", targets, NO_TARGET)):
        if ids is None or not ids.size:
            continue
        for extreme in (int(ids.max()), int(ids.min())):
            if not lowest <= extreme < vocab_size:
                raise InputError(
                    f"the {name} {extreme} is not in the vocabulary: expected ids from 0 to "
                    f"{vocab_size - 1:,}. Encode the text with the tokenizer of this model"
                )
