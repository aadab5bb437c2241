"""Choose the windows of the text that make up the batch of a step.

Shapes: N tokens, B rows, T positions.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glasslm.config.schema import RunConfig
from glasslm.data.answer_targets import AnswerFormat
from glasslm.data.chat.conversation_rows import ConversationRows, RowSampler
from glasslm.data.dataset import Dataset
from glasslm.data.permutation import FEISTEL_ROUNDS, draw_keys, make_philox, permute_indices
from glasslm.data.token_file import Tokens, read_windows


class BatchSampler:
    """Batches of training windows, as a pure function of (seed, step, row).

    By default each row is a window drawn at random, with replacement. With `epochs`, windows do not
    overlap, and each pass visits every window once, in an order of its own. Each pass shifts the
    windows by a phase of its own, so that their edges differ.

    With `answers`, the format of a synthetic task, each window starts with an example, and answers
    alone are targets.
    """

    def __init__(
        self,
        n_tokens: int,
        block_size: int,
        batch_size: int,
        seed: int,
        epochs: bool,
        answers: AnswerFormat | None = None,
    ) -> None:
        assert n_tokens > block_size, "call require_enough_tokens first"
        self.answers = answers
        self.n_tokens, self.block_size, self.batch_size = n_tokens, block_size, batch_size
        self.seed, self.epochs = seed, epochs
        self.windows_per_epoch = (n_tokens - 1) // block_size  # every target is predicted once

    def batch(
        self, tokens: Tokens, step: int, rows: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets, each (len(rows), T), of some rows of the batch of `step`.

        `tokens` is (N,), `rows` is (len(rows),). Steps count from 0. Raises DamagedError where the
        file of the tokens was cut.
        """
        starts = self.window_starts(step, np.asarray(rows, np.int64))
        windows = read_windows(tokens, starts, self.block_size + 1)
        inputs, targets = (np.ascontiguousarray(part) for part in (windows[:, :-1], windows[:, 1:]))
        return inputs, self.answers.mask(inputs, targets) if self.answers else targets

    def window_starts(self, step: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(len(rows),) position of the first token of each row."""
        starts = self._draw_starts(step, rows)
        return starts - starts % self.answers.line_length if self.answers else starts

    def _draw_starts(self, step: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(len(rows),) positions in the whole text, anywhere inside a line."""
        if not self.epochs:
            draws = np.random.Generator(make_philox(self.seed, step)).random(self.batch_size)
            random_starts = (draws * (self.n_tokens - self.block_size)).astype(np.int64)
            chosen: NDArray[np.int64] = random_starts[rows]
            return chosen
        epochs, windows = np.divmod(step * self.batch_size + rows, self.windows_per_epoch)
        starts = np.empty(len(rows), np.int64)
        for epoch in np.unique(epochs):
            keys = draw_keys(self.seed, int(epoch), FEISTEL_ROUNDS + 1)
            phase = int(keys[-1]) % ((self.n_tokens - 1) % self.block_size + 1)
            in_epoch = epochs == epoch
            shuffled = permute_indices(windows[in_epoch], self.windows_per_epoch, keys[:-1])
            starts[in_epoch] = phase + self.block_size * shuffled
        return starts

    def epoch(self, step: int) -> float:
        """Passes over the training tokens after `step` steps."""
        return step * self.batch_size / self.windows_per_epoch

    def steps_for(self, epochs: float) -> int:
        """Number of steps that visit every window `epochs` times."""
        return math.ceil(Fraction(str(epochs)) * self.windows_per_epoch / self.batch_size)


Sampler = BatchSampler | RowSampler


def make_sampler(config: RunConfig, dataset: Dataset) -> Sampler:
    """The batch sampler of a run over the training tokens of `dataset`."""
    train, conversations = config.train, dataset.train.conversations
    if conversations is not None:
        rows = ConversationRows(conversations, config.model)
        return RowSampler(rows, train.batch_size, train.seed)
    return BatchSampler(
        len(dataset.train.tokens),
        config.model.block_size,
        train.batch_size,
        train.seed,
        epochs=train.epochs is not None,
        answers=dataset.train.answers,
    )
