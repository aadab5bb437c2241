"""Text to token ids and back: characters, bytes, byte-level BPE trained here, GPT-2's, or any tokenizer.json.

Every kind knows the bytes of each of its tokens, and decoding is those bytes joined, so that text comes out the same
whether it is decoded at once or streamed. V vocabulary size, N tokens.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.data.cache import cache_dir
from glasslm.data.download import Remote, download
from glasslm.errors import InputError
from glasslm.text import Say

if TYPE_CHECKING:
    import tokenizers

Ids = NDArray[np.uint32]

KINDS = ("char", "byte", "bpe", "gpt2")


class Tokenizer(Protocol):
    """What the rest of glasslm knows of a tokenizer."""

    kind: str  # char, byte, bpe, gpt2, or json: a tokenizer.json of another make
    token_bytes: list[bytes]  # (V,) the UTF-8 of each token; empty for special tokens

    def encode(self, text: str) -> Ids:
        """(N,) ids of `text`, in which special tokens are text like any other.

        Raises InputError for what cannot be expressed: an unknown character, or half of a surrogate pair.
        """
        ...

    def to_json(self) -> str:
        """Everything that from_json needs."""
        ...

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def sha256(self) -> str:
        """Identity: two tokenizers with the same hash give the same ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @functools.cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """(V,) number of bytes of each token."""
        return np.array([len(token) for token in self.token_bytes], np.int64)

    def decode(self, ids: Iterable[int] | NDArray[Any]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes[i] for i in _listed(ids)]).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One token a character, in the order of the code points.

    >>> CharTokenizer("abc").encode("cab").tolist()
    [2, 0, 1]
    """

    kind = "char"

    def __init__(self, alphabet: str) -> None:
        """`alphabet`: every character once, in any order. Raises InputError if there are none, or a surrogate."""
        _refuse_surrogates(alphabet)
        self.alphabet = "".join(sorted(set(alphabet)))
        if not self.alphabet:
            raise InputError(
                "a character tokenizer needs at least one character: the text is empty"
            )
        codes = _code_points(self.alphabet)
        self.token_bytes = [character.encode() for character in self.alphabet]
        self._unknown = len(codes)
        self._ids = np.full(
            int(codes[-1]) + 2, self._unknown, np.uint32
        )  # by code point; the last is for all above
        self._ids[codes] = np.arange(len(codes))

    def encode(self, text: str) -> Ids:
        _refuse_surrogates(text)
        ids: Ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if ids.size and ids.max() == self._unknown:
            raise InputError(self._explain(text))
        return ids

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "alphabet": self.alphabet})

    def _explain(self, text: str) -> str:
        unknown = sorted(set(text) - set(self.alphabet))
        named = ", ".join(
            f"{c!r} (U+{ord(c):04X} {unicodedata.name(c, 'unnamed')})" for c in unknown[:50]
        )
        more = f" and {len(unknown) - 50} more" if len(unknown) > 50 else ""
        knows = self.alphabet if len(self.alphabet) <= 200 else self.alphabet[:200] + "..."
        return (
            f"this character tokenizer does not know {named}{more}, first at character "
            f"{min(text.index(c) for c in unknown)}; it knows only the {len(self.alphabet)} characters of its training "
            f"text: {knows!r}. Leave these characters out, or train a model that reads any text with --tokenizer byte "
            "or bpe"
        )


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: 256 of them, and any text can be written.

    >>> ByteTokenizer().encode("aé").tolist()
    [97, 195, 169]
    """

    kind = "byte"

    def __init__(self) -> None:
        self.token_bytes = [bytes([i]) for i in range(256)]

    def encode(self, text: str) -> Ids:
        _refuse_surrogates(text)
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int] | NDArray[Any]) -> str:
        return bytes(_listed(ids)).decode("utf-8", "replace")

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind})


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: BPE trained here, GPT-2's, or a tokenizer.json from elsewhere."""

    PIECE = 1 << 16  # characters; pieces of a long text are encoded side by side

    def __init__(self, text: str) -> None:
        """`text`: the content of a tokenizer.json. Raises InputError if the library cannot read it."""
        from tokenizers import Tokenizer as Library

        try:
            self._library: tokenizers.Tokenizer = Library.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(
                f"this is not a tokenizer.json that the tokenizers library reads: {error}"
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._json: str = self._library.to_str(pretty=True)
        described = json.loads(self._json)
        self.kind = _kind(described)
        self.token_bytes = _token_bytes(self._library.get_vocab(with_added_tokens=True), described)

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs that BPE joins, first merged first; empty for other models."""
        pairs = json.loads(self._json)["model"].get("merges", [])
        split = [
            tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in pairs
        ]  # older files: one string
        return [(_text_bytes(a), _text_bytes(b)) for a, b in split]

    def encode(self, text: str) -> Ids:
        _refuse_surrogates(text)
        # GPT-2's pattern never looks past the end of a word: cut there, the pieces give the ids of the whole.
        pieces = list(cut([text], self.PIECE)) if self.kind in ("bpe", "gpt2") else [text]
        try:
            encodings = self._library.encode_batch_fast(pieces, add_special_tokens=False)
        except (
            Exception
        ) as error:  # bare, again: a foreign model without a token for what it does not know
            raise InputError(f"the tokenizer cannot express the text: {error}") from error
        ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return np.concatenate(ids) if ids else np.zeros(0, np.uint32)

    def to_json(self) -> str:
        return self._json


class StreamDecoder:
    """Ids to text as they come, never half a character.

    >>> stream = StreamDecoder(ByteTokenizer())
    >>> [stream.push(byte) for byte in "é".encode()], stream.flush()
    (['', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._token_bytes[token])

    def flush(self) -> str:
        """U+FFFD if the last character was never completed."""
        return self._decoder.decode(b"", final=True)


def from_json(text: str) -> Tokenizer:
    """The tokenizer that wrote `text` (to_json), or that a Hugging Face tokenizer.json describes.

    Raises InputError if it is neither.
    """
    try:
        described = json.loads(text)
    except RecursionError:
        raise InputError("this is not a tokenizer: its JSON is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"this is not a tokenizer: not even JSON ({error})") from error
    match described:
        case {"kind": "char", "alphabet": str(alphabet)}:
            return CharTokenizer(alphabet)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"model": dict()}:
            return SubwordTokenizer(text)
    raise InputError(
        "this is not a tokenizer: expected glasslm's own JSON, or a Hugging Face tokenizer.json"
    )


def from_file(path: str | Path) -> Tokenizer:
    """The tokenizer in a file. Raises InputError."""
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the tokenizer {path} cannot be read: {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-level BPE with GPT-2's split pattern, trained on `texts`.

    The vocabulary is 256 bytes and at most vocab_size - 256 merges: fewer when no pair is left that occurs twice.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once shortens nothing but its own occurrence
        initial_alphabet=sorted(BYTE_OF_CHARACTER),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return SubwordTokenizer(library.to_str())


# GPT-2's merges and vocabulary, by the addresses and hashes that tiktoken uses.
_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_MERGES = Remote(
    _GPT2 + "vocab.bpe", 456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
)
_GPT2_VOCABULARY = Remote(
    _GPT2 + "encoder.json",
    1_042_301,
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)


def gpt2(say: Say) -> SubwordTokenizer:
    """GPT-2's tokenizer, 50,257 tokens, equal to tiktoken's "gpt2".

    Its two files come from tiktoken's cache (TIKTOKEN_CACHE_DIR) if it has them, else they are downloaded once. Raises
    InputError when neither is possible.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    chosen = os.environ.get("TIKTOKEN_CACHE_DIR")
    folder = Path(chosen) if chosen else cache_dir("tiktoken")
    paths = []
    for remote in (_GPT2_MERGES, _GPT2_VOCABULARY):
        paths.append(
            folder / hashlib.sha1(remote.url.encode()).hexdigest()
        )  # tiktoken's name for it
        download(remote, paths[-1], say)
    lines = paths[0].read_text(encoding="utf-8").split("\n")[1:-1]  # the first line is a version
    merges = [(a, b) for a, b in (line.split(" ") for line in lines)]
    library = Tokenizer(
        models.BPE(vocab=json.loads(paths[1].read_text(encoding="utf-8")), merges=merges)
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return SubwordTokenizer(library.to_str())


def cut(texts: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of at least `size` characters, each but the last ending before the blank after a word.

    Where no blank comes for 16 times `size` (some scripts have none), a piece ends anywhere, so that memory is bounded.
    """
    held = ""
    for text in texts:
        held += text
        start = 0
        while len(held) - start > size:
            word = _WORD_END.search(held, start + size)
            if word is None and len(held) - start < 16 * size:
                break
            end = word.end() if word else start + 16 * size
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


_WORD_END = re.compile(r"\S(?=[ \n])")


def _kind(described: dict[str, Any]) -> str:
    """What a tokenizer.json is: its own text has no place to say it."""
    model, splitter = described["model"], described.get("pre_tokenizer") or {}
    byte_level = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if (
        model["type"] != "BPE"
        or not byte_level
        or splitter["add_prefix_space"]
        or described.get("normalizer")
    ):
        return "json"
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    file = "#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges)
    if hashlib.sha256(file.encode()).hexdigest() == _GPT2_MERGES.sha256:
        return "gpt2"
    return "json" if described["added_tokens"] else "bpe"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (its encoder.py): itself where printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTE_OF_CHARACTER = _byte_of_character()


def _text_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a token of another alphabet stands for itself."""
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode()


def _token_bytes(vocabulary: dict[str, int], described: dict[str, Any]) -> list[bytes]:
    """(V,) bytes of each id, by what the file's decoder does: byte-level, SentencePiece's (▁, <0x0A>) or WordPiece's.

    Exact for the first two; a WordPiece tokenizer forgets spaces and case, so that its bytes are an estimate. Ids
    without a token, and special tokens, are empty.
    """
    decoder = json.dumps(described.get("decoder") or {}) + json.dumps(
        described.get("pre_tokenizer") or {}
    )
    added = {token["content"]: token["special"] for token in described["added_tokens"]}
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if token in added:
            result[i] = b"" if added[token] else token.encode()
        elif '"ByteLevel"' in decoder:
            result[i] = _text_bytes(token)
        elif (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token)) and '"ByteFallback"' in decoder:
            result[i] = bytes([int(byte[1], 16)])
        elif '"WordPiece"' in decoder:
            result[i] = (token[2:] if token.startswith("##") else " " + token).encode()
        else:
            result[i] = token.replace("▁", " ").encode()
    return result


def _listed(ids: Iterable[int] | NDArray[Any]) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def _code_points(text: str) -> Ids:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _refuse_surrogates(text: str) -> None:
    """Half of a UTF-16 pair is no character, and UTF-8 cannot write it; undecodable arguments arrive as such halves."""
    if text.isascii():
        return
    if lone := re.search("[\ud800-\udfff]", text):
        raise InputError(
            f"the text has a lone surrogate U+{ord(lone[0]):04X} at character {lone.start()}, which is no character: "
            "the bytes it came from were not UTF-8"
        )
