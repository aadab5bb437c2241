"""Tokenize a text once into files of the cache, and reopen them.

A dataset is the folder tokens/<sha256>/ of the cache, where the hash is the identity of text, split
and tokenizer. The folder gets its name when it is complete, with a manifest of hashes (files.py),
and is built again if a hash does not match. Shapes: N tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from glasslm import files, strict_json
from glasslm.config.data_config import END_OF_TEXT
from glasslm.config.schema import DataConfig
from glasslm.data import dataset_notes, tokenizers
from glasslm.data.answer_targets import AnswerFormat, answer_format
from glasslm.data.cache import cache_dir, explain_write_errors
from glasslm.data.chat.conversation_rows import Conversations, read_conversations
from glasslm.data.sources import corpora
from glasslm.data.sources.text_files import Source
from glasslm.data.special_tokens import TokenPattern
from glasslm.data.tasks.catalogue import line_length
from glasslm.data.text_pieces import cut_between_words, subsample
from glasslm.data.text_split import TextSurvey, split_text, survey_text
from glasslm.data.token_file import TokenArray, TokenFile, Tokens, token_dtype
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import DamagedError, InputError, raise_if_exhausted
from glasslm.text import Notify, Progress

RECIPE_FORMAT = 3  # part of the name of a recipe
PIECE_CHARACTERS = 1 << 20  # tokenized at once
MAX_BPE_SAMPLE_BYTES = 50_000_000  # of the training text that BPE is trained on


@dataclass(frozen=True)
class Split:
    """One part of the text."""

    tokens: Tokens  # (N,)
    bytes: int  # of its text
    conversations: Conversations | None = None
    answers: AnswerFormat | None = None  # of a synthetic task


@dataclass(frozen=True)
class Dataset:
    """A tokenized text.

    `facts` is the "data" of run.json. `sha256` identifies text, split and tokenizer together.
    `old_sha256` is the identity that versions gave which applied the dropout of a tokenizer.
    """

    tokenizer: Tokenizer
    train: Split
    val: Split
    test: Split | None
    facts: dict[str, Any]
    sha256: str
    old_sha256: str = ""

    def has_identity(self, sha256: str) -> bool:
        """Whether a run with this identity has the same text, split and tokenizer."""
        return sha256 in (self.sha256, self.old_sha256)


def prepare_dataset(
    data: DataConfig, source: Source, notify: Notify, tokenizer: Tokenizer | None = None
) -> Dataset:
    """The tokens of `source`, from the cache if it has them.

    Without `tokenizer`, the one that `data` asks for is used. Raises InputError for an empty text,
    bad UTF-8 or an unusable tokenizer, ExhaustedError when the disk is full.
    """
    unused = _unused_special_tokens(data, tokenizer)
    folder = cache_dir("tokens")
    recipe = folder / f"{_recipe_name(data, source)}.json" if tokenizer is None else None
    with explain_write_errors(folder), lock_folder(folder, notify):
        dataset = None
        if tokenizer is not None:
            dataset = reopen_dataset(data, _identity(data, source, tokenizer.encoding_identity))
        elif recipe is not None and recipe.is_file():
            dataset = reopen_dataset(data, recipe.read_text("utf-8", errors="replace"))
        if dataset is None:
            key = _build_dataset(folder, data, source, notify, tokenizer, unused)
            if recipe is not None:
                files.write_atomic(recipe, key.encode())
            dataset = reopen_dataset(data, key)
            assert dataset is not None, f"tokens just written to {folder / key} do not verify"
    dataset_notes.notify_special_tokens(dataset.facts, data, notify)
    dataset_notes.notify_validation_files(source, dataset.facts, notify)
    if tokenizer is None and data.tokenizer == "bpe":
        dataset_notes.notify_small_vocabulary(dataset.tokenizer.vocab_size, data.vocab_size, notify)
    own_files = [asdict(file) for file in source.files]
    old_sha256 = _identity(data, source, dataset.tokenizer.sha256)
    return replace(dataset, facts=dataset.facts | {"files": own_files}, old_sha256=old_sha256)


def reopen_dataset(data: DataConfig, data_sha256: str) -> Dataset | None:
    """The dataset of this identity; None if the cache does not have it or it is damaged.

    `data` says which task it is of.
    """
    folder = cache_dir("tokens") / data_sha256
    try:
        files.verify_folder(folder)
        tokenizer = tokenizers.read_tokenizer(folder / "tokenizer.json")
        facts, dtype = files.read_json(folder / "facts.json"), token_dtype(tokenizer.vocab_size)
        answers = answer_format(data, tokenizer)
        parts = {
            name: Split(
                TokenFile(folder / f"{name}.bin", dtype),
                facts[f"{name}_bytes"],
                read_conversations(folder, name, facts),
                answers,
            )
            for name in ("train", "val", "test")
            if f"{name}_tokens" in facts
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise_if_exhausted(error, folder)
        return None  # It is missing or damaged. DamagedError is an OSError.
    tokenizer.other_end_ids = frozenset(facts.get("chat", {}).get("end_ids", ()))
    tokenizer.compare_bytes(parts["val"].tokens, parts["val"].bytes)
    return Dataset(tokenizer, parts["train"], parts["val"], parts.get("test"), facts, data_sha256)


def load_run_dataset(
    data: DataConfig, facts: dict[str, Any], tokenizer: Tokenizer, notify: Notify
) -> Dataset:
    """The dataset of a run, from the cache, or built again from its text.

    `facts` is the "data" of its run.json. Raises DamagedError when the text is missing or has
    changed.
    """
    dataset = reopen_dataset(data, facts["sha256"])
    if dataset is None:
        source = corpora.find_run_source(data, facts, notify)
        dataset = prepare_dataset(data, source, notify, tokenizer)
        if not dataset.has_identity(facts["sha256"]):
            raise DamagedError(
                "the text of this run has changed since: "
                f"its sha256 was {facts['sha256']}, not {dataset.sha256}: put the original back"
            )
    return dataset


def tokenize_source(source: Source, tokenizer: Tokenizer, errors: str) -> TokenArray:
    """The whole text as tokens (N,), mapped from a temporary file.

    The file has no name, so no other program can cut it.
    """
    folder, dtype = cache_dir(), token_dtype(tokenizer.vocab_size)
    with explain_write_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        special = TokenPattern(tuple(tokenizer.special_tokens))
        for text in cut_between_words(source.text(errors), PIECE_CHARACTERS, special):
            file.write(tokenizer.encode(text).astype(dtype).tobytes())
        file.flush()
        return np.memmap(file, dtype, mode="r") if file.tell() else np.zeros(0, dtype)


def require_enough_tokens(dataset: Dataset, block_size: int, batch_size: int = 1) -> None:
    """Raise InputError unless each part of a text holds a window, the training part a batch, and
    there are two different tokens or more: the next token of one is no question, and ln 1 is 0."""
    cures = {
        "training": "",
        "validation": ", a larger --val-fraction",
        "test": ", a larger --test-fraction",
    }
    splits = zip(cures.items(), (dataset.train, dataset.val, dataset.test), strict=True)
    for (name, cure), split in splits:
        if split is None or split.conversations or len(split.tokens) > block_size:
            continue
        raise InputError(
            f"the {name} part has {len(split.tokens)} tokens ({split.bytes} bytes), but a window "
            f"of --block-size {block_size} takes {block_size + 1}: "
            f"use a smaller --block-size{cure}, or more text"
        )
    if dataset.tokenizer.vocab_size < 2:
        token = dataset.tokenizer.decode([0])
        raise InputError(
            f"the vocabulary is the single token {token!r}, so there is nothing to predict: "
            "use a text with two different characters or more, or --tokenizer byte"
        )
    n_windows = len(dataset.train.tokens) - block_size
    if batch_size > n_windows and not dataset.train.conversations:
        raise InputError(
            f"the training part has {len(dataset.train.tokens)} tokens, which make {n_windows} "
            f"different windows of {block_size}, but a batch takes {batch_size}: "
            "use a smaller --batch-size or --block-size, or more text"
        )


def _recipe_name(data: DataConfig, source: Source) -> str:
    """Hash of text, split and requested tokenizer.

    The recipe records which dataset it led to, so that a second run need not train the tokenizer.
    """
    tokenizer: list[Any] = [data.tokenizer]
    if data.tokenizer == "bpe":
        tokenizer.append(data.vocab_size)
    elif data.tokenizer not in tokenizers.TOKENIZER_KINDS:
        tokenizer = [tokenizers.read_tokenizer(data.tokenizer).encoding_identity]
    split = (data.encoding_errors, data.val_fraction, data.test_fraction)
    return hash_values(RECIPE_FORMAT, source.sha256, *split, *tokenizer, *_text_settings(data))


def _identity(data: DataConfig, source: Source, tokenizer: str) -> str:
    """Hash of text, split and the identity of the tokenizer: the name of a dataset's folder."""
    split = (data.encoding_errors, data.val_fraction, data.test_fraction)
    return hash_values(source.sha256, *split, tokenizer, *_text_settings(data))


