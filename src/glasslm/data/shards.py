"""Tokens on disk and in batches: text is split, tokenised once into memory-mapped shards, and read by step and row.

Shards live in the cache under tokens/<sha256>/, where the hash is the identity of text, split and tokenizer. A folder
appears whole, with a manifest of hashes (files.py), and is built again if a hash does not match. The batch of a step is
a pure function of (seed, step, row). N tokens, B rows, T positions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from glasslm import files
from glasslm.config.schema import DataConfig
from glasslm.data import tokenizers
from glasslm.data.batch_sampler import Shard
from glasslm.data.cache import cache_dir, writing
from glasslm.data.sources import corpora
from glasslm.data.sources.files import Source
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import DamagedError, InputError
from glasslm.text import Say

FORMAT = 2
PIECE = 1 << 20  # characters tokenised at once
BPE_SAMPLE = 50_000_000  # bytes of the training text that BPE is trained on, at most
WORTH_SAYING = 20_000_000  # bytes of text from which on preparing it takes noticeable time


@dataclass(frozen=True)
class Split:
    """One part of the text."""

    tokens: Shard  # (N,) memory-mapped
    bytes: int  # of its text


@dataclass(frozen=True)
class Dataset:
    """A tokenised text. `facts` is the "data" of run.json; `sha256` identifies text, split and tokenizer together."""

    tokenizer: Tokenizer
    train: Split
    val: Split
    test: Split | None
    facts: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class Survey:
    """What must be known of a text before it is split."""

    bytes: int
    characters: int
    alphabet: str
    nuls: int
    replaced: int  # U+FFFD, which stands for what was not UTF-8 where errors are replaced


def prepare(
    data: DataConfig, source: Source, say: Say, tokenizer: Tokenizer | None = None
) -> Dataset:
    """The tokens of `source`, from the cache if it has them, with the given tokenizer or the one that `data` asks for.

    Raises InputError for an empty text, bad UTF-8 or an unusable tokenizer, ExhaustedError when the disk is full.
    """
    folder = cache_dir("tokens")
    recipe = folder / f"{_recipe(data, source)}.json" if tokenizer is None else None
    with writing(folder), _alone(folder, say):
        dataset = None
        if tokenizer is not None:
            dataset = reopen(_identity(data, source, tokenizer))
        elif recipe is not None and recipe.is_file():
            dataset = reopen(recipe.read_text(encoding="utf-8", errors="replace"))
        if dataset is None:
            key = _build(folder, data, source, say, tokenizer)
            if recipe is not None:
                files.write_atomic(recipe, key.encode())
            dataset = reopen(key)
            assert dataset is not None, f"tokens just written to {folder / key} do not verify"
    return replace(
        dataset, facts=dataset.facts | {"files": [asdict(file) for file in source.files]}
    )


def reopen(data_sha256: str) -> Dataset | None:
    """The tokens that were prepared under this identity, or None if the cache has lost or damaged them."""
    folder = cache_dir("tokens") / data_sha256
    try:
        files.verify_folder(folder)
        tokenizer = tokenizers.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        facts, dtype = files.read_json(folder / "facts.json"), _dtype(tokenizer)
        parts = {
            name: Split(_mapped(folder / f"{name}.bin", dtype), facts[f"{name}_bytes"])
            for name in _names(facts)
        }
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # missing or damaged: DamagedError is an OSError, too
        return None
    return Dataset(tokenizer, parts["train"], parts["val"], parts.get("test"), facts, data_sha256)


def of_run(data: DataConfig, facts: dict[str, Any], tokenizer: Tokenizer, say: Say) -> Dataset:
    """The tokens of a run, from the cache or else made again from its text. `facts` is the "data" of its run.json.

    Raises DamagedError when its text is gone or has changed.
    """
    dataset = reopen(facts["sha256"])
    if dataset is None:
        dataset = prepare(data, corpora.of_run(data, facts, say), say, tokenizer)
        if dataset.sha256 != facts["sha256"]:
            raise DamagedError(
                f"the text of this run has changed since: its sha256 was {facts['sha256']}, it is {dataset.sha256} now"
            )
    return dataset


def encoded(source: Source, tokenizer: Tokenizer, errors: str) -> Shard:
    """The whole of a text as tokens (N,), mapped from a file without a name, which is gone when nobody uses it."""
    folder, dtype = cache_dir(), _dtype(tokenizer)
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        for text in tokenizers.cut(source.text(errors), PIECE):
            file.write(tokenizer.encode(text).astype(dtype).tobytes())
        file.flush()
        return np.memmap(file, dtype, mode="r") if file.tell() else np.zeros(0, dtype)


def require_room(dataset: Dataset, block_size: int, batch_size: int = 1) -> None:
    """Raises InputError unless each part has a window, and the training part as many different ones as a batch."""
    for name, split in (
        ("training", dataset.train),
        ("validation", dataset.val),
        ("test", dataset.test),
    ):
        if split is None or len(split.tokens) > block_size:
            continue
        share = {
            "training": "",
            "validation": ", a larger --val-fraction",
            "test": ", a larger --test-fraction",
        }[name]
        raise InputError(
            f"the {name} part has {len(split.tokens)} tokens ({split.bytes} bytes), but a window of --block-size "
            f"{block_size} takes {block_size + 1}: use a smaller --block-size{share}, or more text"
        )
    windows = len(dataset.train.tokens) - block_size
    if batch_size > windows:
        raise InputError(
            f"the training part has {len(dataset.train.tokens)} tokens, which make {windows} different windows of "
            f"{block_size}, but a batch takes {batch_size}: use a smaller --batch-size or --block-size, or more text"
        )


def parts_of(source: Source, data: DataConfig, total_bytes: int) -> Iterator[tuple[str, str]]:
    """The text in order, in pieces (part, text): part is train, val or test.

    train is the first floor((1 - val - test) x bytes) of it, test the last; a boundary inside a character moves to its
    beginning.
    """
    val, test = (
        Fraction(str(data.val_fraction)),
        Fraction(str(data.test_fraction)),
    )  # exactly as written
    ends = {
        "train": math.floor((1 - val - test) * total_bytes),
        "val": math.floor((1 - test) * total_bytes),
    }
    if test:
        ends["test"] = total_bytes
    parts = iter(ends.items())
    part, end = next(parts)
    position = 0
    for text in source.text(data.encoding_errors):
        body = text.encode()
        while position + len(body) > end:
            room = end - position
            while (
                room and body[room] & 0xC0 == 0x80
            ):  # a continuation byte: its character began before
                room -= 1
            yield part, body[:room].decode()
            position, body = position + room, body[room:]
            part, end = next(parts)
        yield part, body.decode()
        position += len(body)


def thinned(texts: Iterable[str], share: float) -> Iterator[str]:
    """This share of `texts`, evenly spaced; all of them where it is 1 or more."""
    for i, text in enumerate(texts):
        if math.floor((i + 1) * share) > math.floor(i * share):
            yield text


def survey(source: Source, errors: str) -> Survey:
    """Size and characters of the whole text. Raises InputError if there are none."""
    total = characters = nuls = replaced = 0
    seen = np.zeros(0x110000, bool)
    for text in source.text(errors):
        total += len(text.encode())
        characters += len(text)
        nuls += text.count("\0")
        replaced += text.count("\ufffd")
        seen[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
    if not characters:
        raise InputError(f"the text of {source.name} is empty")
    return Survey(total, characters, "".join(map(chr, np.flatnonzero(seen))), nuls, replaced)


def _recipe(data: DataConfig, source: Source) -> str:
    """Names what determines the tokens before a tokenizer is there, so that the second run need not train one."""
    tokenizer: list[Any] = [data.tokenizer]
    if data.tokenizer == "bpe":
        tokenizer.append(data.vocab_size)
    elif data.tokenizer not in tokenizers.KINDS:
        tokenizer = [tokenizers.from_file(data.tokenizer).sha256]
    return _digest(
        FORMAT,
        source.sha256,
        data.encoding_errors,
        data.val_fraction,
        data.test_fraction,
        *tokenizer,
    )


def _identity(data: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    return _digest(
        source.sha256, data.encoding_errors, data.val_fraction, data.test_fraction, tokenizer.sha256
    )


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """Only one process at a time builds; what an interrupted one left behind goes."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say("waiting for another process that is preparing tokens")
        lock.acquire()
    try:
        files.sweep(folder)
        yield
    finally:
        lock.release()


