"""Loss, perplexity and bits per byte of tokens, computed over windows that do not overlap.

Training measures the validation loss with it (training/loop.py), `glasslm evaluate` any text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.data.answer_targets import AnswerFormat
from glasslm.data.chat.conversation_rows import ConversationRows
from glasslm.data.dataset import Split
from glasslm.data.next_token_rows import next_token_rows
from glasslm.data.token_file import Tokens
from glasslm.engines.protocol import Engine
from glasslm.errors import InputError
from glasslm.inference.proportions import Proportion
from glasslm.text import Notify, Progress, ignore_message


class Score(NamedTuple):
    """The result of an evaluation. Non-finite losses of the model give non-finite values.

    `loss` is the mean in nats per predicted token, `perplexity` exp(loss), `bpb` the bits per byte
    of the predicted tokens' text. `tokens` and `bytes` count the predicted tokens and their text.
    `whole`: all tokens but the first were predicted, not only those of a sample of windows. In
    training this includes conversations of which the context cuts the end.
    `stderr` is the standard error of a sample's loss, as an estimate of the loss of the whole.
    Of a synthetic task, training also measures the examples that are answered exactly: `accuracy`
    on held-out examples and `train_accuracy` on examples of the training text.
    """

    loss: float
    perplexity: float
    bpb: float  # NaN where the predicted tokens have no text
    tokens: int
    bytes: int
    whole: bool
    stderr: float | None = None  # nats per token; None: the whole, or a sample of one window
    accuracy: Proportion | None = None
    train_accuracy: Proportion | None = None


class Windows(Protocol):
    """The windows over which a text is scored; each target is in one of them."""

    def __len__(self) -> int: ...

    @property
    def n_targets(self) -> int:
        """The predictions of all windows together, or more."""
        ...

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets, both (len(indices), T); NO_TARGET where nothing is predicted."""
        ...


@dataclass(frozen=True)
class TextWindows:
    """The windows of a text (N,): number i predicts the tokens i T + 1 to i T + T.

    The last window is padded. With `answers`, the format of a synthetic task, answers alone are
    predicted. Reading raises DamagedError where the file of the tokens was cut.
    """

    tokens: Tokens
    block_size: int
    answers: AnswerFormat | None = None

    def __len__(self) -> int:
        return math.ceil(self.n_targets / self.block_size)

    @property
    def n_targets(self) -> int:
        """All tokens but the first."""
        return len(self.tokens) - 1

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As in Windows; T <= `block_size`."""
        width = min(self.block_size, len(self.tokens) - 1)
        starts = (indices * self.block_size).tolist()
        texts = [self.tokens[first : first + width + 1] for first in starts]
        inputs, targets = next_token_rows(texts, width)
        return inputs, self.answers.mask(inputs, targets) if self.answers else targets


@dataclass(frozen=True)
class AnswerWindows:
    """Rows of conversations, in which the answers are predicted."""

    tokens: Tokens  # (N,)
    rows: ConversationRows

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def n_targets(self) -> int:
        """The tokens of answers; a few of them may lie behind the context."""
        return int(np.count_nonzero(self.rows.conversations.answers[:]))

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As in Windows."""
        return self.rows.read(self.tokens, indices)


def split_windows(split: Split, c: ModelConfig) -> Windows:
    """The windows of a split: of its text, or of the answers in its conversations or examples.

    Those of a task hold whole examples.
    """
    if split.conversations is not None:
        return AnswerWindows(split.tokens, ConversationRows(split.conversations, c))
    rest = c.block_size % split.answers.line_length if split.answers else 0
    return TextWindows(split.tokens, c.block_size - rest, split.answers)


def evaluate(
    engine: Engine,
    tokens: Tokens,
    byte_lengths: NDArray[np.int64],
    block_size: int,
    *,
    rows: int = 16,
    max_windows: int | None = None,
    answers: AnswerFormat | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
    notify: Notify = ignore_message,
) -> Score:
    """The score of tokens (N,), an array or a file.

    Every token but the first is predicted once, from the tokens before it in its window of
    `block_size` predictions; windows do not overlap. The engine gets `rows` windows at a time. With
    `max_windows`, that many evenly spaced windows are taken, always the same. With `answers`, the
    format of a synthetic task, answers alone are predicted. `byte_lengths` (V,) holds the size of
    each token's text. Nats are summed in float64. Raises InputError for fewer
    than two tokens. `check_interrupt` is called before each batch; its exception ends the
    evaluation. `notify` receives the progress of a long one.
    """
    if len(tokens) < 2:
        raise InputError(
            f"the text has {len(tokens)} token(s): at least 2 are needed, one to read and one to "
            "predict"
        )
    return evaluate_windows(
        engine, TextWindows(tokens, block_size, answers), byte_lengths, rows=rows,
        max_windows=max_windows, check_interrupt=check_interrupt, notify=notify,
    )  # fmt: skip


