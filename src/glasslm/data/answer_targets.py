"""The answers of a synthetic task in its tokens: they alone are predicted.

A target is part of an answer if "=" stands before it in its line; the line end that closes the
answer is part of it. Letters: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import DataConfig
from glasslm.data.tasks import catalogue
from glasslm.data.token_file import NO_TARGET
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import InputError


@dataclass(frozen=True)
class AnswerFormat:
    """How the tokens of a task are divided into examples, and these into question and answer."""

    mark: int  # the token of "="
    line_end: int
    line_length: int  # tokens of an example

    def mask(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The targets (B, T) of tokens (B, T), with NO_TARGET for those that are no answers."""
        positions = np.arange(tokens.shape[1])

        def last_position(token: int) -> NDArray[np.int64]:
            """(B, T) where the token occurred last; -1 before its first."""
            occurrences = np.where(tokens == token, positions, -1)
            result: NDArray[np.int64] = np.maximum.accumulate(occurrences, axis=1)
            return result

        is_answer = last_position(self.mark) > last_position(self.line_end)
        return np.where(is_answer, targets, NO_TARGET)


def answer_format(data: DataConfig, tokenizer: Tokenizer) -> AnswerFormat | None:
    """The format of the task that `data` names; None for other texts."""
    if data.task is None:
        return None
    mark, line_end = (int(token) for token in tokenizer.encode("=\n"))
    return AnswerFormat(mark, line_end, catalogue.line_length(data))


def require_whole_examples(data: DataConfig, block_size: int) -> None:
    """Raise InputError unless a context holds a whole number of examples."""
    if data.task is None:
        return
    length = catalogue.line_length(data)
    if block_size % length:
        raise InputError(
            f"--block-size is {block_size}, but an example of {data.corpus} has {length} tokens: "
            f"give --block-size {length}, or a multiple of it"
        )