def _build(
    folder: Path, data: DataConfig, source: Source, say: Say, tokenizer: Tokenizer | None
) -> str:
    """Tokenise into folder/<identity>, which is returned."""
    known = survey(source, data.encoding_errors)
    if known.nuls:
        say(f"the text holds {known.nuls} NUL characters; they are kept")
    if known.replaced and data.encoding_errors == "replace":
        say(f"the text holds {known.replaced} U+FFFD in place of what was not UTF-8")
    if known.bytes >= WORTH_SAYING:
        say(
            f"tokenising {known.bytes / 1e6:,.0f} MB of text, once; the tokens are kept in {folder}"
        )
    if tokenizer is None:
        tokenizer = _make_tokenizer(data, source, known, say)
    key = _identity(data, source, tokenizer)
    facts: dict[str, Any] = {"files": [asdict(file) for file in source.files], "sha256": key}
    parts = itertools.groupby(parts_of(source, data, known.bytes), key=lambda piece: piece[0])

    def counted() -> Iterator[
        bytes
    ]:  # asked for when the shards before it are written, and so counted
        yield files.json_bytes(facts)

    contents: dict[str, Iterable[files.Chunk]] = {"tokenizer.json": [tokenizer.to_json().encode()]}
    for name in ("train", "val", "test")[: 3 if data.test_fraction else 2]:
        contents[f"{name}.bin"] = _shard(name, parts, tokenizer, facts)
    files.write_folder(folder / key, contents | {"facts.json": counted()})
    return key


