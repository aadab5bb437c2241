"""Tokenizers as transformers reads them, tokenizer.json and tokenizer_config.json, and back from a model folder.

Characters and bytes are written in the words of the `tokenizers` library, so that any program that has it gives the
same ids. What comes back is somebody's claim: its size and its ids are looked at before anything is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from glasslm.data.tokenizers import (
    BYTE_OF_CHARACTER,
    ByteTokenizer,
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
)
from glasslm.errors import DamagedError, InputError
from glasslm.files import json_bytes, read_json

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARY, MERGES, SENTENCEPIECE = "vocab.json", "merges.txt", "tokenizer.model"
ENDS = ("<|endoftext|>", "</s>")  # of a text, GPT-2's and Llama's
LARGEST_MERGES = 64 << 20  # bytes; the files of the largest vocabularies have 17 MB
UNKNOWN = "<unknown character>"  # in no vocabulary: so the library refuses what is unknown, rather than leave it out

Described = dict[str, Any]


def files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """Name -> content of the two files from which AutoTokenizer gives the same ids for a text, and text for ids.

    There are three differences. A special token written out in a text, such as "<|endoftext|>", becomes that token
    there, unless one asks for split_special_tokens=True; here it is text like any other. A character that a character
    tokenizer does not know is a bare Exception of the library, here an InputError. Special tokens are shown by
    `decode` unless one asks for skip_special_tokens=True; here they have no text. `block_size` is the context in
    tokens: transformers warns of longer texts.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": [
            "input_ids",
            "attention_mask",
        ],  # else older versions give a third, which models refuse
        "clean_up_tokenization_spaces": False,
    }
    if end := end_of_text(tokenizer):
        settings |= {"bos_token": end.content, "eos_token": end.content}
    return {TOKENIZER: json_bytes(_described(tokenizer)), CONFIG: json_bytes(settings)}


class End(NamedTuple):
    """The special token that ends a text."""

    content: str
    id: int


def end_of_text(tokenizer: Tokenizer) -> End | None:
    """None where there is none."""
    if not isinstance(tokenizer, SubwordTokenizer):
        return None
    added = json.loads(tokenizer.to_json())["added_tokens"]
    special = {token["content"]: token["id"] for token in added if token["special"]}
    return next((End(content, special[content]) for content in ENDS if content in special), None)


def _described(tokenizer: Tokenizer) -> Described:
    """What tokenizer.json holds. Nothing in it adds tokens to a text: glasslm never trained on added ones."""
    if isinstance(tokenizer, CharTokenizer):
        return _of_characters(tokenizer.alphabet)
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes()
    described: Described = json.loads(tokenizer.to_json())
    if (described["post_processor"] or {}).get("type") != "ByteLevel":  # which only moves offsets
        described["post_processor"] = None
    return described


def _of_characters(alphabet: str) -> Described:
    """BPE that never merges is one token a character."""
    return _bpe(
        {character: i for i, character in enumerate(alphabet)}, [], None, {"type": "Fuse"}, UNKNOWN
    )


def _of_bytes() -> Described:
    """Byte-level BPE that never merges, on texts that are not split into words first."""
    splitter = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return _bpe(dict(BYTE_OF_CHARACTER), [], splitter, splitter)


def _bpe(
    vocabulary: dict[str, int],
    merges: list[list[str]],
    pre_tokenizer: Described | None,
    decoder: Described,
    unknown: str | None = None,
) -> Described:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _special(content: str, i: int) -> Described:
    """An added token; it is found in texts as it stands, and has no text of its own."""
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True}  # fmt: skip


# -- and back ---------------------------------------------------------------------------------------------------------


