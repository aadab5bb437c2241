"""Exact answers: which answers a model writes, token by token, in a task or in a conversation.

An answer is right if greedy decoding writes it, its end included. Greedy decoding writes it
exactly when each of its tokens is the likeliest after the right tokens before it, so one forward
pass decides and nothing is generated. Letters: B rows, T positions, N answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from glasslm.data.answer_targets import AnswerFormat, require_whole_examples
from glasslm.data.dataset import Split
from glasslm.data.next_token_rows import next_token_rows
from glasslm.data.tasks.task import Example
from glasslm.data.token_file import NO_TARGET, Tokens
from glasslm.engines.protocol import Engine
from glasslm.errors import InputError
from glasslm.inference import evaluation
from glasslm.inference.proportions import Proportion
from glasslm.inference.trained_model import WINDOWS_PER_CALL, Model
from glasslm.text import Notify, ignore_message, plural

EXAMPLES_PER_CALL = 256


def likeliest_tokens(engine: Engine, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B, T): the likeliest token after each of tokens (B, T)."""
    B, T = tokens.shape
    cache = engine.new_cache(B, T)
    logits = engine.logits(tokens, cache, np.full(B, T), every=True)
    result: NDArray[np.int64] = logits.argmax(-1)
    return result


def exact_answers(predictions: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,): whether each answer in targets (..., T) is predicted, all its tokens; row by row.

    An answer is a sequence of targets between two NO_TARGET or ends of a row.

    >>> targets = np.array([[-1, 5, 0, -1, 6, 0], [7, -1, -1, -1, -1, -1]])
    >>> exact_answers(np.array([[9, 5, 0, 9, 6, 1], [7, 9, 9, 9, 9, 9]]), targets).tolist()
    [True, False, True]
    """
    is_answer = targets != NO_TARGET
    is_first = is_answer.copy()
    is_first[..., 1:] &= ~is_answer[..., :-1]
    numbers = np.cumsum(is_first.ravel()) - 1  # of the answer at each position
    is_wrong = (is_answer & (predictions != targets)).ravel()
    exact = np.ones(int(is_first.sum()), bool)
    exact[numbers[is_wrong]] = False
    return exact


def measure_accuracy(
    engine: Engine,
    windows: evaluation.TextWindows,
    *,
    rows: int,
    max_windows: int | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Proportion:
    """The examples of a task that are answered right, of all or of `max_windows` windows.

    The windows are those of `evaluation.evaluate`. The last window may be shorter.
    """
    assert windows.answers is not None
    n_right = n_examples = 0
    indices = evaluation.choose_windows(len(windows), max_windows)
    for inputs, targets in evaluation.iterate_windows(windows, indices, rows):
        check_interrupt()
        exact = exact_answers(likeliest_tokens(engine, inputs), targets)
        n_right, n_examples = n_right + int(exact.sum()), n_examples + len(exact)
    return Proportion(n_right, n_examples)


def score_windows(
    engine: Engine,
    windows: evaluation.Windows,
    byte_lengths: NDArray[np.int64],
    *,
    train_tokens: Tokens | None = None,
    rows: int,
    max_windows: int | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
    notify: Notify = ignore_message,
) -> evaluation.Score:
    """`evaluation.evaluate_windows` of a run's own text, with the accuracy where it is a task's.

    As many windows of `train_tokens` are measured for `train_accuracy`.
    """
    score = evaluation.evaluate_windows(
        engine, windows, byte_lengths, rows=rows, max_windows=max_windows,
        check_interrupt=check_interrupt, notify=notify,
    )  # fmt: skip
    if not isinstance(windows, evaluation.TextWindows) or windows.answers is None:
        return score
    accuracy = partial(measure_accuracy, engine, rows=rows, check_interrupt=check_interrupt)
    score = score._replace(accuracy=accuracy(windows, max_windows=max_windows))
    if train_tokens is None:
        return score
    n_windows = len(evaluation.choose_windows(len(windows), max_windows))
    train_windows = replace(windows, tokens=train_tokens)
    return score._replace(train_accuracy=accuracy(train_windows, max_windows=n_windows))


def score_own_text(model: Model, split: Split, notify: Notify = ignore_message) -> evaluation.Score:
    """The score of a split of the run's own text, as training measures it.

    It is not `whole` where answers lie behind the context; `notify` receives a note then. Raises
    InputError where all of them do, and where the context does not hold a whole number of examples
    of the task.
    """
    data, c = model.config.data, model.config.model
    require_whole_examples(data, c.block_size)
    windows = evaluation.split_windows(split, c)
    if isinstance(windows, evaluation.AnswerWindows) and not len(windows):
        raise InputError(
            f"every answer lies behind the context of {plural(c.block_size, 'token')}: give a "
            "larger --context, or leave it out"
        )
    score = score_windows(
        model.engine, windows, model.tokenizer.scored_bytes, rows=WINDOWS_PER_CALL, notify=notify
    )
    if isinstance(windows, evaluation.AnswerWindows) and score.tokens < windows.n_targets:
        n_left_out = windows.n_targets - score.tokens
        notify(
            f"note: {n_left_out:,} of {windows.n_targets:,} tokens of answers lie behind the "
            f"context of {c.block_size:,} and are not scored"
        )
        return score._replace(whole=False)
    return score


def judge_examples(model: Model, examples: Sequence[Example]) -> NDArray[np.bool_]:
    """(N,): whether the model answers each example exactly; each is read alone, from position 0.

    Raises InputError where the longest example does not fit into the context, or the tokenizer does
    not know a character.
    """
    length = max(len(example.text) for example in examples)
    block_size = model.config.model.block_size
    if length - 1 > block_size:
        raise InputError(
            f"an example has {length} tokens, but the context is {block_size}: give --context"
        )
    mark, line_end = (int(token) for token in model.tokenizer.encode("=\n"))
    answers = AnswerFormat(mark, line_end, length - 1)
    results = []
    for first in range(0, len(examples), EXAMPLES_PER_CALL):
        part = examples[first : first + EXAMPLES_PER_CALL]
        texts = [model.tokenizer.encode(example.text) for example in part]
        inputs, targets = next_token_rows(texts, length - 1)
        predictions = likeliest_tokens(model.engine, inputs)
        results.append(exact_answers(predictions, answers.mask(inputs, targets)))
    return np.concatenate(results)