def _shard(
    name: str, parts: Iterator[tuple[str, Any]], tokenizer: Tokenizer, facts: dict[str, Any]
) -> Iterator[Shard]:
    """The tokens of the next of the `parts`, counted into `facts`; none where the text is too short to have it."""
    facts |= {f"{name}_tokens": 0, f"{name}_bytes": 0}
    found, pieces = next(parts, (name, ()))
    assert found == name
    for text in tokenizers.cut((text for _, text in pieces), PIECE):
        ids = tokenizer.encode(text).astype(_dtype(tokenizer))
        yield ids
        facts[f"{name}_tokens"] += len(ids)
        facts[f"{name}_bytes"] += len(text.encode())


def _make_tokenizer(data: DataConfig, source: Source, known: Survey, say: Say) -> Tokenizer:
    match data.tokenizer:
        case "char":
            return tokenizers.CharTokenizer(known.alphabet)
        case "byte":
            return tokenizers.ByteTokenizer()
        case "gpt2":
            return tokenizers.gpt2(say)
        case "bpe":
            trained = tokenizers.train_bpe(_bpe_sample(data, source, known, say), data.vocab_size)
            if trained.vocab_size < data.vocab_size:
                reached = f"{trained.vocab_size} tokens instead of the {data.vocab_size} asked for"
                say(
                    f"the vocabulary has {reached}: no further pair occurs twice in the training text"
                )
            return trained
    return tokenizers.from_file(data.tokenizer)


def _bpe_sample(data: DataConfig, source: Source, known: Survey, say: Say) -> Iterator[str]:
    """The training text, or evenly spaced pieces of about BPE_SAMPLE bytes of it."""
    training = (text for part, text in parts_of(source, data, known.bytes) if part == "train")
    share = BPE_SAMPLE / (known.bytes * (1 - data.val_fraction - data.test_fraction))
    if share < 1:
        say(
            f"training BPE on {BPE_SAMPLE / 1e6:.0f} MB, evenly spaced, {share:.0%} of the training text"
        )
    yield from thinned(tokenizers.cut(training, PIECE), share)


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _mapped(path: Path, dtype: np.dtype[Any]) -> Shard:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _names(facts: dict[str, Any]) -> list[str]:
    return [name for name in ("train", "val", "test") if f"{name}_tokens" in facts]
