"""Where the conversations of --chat come from: a file of JSON lines, or the made-up dialogues."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.config.schema import DataConfig
from glasslm.data.chat import dialogues
from glasslm.data.chat.conversations import Conversation, read_conversations
from glasslm.data.sources.text_files import SourceFile
from glasslm.errors import InputError, explain_system_errors

BYTES_PER_CONVERSATION = 500  # for the progress of reading a file


@dataclass(frozen=True)
class ChatSource:
    """The conversations of --chat, and the identity of their file or generator.

    `self_facts`: what a model that learns the dialogues knows of itself (dialogues.py).
    """

    name: str
    files: tuple[SourceFile, ...]
    self_facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, data: DataConfig, self_facts: Mapping[str, str]) -> ChatSource:
        """The source that `data` names. Raises InputError where its file cannot be read."""
        assert data.chat is not None
        if data.chat == dialogues.NAME:
            identity = dialogues.identity(self_facts)
            return cls(dialogues.NAME, (SourceFile(dialogues.NAME, 0, identity),), self_facts)
        path = Path(data.chat).absolute()
        with explain_system_errors(
            path, lambda why: InputError(f"--chat {data.chat} cannot be read: {why}")
        ):
            size, digest = path.stat().st_size, files.file_sha256(path)
        return cls(path.name, (SourceFile(str(path), size, digest),))

    @classmethod
    def reopen(cls, data: DataConfig, facts: Mapping[str, Any]) -> ChatSource:
        """The source of a run; `facts` is the "data" of its run.json, with the path of the file.

        A file that has moved together with the run may still be found by the name in `data`.
        """
        return cls.open(with_recorded_path(data, facts), facts["chat"].get("self_facts", {}))

    @property
    def sha256(self) -> str:
        """Identity of the conversations."""
        return self.files[0].sha256

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json keeps to make the conversations again."""
        return {"self_facts": dict(self.self_facts)} if self.self_facts else {}

    @property
    def estimated_conversations(self) -> int:
        """About how many conversations there are, for the progress of reading them."""
        if self.name == dialogues.NAME:
            return dialogues.N_CONVERSATIONS
        return self.files[0].bytes // BYTES_PER_CONVERSATION

    def conversations(self, data: DataConfig) -> Iterator[tuple[str, Conversation]]:
        """Each conversation with its place for messages, the validation part last.

        Raises InputError for a bad line, and for a file that has changed since it was hashed.
        """
        if self.name == dialogues.NAME:
            n_training, *held_out = count_splits(dialogues.N_CONVERSATIONS, data)
            generated = dialogues.generate(self.self_facts, n_training, sum(held_out))
            for number, dialogue in enumerate(generated, 1):
                yield f"dialogue {number}", dialogue.messages
            return
        path = Path(self.files[0].path)
        yield from read_conversations(path)
        if files.file_sha256(path) != self.sha256:
            raise InputError(f"{path} was changed while it was read: start the command again")


def with_recorded_path(data: DataConfig, facts: Mapping[str, Any]) -> DataConfig:
    """`data` of a run with the recorded path of its conversations, if that file still exists.

    Older runs have the path as it was typed, which may be relative to another folder.
    """
    if data.chat in (None, dialogues.NAME) or not os.path.isfile(facts["files"][0]["path"]):
        return data
    return replace(data, chat=facts["files"][0]["path"])


def count_splits(n: int, data: DataConfig) -> tuple[int, int, int]:
    """How many of n conversations are training, validation and test ones.

    Raises InputError where there is not one for training and one for validation.
    """
    n_test = round(n * data.test_fraction)
    n_val = max(1, round(n * data.val_fraction))
    if n - n_val - n_test < 1:
        raise InputError(
            f"--chat has {n} conversations: expected at least one to train on and one for "
            "validation; add some, or lower --val-fraction and --test-fraction"
        )
    return n - n_val - n_test, n_val, n_test
