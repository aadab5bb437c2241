"""Text to token ids and back: characters, bytes, byte-level BPE, GPT-2's BPE, or a tokenizer.json.

Every tokenizer knows the bytes of each of its tokens. Decoding joins these bytes, so streamed text
equals text that is decoded at once. Shapes: V vocabulary size, N tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.data.cache import cache_dir
from glasslm.data.download import RemoteFile, download_file
from glasslm.data.library_call import call_tokenizers, run_interruptibly
from glasslm.data.long_words import cut_long_words
from glasslm.data.lossy_tokenizers import find_lossy_reason, find_lost_bytes
from glasslm.data.special_tokens import TokenPattern, encode_pieces
from glasslm.data.text_pieces import cut_between_words
from glasslm.data.token_file import Tokens
from glasslm.data.tokenizer_json import (
    BYTE_OF_CHARACTER,
    GPT2_MERGES_SHA256,
    detect_kind,
    mark_end,
    own_tokenizer_json,
    parse_tokenizer_json,
    read_end_mark,
    read_special_tokens,
    read_token_bytes,
    text_bytes,
    uses_byte_level,
)
from glasslm.data.tokenizer_probe import require_bounded
from glasslm.data.unknown_characters import explain_unknown_characters, refuse_surrogates
from glasslm.errors import InputError, explain_system_errors
from glasslm.text import Notify

if TYPE_CHECKING:
    import tokenizers

TokenIds = NDArray[np.uint32]

TOKENIZER_KINDS = ("char", "byte", "bpe", "gpt2")
CANNOT_EXPRESS = "the tokenizer cannot express the text"
MIN_ENCODING_S, MIN_CHARACTERS_PER_S = 60.0, 10_000  # of a foreign tokenizer, which may not return


class Tokenizer(Protocol):
    """Interface of all tokenizers."""

    kind: str  # char, byte, bpe, gpt2, or json for any other tokenizer.json
    token_bytes: list[bytes]  # (V,) the UTF-8 of each token; empty for special tokens
    # Special tokens, which `encode` never splits, and their ids; the first one ends a document.
    special_tokens: Mapping[str, int] = MappingProxyType({})
    other_end_ids: frozenset[int] = frozenset()  # that end a generated text, as end_id does
    unused_special_tokens: tuple[str, ...] = ()  # those that `encode` reads as ordinary text
    joins_words: bool = False  # whether the text of a token depends on its neighbours
    lossy_reason: str = ""  # why its tokens do not decode to the text; empty if they do
    has_dropout: bool = False  # whether its file has a dropout, which `encode` does not apply

    def encode(self, text: str) -> TokenIds:
        """(N,) ids of `text`.

        Raises InputError for an unknown character or a lone surrogate.
        """
        ...

    def to_json(self) -> str:
        """JSON from which parse_tokenizer makes the same tokenizer."""
        ...

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def sha256(self) -> str:
        """Identity: tokenizers with the same hash give the same ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def encoding_identity(self) -> str:
        """Identity of cached ids; not `sha256` with dropout, where older versions drew them."""
        return f"{self.sha256} without dropout" if self.has_dropout else self.sha256

    @property
    def end_id(self) -> int | None:
        """The token that ends a document; None if documents have no end."""
        return next(iter(self.special_tokens.values()), None)

    def with_special_tokens(self, tokens: Iterable[str]) -> Tokenizer:
        """The same tokenizer with special tokens, whose new ids follow the others; or without."""
        ...

    @functools.cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """(V,) number of bytes of each token."""
        return np.array([len(token) for token in self.token_bytes], np.int64)

    @property
    def scored_bytes(self) -> NDArray[np.int64]:
        """`byte_lengths` for bits per byte; zeros, for none, if the tokens lose text."""
        return self.byte_lengths * 0 if self.lossy_reason else self.byte_lengths

    def compare_bytes(self, tokens: Tokens, text_bytes: int) -> None:
        """Set `lossy_reason` if tokens (N,) have not the bytes of the text that they encode."""
        if self.kind == "json" and not self.lossy_reason:
            self.lossy_reason = find_lost_bytes(int(self.byte_lengths[tokens[:]].sum()), text_bytes)

    def decode(self, ids: Iterable[int] | NDArray[Any]) -> str:
        """The text of `ids` (N,); bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes[i] for i in _as_list(ids)]).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One token for each character, numbered in the order of the code points.

    >>> CharTokenizer("abc").encode("cab").tolist()
    [2, 0, 1]
    """

    kind = "char"

    def __init__(self, alphabet: str, special_tokens: Iterable[str] = ()) -> None:
        """`alphabet`: the characters, in any order.

        Raises InputError if there are none, or a surrogate.
        """
        refuse_surrogates(alphabet)
        self.alphabet = "".join(sorted(set(alphabet)))
        if not self.alphabet:
            raise InputError(
                "a character tokenizer needs at least one character: the text is empty"
            )
        codes = _code_points(self.alphabet)
        self.token_bytes = [character.encode() for character in self.alphabet]
        self.special_tokens = _append_special_tokens(self.token_bytes, special_tokens)
        self._unknown = len(codes)
        # By code point; the last entry stands for all code points above.
        self._ids = np.full(int(codes[-1]) + 2, self._unknown, np.uint32)
        self._ids[codes] = np.arange(len(codes))

    def with_special_tokens(self, tokens: Iterable[str]) -> CharTokenizer:
        return CharTokenizer(self.alphabet, tokens)

    def encode(self, text: str) -> TokenIds:
        refuse_surrogates(text)
        return encode_pieces(text, self.special_tokens, self._encode_ordinary)

    def _encode_ordinary(self, text: str, start: int) -> TokenIds:
        """(N,) ids of a text without special tokens, which follows `start` characters."""
        ids: TokenIds = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if ids.size and ids.max() == self._unknown:
            raise InputError(explain_unknown_characters(text, self.alphabet, start))
        return ids

    def to_json(self) -> str:
        content = {"kind": self.kind, "alphabet": self.alphabet}
        return own_tokenizer_json(content, self.special_tokens)