def _text_settings(data: DataConfig) -> list[Any]:
    """The settings that decide where documents or a task's examples end; empty without either."""
    if data.task:
        return [data.task, line_length(data)]
    tokens = list(data.used_special_tokens)
    return [tokens, data.document_separator] if tokens else []


def _unused_special_tokens(data: DataConfig, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """The special tokens of the vocabulary that are ordinary text in this dataset."""
    if data.used_special_tokens:
        return ()
    if tokenizer is None and data.tokenizer not in tokenizers.TOKENIZER_KINDS:
        tokenizer = tokenizers.read_tokenizer(data.tokenizer)
    return tokenizer.unused_special_tokens if tokenizer else ()


def hash_values(*values: Any) -> str:
    """The SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@contextmanager
def lock_folder(folder: Path, notify: Notify) -> Iterator[None]:
    """Let one process at a time build; remove what an interrupted one left behind."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        notify("waiting for another process that is preparing tokens")
        lock.acquire()
    try:
        files.remove_leftovers(folder)
        yield
    finally:
        lock.release()


def _build_dataset(
    folder: Path,
    data: DataConfig,
    source: Source,
    notify: Notify,
    tokenizer: Tokenizer | None,
    unused: tuple[str, ...],
) -> str:
    """Tokenize the text into folder/<identity>; returns the identity.

    `unused`: special tokens of the vocabulary that are ordinary text.
    """
    source = with_vocabulary(source, data, tokenizer)
    if data.document_separator:
        source.require_separator(data.encoding_errors)
    dataset_notes.notify_reading(source, notify)
    survey = survey_text(source, data.encoding_errors, unused)
    dataset_notes.notify_survey(survey, source, data, folder, notify)
    if tokenizer is None:
        tokenizer = _make_tokenizer(data, source, survey, notify)
    key = _identity(data, source, tokenizer.encoding_identity)
    facts: dict[str, Any] = {"files": [asdict(file) for file in source.files], "sha256": key}
    facts |= {"special_tokens": survey.special_tokens} if survey.special_tokens else {}
    facts |= {"spelled_special_tokens": survey.spellings} if survey.spellings else {}
    parts = itertools.groupby(split_text(source, data, survey.bytes), key=lambda piece: piece[0])

    def facts_json() -> Iterator[bytes]:
        # write_folder reads this last, when the tokens of all parts are counted.
        yield strict_json.json_bytes(facts)

    progress = Progress(notify)
    contents: dict[str, Iterable[files.Chunk]] = {"tokenizer.json": [tokenizer.to_json().encode()]}
    for name in ("train", "val", "test")[: 3 if data.test_fraction else 2]:
        contents[f"{name}.bin"] = _tokenize_part(
            name, parts, tokenizer, facts, survey.bytes, progress
        )
    files.write_folder(folder / key, contents | {"facts.json": facts_json()})
    return key


def with_vocabulary(source: Source, data: DataConfig, tokenizer: Tokenizer | None) -> Source:
    """`source` with all special tokens of the vocabulary, if its documents have ends."""
    if source.documents is None:
        return source
    tokens: Iterable[str] = ()
    if tokenizer is not None:
        tokens = tokenizer.special_tokens
    elif data.tokenizer == "gpt2":
        tokens = [END_OF_TEXT]
    elif data.tokenizer not in tokenizers.TOKENIZER_KINDS:
        tokens = tokenizers.read_tokenizer(data.tokenizer).unused_special_tokens
    documents = source.documents
    all_tokens = tuple(dict.fromkeys([*documents.special_tokens, *tokens]))
    return replace(source, documents=replace(documents, special_tokens=all_tokens))


def _tokenize_part(
    name: str,
    parts: Iterator[tuple[str, Any]],
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    total_bytes: int,
    progress: Progress,
) -> Iterator[TokenArray]:
    """Token arrays (N,) of the next of `parts`; none if the text is too short to have that part.

    Adds the numbers of tokens and bytes to `facts`. `total_bytes`: of all parts.
    """
    facts |= {f"{name}_tokens": 0, f"{name}_bytes": 0}
    next_name, pieces = next(parts, (name, ()))
    assert next_name == name
    special = TokenPattern(tuple(tokenizer.special_tokens))
    for text in cut_between_words((text for _, text in pieces), PIECE_CHARACTERS, special):
        ids = tokenizer.encode(text).astype(token_dtype(tokenizer.vocab_size))
        yield ids
        facts[f"{name}_tokens"] += len(ids)
        facts[f"{name}_bytes"] += len(text.encode()) - _special_bytes(tokenizer, ids)
        done = sum(facts.get(f"{part}_bytes", 0) for part in ("train", "val", "test"))
        message = f"tokenizing: {done / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB"
        progress.update(done / max(1, total_bytes), message)


def _special_bytes(tokenizer: Tokenizer, ids: TokenArray) -> int:
    """Bytes of the spellings of the special tokens among `ids` (N,): they are no text."""
    return sum(
        len(token.encode()) * int(np.count_nonzero(ids == i))
        for token, i in tokenizer.special_tokens.items()
    )


def _make_tokenizer(
    data: DataConfig, source: Source, survey: TextSurvey, notify: Notify
) -> Tokenizer:
    """The tokenizer that `data` asks for, with its special tokens."""
    tokenizer = _make_plain_tokenizer(data, source, survey, notify)
    if data.used_special_tokens:
        return tokenizer.with_special_tokens(data.used_special_tokens)
    return tokenizer


def _make_plain_tokenizer(
    data: DataConfig, source: Source, survey: TextSurvey, notify: Notify
) -> Tokenizer:
    match data.tokenizer:
        case "char":
            return tokenizers.CharTokenizer(survey.alphabet)
        case "byte":
            return tokenizers.ByteTokenizer()
        case "gpt2":
            return tokenizers.load_gpt2(notify)
        case "bpe":
            with dataset_notes.show_bpe_training(survey.bytes, notify):
                sample = _sample_for_bpe(data, source, survey, notify)
                return tokenizers.train_bpe(sample, data.vocab_size, notify)
    return tokenizers.read_tokenizer(data.tokenizer)


def _sample_for_bpe(
    data: DataConfig, source: Source, survey: TextSurvey, notify: Notify
) -> Iterator[str]:
    """The training text, or evenly spaced pieces of about MAX_BPE_SAMPLE_BYTES of it."""
    training = (
        "\n" if text in source.special_tokens else text  # words end at a special token
        for part, text in split_text(source, data, survey.bytes)
        if part == "train"
    )
    share = MAX_BPE_SAMPLE_BYTES / (survey.bytes * (1 - data.val_fraction - data.test_fraction))
    if share < 1:
        notify(
            f"training BPE on {MAX_BPE_SAMPLE_BYTES / 1e6:.0f} MB, evenly spaced, "
            f"{share:.0%} of the training text"
        )
    yield from subsample(cut_between_words(training, PIECE_CHARACTERS), share)
