"""Rows of whole conversations: what a chat run trains on and is measured on.

No conversation is cut at its beginning, so no answer is learned without its question. Several share
a row where attention is kept inside each (engines/documents.py); the rest of a row is padded.
Shapes: N tokens, C conversations, B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glasslm.config.schema import RELATIVE_POSITIONS, ModelConfig
from glasslm.data.next_token_rows import next_token_rows
from glasslm.data.permutation import items_at
from glasslm.data.token_file import TokenFile, Tokens


@dataclass(frozen=True)
class Conversations:
    """Where the conversations of a split are, and which of its tokens (N,) are answers."""

    starts: NDArray[np.int64]  # (C + 1,); the last one is N
    answers: Tokens  # (N,) 1 where the token is part of an answer, else 0
    begin_id: int  # the token that begins every conversation and occurs only there; -1: none

    def __len__(self) -> int:
        return len(self.starts) - 1

    def first_question(self, tokens: Tokens) -> list[int]:
        """The tokens of the first conversation up to its first answer."""
        stop = int(self.starts[1])
        answers = np.asarray(self.answers[0:stop], bool)
        return [int(token) for token in tokens[0 : int(answers.argmax())]]

    def can_share_rows(self, c: ModelConfig) -> bool:
        """Whether a model computes the same for a conversation alone and in a row with others.

        Attention must see where conversations begin, and positions must not count from the row's
        beginning.
        """
        return self.begin_id >= 0 and c.position in RELATIVE_POSITIONS


def read_conversations(folder: Path, name: str, facts: Mapping[str, Any]) -> Conversations | None:
    """The conversations of a split in its files beside NAME.bin; None in a dataset of text.

    `facts` are those of the dataset. Raises OSError for a missing file.
    """
    if "chat" not in facts:
        return None
    starts = np.fromfile(folder / f"{name}.starts.bin", "<i8")
    answers = TokenFile(folder / f"{name}.answers.bin", np.dtype(np.uint8))
    return Conversations(starts, answers, facts["chat"]["begin_id"])


class ConversationRows:
    """The conversations in rows of T + 1 tokens; of a longer one its beginning is taken."""

    def __init__(self, conversations: Conversations, c: ModelConfig) -> None:
        """`c`: the model, whose attention must be kept inside conversations that share rows."""
        self.conversations, self.block_size = conversations, c.block_size
        lengths = np.diff(conversations.starts)
        self._lengths = np.minimum(lengths, self.block_size + 1)
        is_cut = lengths > self._lengths
        self.n_cut = int(np.count_nonzero(is_cut))
        unanswered = [i for i in np.flatnonzero(is_cut).tolist() if not self._marks(i).any()]
        self.n_unanswered = len(unanswered)  # their answers lie behind the context
        answered = np.setdiff1d(np.arange(len(conversations)), unanswered)
        shares = conversations.can_share_rows(c) and c.document_end_id == conversations.begin_id
        if shares and c.document_attention:
            self.rows = _pack(self._lengths, answered, self.block_size + 1)
        else:
            self.rows = [[int(i)] for i in answered]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def n_tokens(self) -> int:
        """The tokens in the rows, without padding."""
        return int(sum(self._lengths[row].sum() for row in self.rows))

    def read(
        self, tokens: Tokens, indices: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets of some rows, both (B, T); NO_TARGET where no answer follows.

        `tokens` (N,) are those of the split.
        """
        texts, marks = [], []
        for index in np.asarray(indices, np.int64).tolist():
            row = self.rows[index]
            starts = [int(self.conversations.starts[i]) for i in row]
            parts = [tokens[a : a + int(self._lengths[i])] for a, i in zip(starts, row)]
            # Token 0 behind them keeps the last one among the inputs, where the row has room.
            texts.append(np.concatenate([*parts, [0]]))
            marks.append(np.concatenate([*map(self._marks, row), [False]]))
        return next_token_rows(texts, self.block_size, marks)

    def _marks(self, i: int) -> NDArray[np.bool_]:
        """Which of the tokens of conversation i that its row has are answers."""
        first = int(self.conversations.starts[i])
        return np.asarray(self.conversations.answers[first : first + int(self._lengths[i])], bool)


class RowSampler:
    """Batches of rows, as a pure function of (seed, step, row).

    Each pass visits every row once, in an order of its own.
    """

    def __init__(self, rows: ConversationRows, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def batch(
        self, tokens: Tokens, step: int, rows: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets, each (len(rows), T), of some rows of the batch of `step`."""
        return self.rows.read(tokens, self._indices(step, rows))

    def window_starts(self, step: int, rows: ArrayLike) -> NDArray[np.int64]:
        """(len(rows),) position in the split of the first token of each row."""
        first = [self.rows.rows[index][0] for index in self._indices(step, rows).tolist()]
        starts: NDArray[np.int64] = self.rows.conversations.starts[first]
        return starts

    def _indices(self, step: int, rows: ArrayLike) -> NDArray[np.int64]:
        places = step * self.batch_size + np.asarray(rows, np.int64)
        return items_at(self.seed, places, len(self.rows))

    def epoch(self, step: int) -> float:
        """Passes over the conversations after `step` steps."""
        return step * self.batch_size / len(self.rows)

    def steps_for(self, epochs: float) -> int:
        """Number of steps that visit every row `epochs` times."""
        return math.ceil(Fraction(str(epochs)) * len(self.rows) / self.batch_size)


def _pack(
    lengths: NDArray[np.int64], conversations: NDArray[np.int64], capacity: int
) -> list[list[int]]:
    """The conversations in few rows of at most `capacity` tokens, by best fit, longest first.

    Each goes to the fullest row that has room for it.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by their free tokens
    rooms = 0  # bit r: a row has r tokens free
    for i in conversations[np.argsort(-lengths[conversations], kind="stable")].tolist():
        length = int(lengths[i])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(i)
        else:
            room, row = capacity, len(rows)
            rows.append([i])
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
