"""Tokenize conversations once into files of the cache, beside the datasets of texts.

The folder has a file of tokens for each split, as that of a text, and two more: NAME.answers.bin, a
byte for each token that is 1 in answers, and NAME.starts.bin, where each conversation starts. The
last conversations of the file are the validation part. Shapes: N tokens, C conversations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import numpy as np

from glasslm import files, strict_json
from glasslm.config.schema import DataConfig
from glasslm.data.cache import cache_dir, explain_write_errors
from glasslm.data.chat.chat_source import ChatSource, count_splits
from glasslm.data.chat.chat_template import EncodedConversation
from glasslm.data.chat.chat_vocabulary import ChatVocabulary
from glasslm.data.dataset import Dataset, hash_values, lock_folder, reopen_dataset
from glasslm.data.token_file import token_dtype
from glasslm.errors import DamagedError, InputError
from glasslm.text import Notify, Progress

FORMAT = 1  # of the tokens: part of their identity


def prepare_chat_dataset(
    data: DataConfig, source: ChatSource, vocabulary: ChatVocabulary, notify: Notify
) -> Dataset:
    """The tokens of the conversations of `source`, from the cache if it has them.

    Raises InputError for a file that holds no conversations, or one that the template or the
    tokenizer cannot express; ExhaustedError when the disk is full.
    """
    folder = cache_dir("tokens")
    tokenizer, settings = vocabulary.tokenizer, dict(sorted(vocabulary.settings.items()))
    split = (source.sha256, data.val_fraction, data.test_fraction)
    key, old_key = (
        hash_values("chat", FORMAT, *split, identity, settings)
        for identity in (tokenizer.encoding_identity, tokenizer.sha256)
    )
    with explain_write_errors(folder), lock_folder(folder, notify):
        dataset = reopen_dataset(data, key)
        if dataset is None:
            contents = _encode(data, source, vocabulary, key, notify)
            files.write_folder(folder / key, contents)
            dataset = reopen_dataset(data, key)
            assert dataset is not None, f"tokens just written to {folder / key} do not verify"
    own_files = [asdict(file) for file in source.files]
    return replace(dataset, facts=dataset.facts | {"files": own_files}, old_sha256=old_key)


def load_chat_dataset(
    data: DataConfig, facts: dict[str, Any], vocabulary: ChatVocabulary, notify: Notify
) -> Dataset:
    """The dataset of a chat run, from the cache, or made again from its conversations.

    `facts` is the "data" of its run.json. Raises DamagedError where they are missing or changed.
    """
    dataset = reopen_dataset(data, facts["sha256"])
    if dataset is not None:
        return dataset
    try:
        source = ChatSource.reopen(data, facts)
        dataset = prepare_chat_dataset(data, source, vocabulary, notify)
    except InputError as error:
        raise DamagedError(f"the conversations of this run cannot be read again: {error}") from None
    if not dataset.has_identity(facts["sha256"]):
        raise DamagedError(
            "the conversations of this run have changed since: "
            f"their sha256 was {facts['sha256']}, it is {dataset.sha256} now. Put the original back"
        )
    return dataset


def _encode(
    data: DataConfig, source: ChatSource, vocabulary: ChatVocabulary, key: str, notify: Notify
) -> dict[str, Iterable[files.Chunk]]:
    """The files of the dataset's folder."""
    template, progress = vocabulary.template, Progress(notify)
    encoded: list[EncodedConversation] = []
    for place, messages in source.conversations(data):
        try:
            encoded.append(template.encode_conversation(messages))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        message = f"tokenizing conversations: {len(encoded):,}"
        n_expected = max(len(encoded) + 1, source.estimated_conversations)
        progress.update(len(encoded) / n_expected, message)
    parts = _split_conversations(encoded, data)
    facts: dict[str, Any] = {"files": [asdict(file) for file in source.files], "sha256": key}
    facts["chat"] = {
        "begin_id": _find_begin(encoded, vocabulary),
        "end_ids": vocabulary.settings["generation_eos_ids"],
        "template_sha256": sha256(template.source.encode()).hexdigest(),
        **source.facts,
    }
    contents: dict[str, Iterable[files.Chunk]] = {
        "tokenizer.json": [vocabulary.tokenizer.to_json().encode()]
    }
    for name, part in zip(("train", "val", "test"), parts):
        if part:
            contents |= _split_files(name, part, vocabulary, facts)
    return contents | {"facts.json": [strict_json.json_bytes(facts)]}


def _split_conversations(
    encoded: list[EncodedConversation], data: DataConfig
) -> list[list[EncodedConversation]]:
    """The training, validation and test conversations; the last part may be empty."""
    n_train, n_val, _ = count_splits(len(encoded), data)
    return [encoded[:n_train], encoded[n_train : n_train + n_val], encoded[n_train + n_val :]]


def _split_files(
    name: str,
    part: list[EncodedConversation],
    vocabulary: ChatVocabulary,
    facts: dict[str, Any],
) -> dict[str, Iterable[files.Chunk]]:
    """The files of a split; adds its counts to `facts`."""
    ids = np.concatenate([conversation.ids for conversation in part])
    answers = np.concatenate([conversation.is_answer for conversation in part])
    starts = np.cumsum([0, *(len(conversation.ids) for conversation in part)])
    facts |= {
        f"{name}_tokens": len(ids),
        f"{name}_bytes": int(vocabulary.tokenizer.byte_lengths[ids].sum()),
    }
    facts["chat"] |= {
        f"{name}_conversations": len(part),
        f"{name}_answer_tokens": int(answers.sum()),
    }
    return {
        f"{name}.bin": [ids.astype(token_dtype(vocabulary.tokenizer.vocab_size))],
        f"{name}.answers.bin": [answers.astype(np.uint8)],
        f"{name}.starts.bin": [starts.astype("<i8")],
    }


def _find_begin(encoded: list[EncodedConversation], vocabulary: ChatVocabulary) -> int:
    """The special token that begins every conversation and is nowhere else in it; -1: none."""
    begin = int(encoded[0].ids[0])
    is_special = begin in vocabulary.tokenizer.special_tokens.values()
    if is_special and all(
        conversation.ids[0] == begin and np.count_nonzero(conversation.ids == begin) == 1
        for conversation in encoded
    ):
        return begin
    return -1
