"""Answers as rows of a batch: the answer's tokens are targets, the prompt's and padding are not.

Letters: B rows, T positions of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.data.next_token_rows import next_token_rows
from glasslm.engines.protocol import Engine

Array = NDArray[Any]


class Answer(NamedTuple):
    """A prompt and an answer as tokens, neither of them empty."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


class AnswerRows(NamedTuple):
    """Answers as a batch."""

    tokens: NDArray[np.int64]  # (B, T), padded at the right with token 0, which no target sees
    targets: NDArray[np.int64]  # (B, T), NO_TARGET outside of the answers

    @property
    def is_answer(self) -> NDArray[np.bool_]:
        """(B, T): marks the targets that are tokens of an answer."""
        return self.targets >= 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(B,) tokens of each answer."""
        return self.is_answer.sum(1)


def answer_rows(answers: Sequence[Answer]) -> AnswerRows:
    """The rows of `answers`: every token but the last is read, the tokens of the answer predicted.

    >>> answer_rows([Answer((5, 6), (7, 8)), Answer((5,), (9,))]).targets.tolist()
    [[-1, 7, 8], [9, -1, -1]]
    """
    T = max(len(answer.prompt) + len(answer.tokens) for answer in answers) - 1
    texts = [[*prompt, *tokens] for prompt, tokens in answers]
    is_target = [np.arange(len(text)) >= len(prompt) for text, (prompt, _) in zip(texts, answers)]
    return AnswerRows(*next_token_rows(texts, T, is_target))


def token_nats(engine: Engine, rows: AnswerRows) -> NDArray[np.float64]:
    """(B, T): -log p of each token of the answers under the engine's weights; 0 elsewhere."""
    return np.asarray(engine.losses(rows.tokens, rows.targets), np.float64)