def evaluate_windows(
    engine: Engine,
    windows: Windows,
    byte_lengths: NDArray[np.int64],
    *,
    rows: int = 16,
    max_windows: int | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
    notify: Notify = ignore_message,
) -> Score:
    """The score of the targets in `windows`, predicted from the tokens before them in their window.

    The engine gets `rows` windows at a time. With `max_windows`, that many evenly spaced windows
    are taken, always the same. `byte_lengths` (V,) holds the size of each token's text. Nats are
    summed in float64. `check_interrupt` is called before each batch; its exception ends the
    evaluation. `notify` receives the progress of a long one.
    """
    n_windows, n_targets = len(windows), windows.n_targets
    window_indices = choose_windows(n_windows, max_windows)
    n_scored = len(window_indices)
    nats, n_predicted, n_bytes = 0.0, 0, 0
    window_nats, window_counts = list[NDArray[np.float64]](), list[NDArray[np.int64]]()
    progress = Progress(notify)
    for inputs, targets in iterate_windows(windows, window_indices, rows):
        check_interrupt()
        is_predicted = targets >= 0
        losses = engine.losses(inputs, targets)
        nats += float(np.sum(losses, dtype=np.float64))
        if n_scored < n_windows:
            window_nats.append(np.sum(losses, axis=1, dtype=np.float64))
            window_counts.append(np.count_nonzero(is_predicted, axis=1))
        n_predicted += int(np.count_nonzero(is_predicted))
        n_bytes += int(byte_lengths[targets[is_predicted]].sum())
        n_total = max(n_predicted, n_targets * n_scored // n_windows)
        progress.count(n_predicted, n_total, "evaluating", "tokens")
    loss = nats / n_predicted
    stderr = None
    if window_nats:
        sample = np.concatenate(window_nats), np.concatenate(window_counts)
        stderr = standard_error(*sample, n_windows)
    bpb = bits_per_byte(nats, n_bytes)
    return Score(loss, perplexity(loss), bpb, n_predicted, n_bytes, n_scored == n_windows, stderr)


def choose_windows(n_windows: int, max_windows: int | None) -> NDArray[np.int64]:
    """The indices of all windows of a text, or of `max_windows` evenly spaced ones."""
    n_scored = min(n_windows, max_windows or n_windows)
    return np.arange(n_scored) * n_windows // n_scored


def iterate_windows(
    windows: Windows, indices: NDArray[np.int64], rows: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Inputs and targets of the windows with these indices, up to `rows` of them at a time."""
    for first in range(0, len(indices), rows):
        yield windows.read(indices[first : first + rows])


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats per token."""
    return math.inf if loss > 709 else math.exp(loss)  # exp(710) overflows float64


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """The nats of a text of so many bytes, in bits per byte; NaN without bytes."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


def standard_error(
    window_nats: NDArray[np.float64], window_counts: NDArray[np.int64], n_windows: int
) -> float | None:
    """The standard error of the loss of a sample of windows; None for fewer than two windows.

    `window_nats` (n,) holds the sum of each window's losses, `window_counts` (n,) its predictions.
    The loss is a ratio of sums, so this is the error of a ratio estimator (Cochran, Sampling
    Techniques, 1977, chapter 6): that of the mean for windows of equal length. The sample is drawn
    without replacement from `n_windows`, so the error vanishes as n grows to that number.
    """
    n = len(window_nats)
    if n < 2:
        return None
    with np.errstate(invalid="ignore"):  # a non-finite loss gives a non-finite error
        loss = window_nats.sum() / window_counts.sum()
        residuals = (window_nats - loss * window_counts) / window_counts.mean()
        deviation = float(np.std(residuals, ddof=1))
    return deviation * math.sqrt((1 - n / n_windows) / n)
