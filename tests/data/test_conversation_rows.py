"""Rows of conversations: each whole and once, answers alone as targets, a pure function of step."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.schema import ModelConfig
from glasslm.data.chat.conversation_rows import ConversationRows, Conversations, RowSampler
from glasslm.data.token_file import NO_TARGET

BEGIN, T = 9, 8
SHARING = ModelConfig(block_size=T, document_attention=True, document_end_id=BEGIN)


def split(lengths: list[int], begin_id: int = BEGIN) -> tuple[np.ndarray, Conversations]:
    """Conversations of numbered tokens; the second half of each is its answer."""
    texts = [[BEGIN, *(100 * i + n for n in range(1, size))] for i, size in enumerate(lengths)]
    answers = [[n >= size - size // 2 for n in range(size)] for size in lengths]
    starts = np.cumsum([0, *lengths])
    marks = np.concatenate(answers).astype(np.uint8)
    return np.concatenate(texts).astype(np.uint16), Conversations(starts, marks, begin_id)


@given(lengths=st.lists(st.integers(2, T + 1), min_size=1, max_size=30))
def test_every_answer_is_a_target_once_after_its_question(lengths: list[int]) -> None:
    tokens, conversations = split(lengths)
    rows = ConversationRows(conversations, SHARING)
    assert sorted(i for row in rows.rows for i in row) == list(range(len(lengths)))
    inputs, targets = rows.read(tokens, range(len(rows)))
    assert inputs.shape == targets.shape == (len(rows), T)
    expected = tokens[np.asarray(conversations.answers[:], bool)]
    assert sorted(targets[targets != NO_TARGET]) == sorted(expected)
    shifted = np.concatenate([inputs[:, 1:], np.zeros((len(rows), 1), int)], 1)
    inner = (targets != NO_TARGET)[:, :-1]
    assert np.array_equal(shifted[:, :-1][inner], targets[:, :-1][inner])


def test_rows_are_filled_as_by_hand() -> None:
    tokens, conversations = split([5, 4, 3, 6])
    rows = ConversationRows(conversations, SHARING)
    assert rows.rows == [[3, 2], [0, 1]]  # 6 + 3 and 5 + 4 tokens: two full rows
    inputs, targets = rows.read(tokens, [1])
    assert inputs.tolist() == [[9, 1, 2, 3, 4, 9, 101, 102]]
    assert targets.tolist() == [[-1, -1, 3, 4, -1, -1, 102, 103]]


@pytest.mark.parametrize(
    ("model", "begin_id"),
    [
        (dataclasses.replace(SHARING, document_attention=False), BEGIN),
        (dataclasses.replace(SHARING, document_end_id=3), BEGIN),
        (dataclasses.replace(SHARING, position="learned"), BEGIN),
        (SHARING, -1),
    ],
)
def test_conversations_that_would_see_each_other_share_no_row(
    model: ModelConfig, begin_id: int
) -> None:
    _, conversations = split([3, 3, 3], begin_id)
    assert ConversationRows(conversations, model).rows == [[0], [1], [2]]


def test_long_conversations_are_cut_at_their_end_and_counted() -> None:
    tokens, conversations = split([14, 40, 3])
    rows = ConversationRows(conversations, SHARING)
    assert (rows.n_cut, rows.n_unanswered) == (2, 1)  # the answer of the second begins at 20
    assert rows.rows == [[0], [2]]
    _, targets = rows.read(tokens, [0])
    assert targets.tolist() == [[-1, -1, -1, -1, -1, -1, 7, 8]]


@given(
    n=st.integers(1, 40), batch=st.integers(1, 7), seed=st.integers(0, 2**32),
    step=st.integers(0, 50),
)  # fmt: skip
def test_each_pass_visits_every_row_once(n: int, batch: int, seed: int, step: int) -> None:
    tokens, conversations = split([T + 1] * n)
    sampler: Any = RowSampler(ConversationRows(conversations, SHARING), batch, seed)
    first = step * n  # positions of a pass that steps need not begin
    seen = []
    for position in range(first, first + n):
        start = sampler.window_starts(position // batch, [position % batch])
        seen += start.tolist()
        inputs, _ = sampler.batch(tokens, position // batch, [position % batch])
        assert np.array_equal(inputs[0], tokens[start[0] : start[0] + T])
    assert sorted(seen) == [(T + 1) * i for i in range(n)]
    assert sampler.steps_for(2) == -(-2 * n // batch)
