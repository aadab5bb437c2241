"""A conversation with a model: its history, and answers that fit into the context."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from glasslm.data.chat.chat_template import ChatTemplate
from glasslm.data.chat.conversations import Conversation
from glasslm.errors import InputError
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import Model
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, plural

ANSWER_SHARE = 4  # one part of so many of the context is kept free for an answer


class ContextFullError(InputError):
    """The messages leave no room for an answer."""


class AnswerSource(Protocol):
    """What answers: a model in this process, or a server."""

    def stream(self, messages: Conversation, seed: int) -> Iterator[str]:
        """The answer to `messages`, piece by piece.

        Raises ContextFullError, before the first piece, where they leave no room for an answer.
        """
        ...


class LocalAnswers:
    """Answers of a loaded model with its chat template."""

    def __init__(
        self, model: Model, template: ChatTemplate, sampling: Sampling, max_new_tokens: int
    ) -> None:
        self._model, self._template = model, template
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        tokenizer = model.tokenizer
        tokenizer.other_end_ids = tokenizer.other_end_ids | template.end_ids

    def stream(self, messages: Conversation, seed: int) -> Iterator[str]:
        """As in AnswerSource."""
        c, limit = self._model.config.model, self._max_new_tokens
        ids = self._template.encode_prompt(messages)
        if not c.has_rolling_cache:
            room = c.block_size - len(ids)
            if room < min(limit, max(1, c.block_size // ANSWER_SHARE)):
                raise ContextFullError(
                    f"the messages have {len(ids):,} tokens, and the context of "
                    f"{c.block_size:,} leaves no room for an answer: write less"
                )
            limit = min(limit, room)
        sampling = dataclasses.replace(self._sampling, seed=seed)
        pieces = self._model.pieces([ids], limit, sampling=sampling)
        return (piece.text for piece in pieces)


class ChatSession:
    """The messages so far, and what of them the model still reads."""

    def __init__(self, source: AnswerSource, seed: int, notify: Notify) -> None:
        """Each answer has a seed of its own, so that the same question gets another answer."""
        self._source, self._seed, self._notify = source, seed, notify
        self.system = ""
        self.turns: Conversation = []  # of the user and the assistant
        self._first = 0  # turns before it are no longer read
        self._n_answers = 0

    @property
    def answered_messages(self) -> Conversation:
        """The message of the system and the turns with an answer; empty where there is none."""
        pairs = zip(self.turns[::2], self.turns[1::2])
        turns = [turn for pair in pairs if pair[1]["content"].strip() for turn in pair]
        return [*self._system_messages, *turns] if turns else []

    def ask(self, question: str) -> Iterator[str]:
        """The answer to a question, piece by piece. What is read of it becomes part of the history.

        The oldest turns are dropped, with a note, where the context is full. Raises InputError
        where the question alone does not fit; the history is then as before.
        """
        pieces = self._start(question)
        self.turns.append({"role": "user", "content": question})
        answer = {"role": "assistant", "content": ""}
        self.turns.append(answer)
        return self._collect(pieces, answer)

    def ask_again(self) -> Iterator[str]:
        """Another answer to the last question, which must exist, in the place of the one before.

        Raises InputError as `ask`.
        """
        turns, first = self.turns, self._first
        self.turns, self._first = turns[:-2], min(first, len(turns) - 2)
        try:
            return self.ask(turns[-2]["content"])
        except BaseException:
            self.turns, self._first = turns, first
            raise

    def reset(self) -> None:
        """Forget the conversation, but not the message of the system."""
        self.turns, self._first = [], 0

    def _start(self, question: str) -> Iterator[str]:
        first, seed = self._first, (self._seed + self._n_answers) % 2**64
        self._n_answers += 1
        asked = {"role": "user", "content": question}
        while True:
            messages = [*self._system_messages, *self.turns[first:], asked]
            try:
                pieces = self._source.stream(messages, seed)
                break
            except ContextFullError:
                if first >= len(self.turns):
                    raise
                first += 2
        if first > self._first:
            dropped = plural((first - self._first) // 2, "turn")
            self._notify(
                f"note: the context is full: the model no longer reads the oldest {dropped}"
            )
        self._first = first
        return pieces

    @property
    def _system_messages(self) -> Conversation:
        return [{"role": "system", "content": self.system}] if self.system else []

    @staticmethod
    def _collect(pieces: Iterator[str], answer: dict[str, str]) -> Iterator[str]:
        for piece in pieces:
            answer["content"] += piece
            yield piece


def read_chat_template(run: Run) -> ChatTemplate:
    """The chat template of a run. Raises InputError where it has none."""
    settings: dict[str, Any] = run.record["tokenizer"].get("transformers", {})
    template = ChatTemplate(settings, run.tokenizer)
    if not template.source:
        raise InputError(
            f"{run.path} has no chat template, because it continues texts: teach it to answer with "
            f"`glasslm finetune {run.path} --full --chat FILE.jsonl`, or use `glasslm generate`"
        )
    return template
