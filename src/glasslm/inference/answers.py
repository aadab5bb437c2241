"""Exact answers of a synthetic task: the share of examples whose answer is right.

An answer is right if greedy decoding writes it, its line end included. Greedy decoding writes it
exactly when each of its tokens is the likeliest after the right tokens before it, so one forward
pass decides and nothing is generated. Letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from glasslm.data.answer_targets import AnswerFormat, answer_format, require_whole_examples
from glasslm.data.token_file import Tokens
from glasslm.engines.protocol import Engine
from glasslm.inference import evaluation
from glasslm.inference.proportions import Proportion
from glasslm.inference.trained_model import WINDOWS_PER_CALL, Model
from glasslm.text import Notify, ignore_message


def likeliest_tokens(engine: Engine, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B, T): the likeliest token after each of tokens (B, T)."""
    B, T = tokens.shape
    cache = engine.new_cache(B, T)
    logits = engine.logits(tokens, cache, np.full(B, T), every=True)
    result: NDArray[np.int64] = logits.argmax(-1)
    return result


def measure_accuracy(
    engine: Engine,
    tokens: Tokens,
    answers: AnswerFormat,
    block_size: int,
    *,
    rows: int,
    max_windows: int | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Proportion:
    """The examples in tokens (N,) that are answered right, of all or of `max_windows` windows.

    The windows are those of `evaluation.evaluate`. The last window may be shorter.
    """
    n_right = n_examples = 0
    indices = evaluation.choose_windows(len(tokens), block_size, max_windows)
    for inputs, targets in evaluation.windows(tokens, block_size, indices, rows, answers):
        check_interrupt()
        right, examples = answers.count_right(likeliest_tokens(engine, inputs), targets)
        n_right, n_examples = n_right + right, n_examples + examples
    return Proportion(n_right, n_examples)


def score_split(
    engine: Engine,
    tokens: Tokens,
    byte_lengths: NDArray[np.int64],
    block_size: int,
    *,
    answers: AnswerFormat | None,
    train_tokens: Tokens | None = None,
    rows: int,
    max_windows: int | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
    notify: Notify = ignore_message,
) -> evaluation.Score:
    """`evaluation.evaluate` of a part of a run's text, with the accuracy where it is a task's.

    As many windows of `train_tokens` are measured for `train_accuracy`.
    """
    score = evaluation.evaluate(
        engine,
        tokens,
        byte_lengths,
        block_size,
        rows=rows,
        max_windows=max_windows,
        answers=answers,
        check_interrupt=check_interrupt,
        notify=notify,
    )
    if answers is None:
        return score

    def accuracy(part: Tokens, n_windows: int | None) -> Proportion:
        return measure_accuracy(
            engine,
            part,
            answers,
            block_size,
            rows=rows,
            max_windows=n_windows,
            check_interrupt=check_interrupt,
        )

    score = score._replace(accuracy=accuracy(tokens, max_windows))
    if train_tokens is None:
        return score
    n_windows = len(evaluation.choose_windows(len(tokens), block_size, max_windows))
    return score._replace(train_accuracy=accuracy(train_tokens, n_windows))


def score_own_text(
    model: Model, tokens: Tokens, notify: Notify = ignore_message
) -> evaluation.Score:
    """The score of a part (N,) of the run's own text, as training measures it.

    Raises InputError where the context does not hold a whole number of examples of the task.
    """
    block_size = model.config.model.block_size
    require_whole_examples(model.config.data, block_size)
    return score_split(
        model.engine,
        tokens,
        model.tokenizer.scored_bytes,
        block_size,
        answers=answer_format(model.config.data, model.tokenizer),
        rows=WINDOWS_PER_CALL,
        notify=notify,
    )