class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8, 256 in all, so that any text can be encoded.

    >>> ByteTokenizer().encode("aé").tolist()
    [97, 195, 169]
    """

    kind = "byte"

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        self.token_bytes = [bytes([i]) for i in range(256)]
        self.special_tokens = _append_special_tokens(self.token_bytes, special_tokens)

    def with_special_tokens(self, tokens: Iterable[str]) -> ByteTokenizer:
        return ByteTokenizer(tokens)

    def encode(self, text: str) -> TokenIds:
        refuse_surrogates(text)
        return encode_pieces(
            text,
            self.special_tokens,
            lambda piece, _: np.frombuffer(piece.encode(), np.uint8).astype(np.uint32),
        )

    def to_json(self) -> str:
        return own_tokenizer_json({"kind": self.kind}, self.special_tokens)


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: trained BPE, GPT-2's, or any tokenizer.json."""

    PIECE_CHARACTERS = 1 << 16  # of a long text, whose pieces are encoded in parallel

    def __init__(self, text: str) -> None:
        """`text`: content of a tokenizer.json. Raises InputError if the library cannot read it."""
        from tokenizers import Tokenizer as Library

        content = parse_tokenizer_json(text)
        require_bounded(content)
        self._library: tokenizers.Tokenizer = call_tokenizers(
            lambda: Library.from_str(text),
            "this is not a tokenizer.json that the tokenizers library reads",
        )
        self._library.no_truncation()
        self._library.no_padding()
        self._json: str = self._library.to_str(pretty=True)
        description = json.loads(self._json)
        special = {t["content"]: t["id"] for t in description["added_tokens"] if t["special"]}
        end = read_end_mark(content)
        if end in special:
            self.special_tokens = {end: special[end]} | special
            self._json = mark_end(description, end)
        else:
            self.unused_special_tokens = tuple(special)
        self._library.encode_special_tokens = not self.special_tokens  # True: they are text
        if description["model"].get("dropout"):  # it would merge at random; the file keeps it
            self._library.model.dropout, self.has_dropout = None, True
        self.kind = detect_kind(description, bool(self.special_tokens))
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.token_bytes = read_token_bytes(vocabulary, description)
        self.joins_words = not uses_byte_level(description)
        if self.kind == "json":
            self.lossy_reason = find_lossy_reason(description, self.encode, self.decode)

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs that BPE joins, in the order of merging; empty for other models."""
        pairs = json.loads(self._json)["model"].get("merges", [])
        # Older files have a pair as one string.
        split = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in pairs]
        return [(text_bytes(left), text_bytes(right)) for left, right in split]

    def with_special_tokens(self, tokens: Iterable[str]) -> SubwordTokenizer:
        """Tokens that the vocabulary has keep their ids; other special tokens are parsed, too."""
        from tokenizers import Tokenizer as Library

        tokens, library = list(tokens), Library.from_str(self._json)
        own = {*self.special_tokens, *self.unused_special_tokens}  # these keep their options
        library.add_special_tokens([token for token in tokens if token not in own])
        return SubwordTokenizer(mark_end(json.loads(library.to_str()), *tokens[:1] or [""]))

    def encode(self, text: str) -> TokenIds:
        refuse_surrogates(text)
        # GPT-2's pattern never looks past the end of a word, so pieces that end there give the ids
        # of the whole text.
        pieces, is_own = [text], self.kind in ("bpe", "gpt2")
        if is_own:
            special = TokenPattern(tuple(self.special_tokens)) if self.special_tokens else None
            pieces = list(cut_between_words([text], self.PIECE_CHARACTERS, special))
        encodings = call_tokenizers(
            lambda: self._library.encode_batch_fast(pieces, add_special_tokens=False),
            CANNOT_EXPRESS,
            None if is_own else _encoding_limit_s(text),
        )
        ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return np.concatenate(ids) if ids else np.zeros(0, np.uint32)

    def encode_with_spans(self, text: str) -> tuple[TokenIds, NDArray[np.int64]]:
        """(N,) ids of `text`, and (N, 2) where in it each token begins and ends, in characters."""
        refuse_surrogates(text)
        encoding = call_tokenizers(
            lambda: self._library.encode(text, add_special_tokens=False),
            CANNOT_EXPRESS,
            _encoding_limit_s(text),
        )
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.uint32), spans

    def decode(self, ids: Iterable[int] | NDArray[Any]) -> str:
        """The text of `ids` (N,), with words joined as the file's decoder joins them."""
        if not self.joins_words:
            return super().decode(ids)
        return call_tokenizers(
            lambda: self._library.decode(_as_list(ids), skip_special_tokens=True),
            "the tokenizer cannot decode the tokens",
        )

    def to_json(self) -> str:
        return self._json


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of the JSON of `to_json` or of a Hugging Face tokenizer.json.

    Raises InputError for other text.
    """
    description = parse_tokenizer_json(text)
    match description:
        case {"kind": "char", "alphabet": str(alphabet)}:
            return CharTokenizer(alphabet, read_special_tokens(description))
        case {"kind": "byte"}:
            return ByteTokenizer(read_special_tokens(description))
        case {"model": dict()}:
            return SubwordTokenizer(text)
    raise InputError(
        "this is not a tokenizer: expected glasslm's own JSON, or a Hugging Face tokenizer.json"
    )


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file. Raises InputError."""
    with explain_system_errors(
        path,
        lambda why: InputError(f"the tokenizer {path} cannot be read: {why}"),
        UnicodeDecodeError,
    ):
        text = Path(path).read_text(encoding="utf-8-sig")
    try:
        return parse_tokenizer(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def train_bpe(
    texts: Iterable[str], vocab_size: int, notify: Notify = lambda message: None
) -> SubwordTokenizer:
    """Byte-level BPE with GPT-2's split pattern, trained on `texts`.

    The vocabulary has 256 bytes and at most vocab_size - 256 merges. Training stops early when no
    pair occurs twice. Long words are cut for the training (long_words.py).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair that occurs once shortens only that occurrence
        initial_alphabet=sorted(BYTE_OF_CHARACTER),
        show_progress=False,
    )
    words = cut_long_words(texts, notify)
    run_interruptibly(lambda: library.train_from_iterator(words, trainer))
    return SubwordTokenizer(library.to_str())


# GPT-2's merges and vocabulary, with the addresses and hashes that tiktoken uses.
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_MERGES = RemoteFile(_GPT2_URL + "vocab.bpe", 456_318, GPT2_MERGES_SHA256)
_GPT2_VOCABULARY = RemoteFile(
    _GPT2_URL + "encoder.json",
    1_042_301,
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)


def load_gpt2(notify: Notify) -> SubwordTokenizer:
    """GPT-2's tokenizer, 50,257 tokens, equal to tiktoken's "gpt2".

    Its two files come from tiktoken's cache (TIKTOKEN_CACHE_DIR) if it has them, else they are
    downloaded once. Raises InputError when neither is possible.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    configured = os.environ.get("TIKTOKEN_CACHE_DIR")
    folder = Path(configured) if configured else cache_dir("tiktoken")
    paths = []
    for remote in (_GPT2_MERGES, _GPT2_VOCABULARY):
        # tiktoken names a file by the SHA-1 of its address.
        path = folder / hashlib.sha1(remote.url.encode()).hexdigest()
        download_file(remote, path, notify)
        paths.append(path)
    lines = paths[0].read_text(encoding="utf-8").split("\n")[1:-1]  # the first line is a version
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    vocabulary = json.loads(paths[1].read_text(encoding="utf-8"))
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return SubwordTokenizer(library.to_str())


def _encoding_limit_s(text: str) -> float:
    return MIN_ENCODING_S + len(text) / MIN_CHARACTERS_PER_S


def _append_special_tokens(token_bytes: list[bytes], tokens: Iterable[str]) -> dict[str, int]:
    """Append special tokens to a vocabulary; returns their ids."""
    ids = {token: len(token_bytes) + i for i, token in enumerate(tokens)}
    token_bytes += [b""] * len(ids)
    return ids


def _as_list(ids: Iterable[int] | NDArray[Any]) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def _code_points(text: str) -> TokenIds:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