def from_file(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in the model folder `path`, or in its tokenizer.json, for a model with `vocab_size` rows.

    Those that `files` wrote for characters and bytes come back as themselves, all others as SubwordTokenizer. Rows
    without a token, with which matrices are padded, get tokens "<|unused_N|>" without text. GPT-2's vocab.json and
    merges.txt do in place of tokenizer.json. Raises InputError for what is no tokenizer, or has more ids than the model
    has rows, and DamagedError for a file that is no JSON.
    """
    file = path / TOKENIZER if path.is_dir() else path
    described = _read(file) if file.is_file() else _from_merges(file.parent)
    highest = max(_ids(described, file).values(), default=-1)
    if highest >= vocab_size:
        raise InputError(
            f"{file} has ids up to {highest:,}, but the model has only {vocab_size:,} rows of embeddings: it belongs "
            "to another model"
        )
    ours = _ours(described)
    if ours and ours.vocab_size == vocab_size:
        return ours
    try:
        return _padded(SubwordTokenizer(json.dumps(described)), vocab_size)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except BaseException as error:
        if (
            type(error).__name__ != "PanicException"
        ):  # of Rust, which is none of Python's Exceptions
            raise
        raise InputError(
            f"{file} is not a tokenizer.json that the tokenizers library reads: {error}"
        ) from None


def _read(file: Path) -> Described:
    described = read_json(file)
    if not (isinstance(described, dict) and isinstance(described.get("model"), dict)):
        raise InputError(f"{file} is not a tokenizer.json: it has no 'model'")
    return described


def _ids(described: Described, where: object) -> dict[str, int]:
    """Token -> id, as a tokenizer.json says; looked at before the library counts on it."""
    vocabulary, added = described["model"].get("vocab"), described.get("added_tokens") or []
    try:
        if isinstance(vocabulary, list):  # Unigram's pieces with their scores
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        ids = vocabulary | {token["content"]: token["id"] for token in added}
        sound = all(type(i) is int and i >= 0 for i in ids.values())
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(
            f"{where} is not a tokenizer.json: its vocabulary is no table of tokens and ids"
        )
    return ids


def _ours(described: Described) -> Tokenizer | None:
    """The tokenizer for characters or bytes that `files` wrote so; None if it was none of these."""
    vocabulary = described["model"]["vocab"]
    if described.get("added_tokens") or not isinstance(vocabulary, dict):
        return None
    if not all(len(token) == 1 for token in vocabulary):
        return None
    try:
        tokenizers: list[Tokenizer] = [ByteTokenizer(), CharTokenizer("".join(vocabulary))]
    except InputError:  # no characters
        return None
    return next((one for one in tokenizers if _same(described, _described(one))), None)


def _same(described: Described, ours: Described) -> bool:
    """Whether a tokenizer.json does what ours does; other programs add keys, and a post-processor that adds nothing."""
    parts = all(
        described.get(part) == ours[part] for part in ("normalizer", "pre_tokenizer", "decoder")
    )
    return parts and {name: described["model"].get(name) for name in ours["model"]} == ours["model"]


def _padded(tokenizer: SubwordTokenizer, vocab_size: int) -> SubwordTokenizer:
    """The same, with a token for each of `vocab_size` ids."""
    described = json.loads(tokenizer.to_json())
    ids = _ids(described, "it")
    used = set(ids.values())
    unused = {f"<|unused_{i}|>": i for i in range(vocab_size) if i not in used}
    if not unused:
        return tokenizer
    if isinstance(
        described["model"]["vocab"], dict
    ):  # there an id can be chosen; added tokens get the next one
        described["model"]["vocab"] |= ids | unused
    described["added_tokens"] += [_special(content, i) for content, i in unused.items()]
    padded = SubwordTokenizer(json.dumps(described))
    if _ids(json.loads(padded.to_json()), "it") != ids | unused:
        raise InputError(
            f"its ids leave gaps that cannot be filled, up to the {vocab_size:,} rows of the model"
        )
    return padded


def _from_merges(folder: Path) -> Described:
    """GPT-2's older files as a tokenizer.json. Raises InputError where there are none, or they are another model's."""
    cure = "write a tokenizer.json there, with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    if not all((folder / name).is_file() for name in (VOCABULARY, MERGES)):
        if (folder / SENTENCEPIECE).is_file():
            raise InputError(
                f"{folder} has its tokenizer as {SENTENCEPIECE}, of SentencePiece: {cure}"
            )
        raise InputError(f"{folder} holds no {TOKENIZER}: {cure}")
    if not _says_gpt2(folder):
        raise InputError(
            f"{folder} has {VOCABULARY} and {MERGES}, which say how words become tokens, but no {TOKENIZER}, which "
            f"says how texts become words: {cure}"
        )
    vocabulary = read_json(folder / VOCABULARY)
    lines = _text(folder / MERGES).split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    splitter = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    described = _bpe(vocabulary, merges, splitter, splitter | {"add_prefix_space": True})
    if isinstance(vocabulary, dict):
        described["added_tokens"] = [
            _special(end, vocabulary[end]) for end in ENDS if end in vocabulary
        ]
    return described


def _says_gpt2(folder: Path) -> bool:
    for name, key in ((CONFIG, "tokenizer_class"), ("config.json", "model_type")):
        if (folder / name).is_file():
            values = read_json(folder / name)
            if isinstance(values, dict) and key in values:
                return str(values[key]).lower().startswith("gpt2")
    return False


def _text(path: Path) -> str:
    if path.stat().st_size > LARGEST_MERGES:
        raise DamagedError(
            f"{path} has {path.stat().st_size:,} bytes: expected at most {LARGEST_MERGES:,}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is damaged: it is not UTF-8 ({error})") from None
