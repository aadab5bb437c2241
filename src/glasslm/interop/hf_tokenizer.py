"""Write and read tokenizers as transformers' tokenizer.json and tokenizer_config.json.

Character and byte tokenizers are written as BPE of the `tokenizers` library, so that every program
with that library gives the same ids. Files are untrusted: their size and ids are checked before a
tokenizer is built from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from glasslm.data.tokenizer_json import BYTE_OF_CHARACTER
from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer, SubwordTokenizer, Tokenizer
from glasslm.errors import DamagedError, InputError
from glasslm.files import read_json
from glasslm.interop.hf_special_tokens import (
    END_OF_TEXT_TOKENS,
    TOKENIZER_CONFIG_FILE,
    TokenSettings,
    add_listed_tokens,
    default_settings,
    settings_files,
)
from glasslm.strict_json import json_bytes

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE, MERGES_FILE, SENTENCEPIECE_FILE = "vocab.json", "merges.txt", "tokenizer.model"
MAX_MERGES_BYTES = 64 << 20  # the files of the largest vocabularies have 17 MB
# In no vocabulary: the library then refuses unknown characters.
UNKNOWN_TOKEN = "<unknown character>"

TokenizerJson = dict[str, Any]  # the content of a tokenizer.json


def tokenizer_files(
    tokenizer: Tokenizer, block_size: int, settings: TokenSettings | None = None
) -> dict[str, bytes]:
    """Name -> content of the files that AutoTokenizer reads.

    AutoTokenizer then gives the ids and texts of `tokenizer`, special tokens included: where the
    model read them as ordinary text, the file says split_special_tokens. There are two differences.
    A character that a character tokenizer does not know raises a bare Exception of the library;
    glasslm raises InputError. `decode` of transformers shows special tokens (unless
    skip_special_tokens=True is given); in glasslm they have no text. `block_size` is the context in
    tokens: transformers warns of longer texts. `settings`: roles of special tokens and a chat
    template; None: the default roles. Where an imported model's tokenizer adds tokens around each
    text, AutoTokenizer adds them again; with add_special_tokens=False its ids are those of glasslm.
    """
    others: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        # Older versions would add a third input, which models refuse.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    settings = default_settings(tokenizer) if settings is None else settings
    special_tokens = [*tokenizer.special_tokens, *tokenizer.unused_special_tokens]
    content = _tokenizer_json(tokenizer)
    if settings.get("added_before") or settings.get("added_after"):
        content["post_processor"] = _post_processor(settings, token_ids(tokenizer))
    return {
        TOKENIZER_FILE: json_bytes(content),
        **settings_files(settings, special_tokens, others),
    }


def replaced_by_model_type(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Model types for which AutoTokenizer takes a class of its own and not tokenizer.json.

    It splits the text of every qwen2 as Qwen does.
    """
    if not isinstance(tokenizer, SubwordTokenizer):
        return ("qwen2",)
    content = json.loads(tokenizer.to_json())
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    is_qwen = (
        (content.get("normalizer") or {}).get("type") == "NFC"
        and [step.get("type") for step in steps] == ["Split", "ByteLevel"]
        and r"|\p{N}|" in (steps[0].get("pattern") or {}).get("Regex", "")
    )
    return () if is_qwen else ("qwen2",)


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Token -> id of the vocabulary; of a character or byte tokenizer only the special tokens."""
    if not isinstance(tokenizer, SubwordTokenizer):
        return dict(tokenizer.special_tokens)
    return _token_ids(json.loads(tokenizer.to_json()), "the tokenizer")


class EndOfText(NamedTuple):
    """The special token that ends a text."""

    content: str
    id: int


def end_of_text(tokenizer: Tokenizer) -> EndOfText | None:
    """The tokenizer's special token for the end of a text; None if it has none."""
    content = default_settings(tokenizer).get("eos_token")
    return EndOfText(content, token_ids(tokenizer)[content]) if content else None


def _tokenizer_json(tokenizer: Tokenizer) -> TokenizerJson:
    """The content of tokenizer.json, which adds no tokens to a text, because glasslm adds none."""
    special = [_special_token(token, i) for token, i in tokenizer.special_tokens.items()]
    if isinstance(tokenizer, CharTokenizer):
        return _character_bpe(tokenizer.alphabet) | {"added_tokens": special}
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_bpe() | {"added_tokens": special}
    content: TokenizerJson = json.loads(tokenizer.to_json())
    if "dropout" in content["model"]:  # merging at random; glasslm does not apply it either
        content["model"]["dropout"] = None
    for token in content["added_tokens"]:
        token.pop("eos_token", None)  # glasslm's own mark
    # A post-processor may add tokens. The one of type ByteLevel does not: it only moves offsets.
    if (content["post_processor"] or {}).get("type") != "ByteLevel":
        content["post_processor"] = None
    return content


def _post_processor(settings: TokenSettings, ids: dict[str, int]) -> TokenizerJson:
    """Adds the tokens of an imported model's tokenizer before and after each text."""
    before, after = (
        [{"SpecialToken": {"id": token, "type_id": 0}} for token in settings.get(name, [])]
        for name in ("added_before", "added_after")
    )
    first, second = ([*before, {"Sequence": {"id": name, "type_id": 0}}, *after] for name in "AB")
    tokens = {*settings.get("added_before", []), *settings.get("added_after", [])}
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in sorted(tokens)
        },
    }


def _character_bpe(alphabet: str) -> TokenizerJson:
    """BPE without merges: one token a character."""
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    return _bpe(vocabulary, [], None, {"type": "Fuse"}, UNKNOWN_TOKEN)


def _byte_bpe() -> TokenizerJson:
    """Byte-level BPE without merges, on texts that are not split into words first."""
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
    pre_tokenizer: TokenizerJson | None,
    decoder: TokenizerJson,
    unknown: str | None = None,
) -> TokenizerJson:
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


def _special_token(content: str, i: int) -> TokenizerJson:
    """A special token: texts that contain it are split there; it decodes to an empty text."""
    return {
        "id": i,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


# -- reading ---------------------------------------------------------------------------------------


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in the folder `path` or its tokenizer.json, for `vocab_size` embeddings.

    Character and byte tokenizers of `tokenizer_files` come back with their own types, all others as
    SubwordTokenizer. Embeddings without a token (matrices are often padded) get tokens
    "<|unused_N|>" without text. GPT-2's vocab.json and merges.txt are read if tokenizer.json is
    missing. Raises InputError for a file that is not a tokenizer, or has more ids than the model
    has embeddings, and DamagedError for a file that is not JSON.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    content = _read_tokenizer_json(file) if file.is_file() else _read_merges(file.parent)
    ids = _token_ids(content, file)
    listed = add_listed_tokens(content, file.parent)
    highest = max([*ids.values(), *listed.values()], default=-1)
    if highest >= vocab_size:
        raise InputError(
            f"{file} has ids up to {highest:,}, but the model has only {vocab_size:,} rows of "
            "embeddings: the file belongs to another model"
        )
    own_tokenizer = _match_own_tokenizer(content)
    if own_tokenizer and own_tokenizer.vocab_size == vocab_size:
        return own_tokenizer
    try:
        tokenizer = _pad_vocabulary(SubwordTokenizer(json.dumps(content)), vocab_size, file)
        ids = token_ids(tokenizer)
        if wrong := [(text, i) for text, i in listed.items() if ids[text] != i]:
            text, i = wrong[0]
            raise InputError(
                f"{TOKENIZER_CONFIG_FILE} gives {text[:100]!r} the id {i:,}, but it gets "
                f"{ids[text]:,} here: give both files of one model"
            )
        return tokenizer
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; it is no subclass of Exception
            raise
        raise InputError(
            f"{file} is not a tokenizer.json that the tokenizers library reads: {error}"
        ) from None


def _read_tokenizer_json(file: Path) -> TokenizerJson:
    content = read_json(file)
    if not (isinstance(content, dict) and isinstance(content.get("model"), dict)):
        raise InputError(f"{file} is not a tokenizer.json: it has no 'model'")
    return content


def post_processor(tokenizer: Tokenizer, folder: Path) -> Any:
    """The post-processor of a tokenizer.json, which may add tokens to texts; None without one.

    `tokenizer` is that of the file in `folder`. Raises InputError where the library refuses it.
    """
    if not isinstance(tokenizer, SubwordTokenizer):  # only that type keeps what the library reads
        file = folder / TOKENIZER_FILE
        content = _read_tokenizer_json(file)
        if not content.get("post_processor"):
            return None
        try:
            tokenizer = SubwordTokenizer(json.dumps(content))
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    return json.loads(tokenizer.to_json()).get("post_processor")


def _token_ids(content: TokenizerJson, source: object) -> dict[str, int]:
    """Token -> id of a tokenizer.json.

    Raises InputError, which names `source`, unless all ids are 0 or more.
    """
    vocabulary, added = content["model"].get("vocab"), content.get("added_tokens") or []
    try:
        if isinstance(vocabulary, list):  # Unigram has a list of pieces with their scores
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        ids = vocabulary | {token["content"]: token["id"] for token in added}
        valid = all(type(i) is int and i >= 0 for i in ids.values())
    except (AttributeError, KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"{source} is not a tokenizer.json: its vocabulary is not a table of tokens and ids"
        )
    return ids


def _match_own_tokenizer(content: TokenizerJson) -> Tokenizer | None:
    """The character or byte tokenizer that `tokenizer_files` wrote; None for other content."""
    vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not all(len(token) == 1 for token in vocabulary):
        return None
    special = [token["content"] for token in added]
    first = len(vocabulary)
    if added != [_special_token(token, first + i) for i, token in enumerate(special)]:
        return None
    try:
        candidates: list[Tokenizer] = [
            ByteTokenizer(special),
            CharTokenizer("".join(vocabulary), special),
        ]
    except InputError:  # an empty vocabulary
        return None
    return next((own for own in candidates if _is_equivalent(content, _tokenizer_json(own))), None)


def _is_equivalent(content: TokenizerJson, own_content: TokenizerJson) -> bool:
    """Whether two tokenizer.json give the same ids; `post_processor` has what one adds to them.

    Other programs add keys.
    """
    same_parts = all(
        content.get(part) == own_content[part]
        for part in ("normalizer", "pre_tokenizer", "decoder")
    )
    model = {name: content["model"].get(name) for name in own_content["model"]}
    return same_parts and model == own_content["model"]


def _pad_vocabulary(tokenizer: SubwordTokenizer, vocab_size: int, file: Path) -> SubwordTokenizer:
    """The same tokenizer with a token for each of `vocab_size` ids."""
    content = json.loads(tokenizer.to_json())
    ids = _token_ids(content, file)
    used = set(ids.values())
    unused = {f"<|unused_{i}|>": i for i in range(vocab_size) if i not in used}
    if not unused:
        return tokenizer
    if isinstance(content["model"]["vocab"], dict):
        # A token of the vocabulary has its id written; an added token gets the next free one.
        content["model"]["vocab"] |= ids | unused
    content["added_tokens"] += [_special_token(text, i) for text, i in unused.items()]
    padded = SubwordTokenizer(json.dumps(content))
    if _token_ids(json.loads(padded.to_json()), file) != ids | unused:
        raise InputError(
            f"its ids leave gaps that cannot be filled, up to the {vocab_size:,} rows of the model"
        )
    return padded


def _read_merges(folder: Path) -> TokenizerJson:
    """GPT-2's older files as the content of a tokenizer.json.

    Raises InputError for files of other models.
    """
    cure = (
        "write a tokenizer.json there, with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
    if not all((folder / name).is_file() for name in (VOCABULARY_FILE, MERGES_FILE)):
        if (folder / SENTENCEPIECE_FILE).is_file():
            raise InputError(
                f"{folder} has a tokenizer of SentencePiece, {SENTENCEPIECE_FILE}, which glasslm "
                f"does not read: {cure}"
            )
        raise InputError(f"{folder} holds no {TOKENIZER_FILE}: {cure}")
    if not _is_gpt2(folder):
        raise InputError(
            f"{folder} has {VOCABULARY_FILE} and {MERGES_FILE} but no {TOKENIZER_FILE}, which says "
            f"how texts are split into words: {cure}"
        )
    vocabulary = read_json(folder / VOCABULARY_FILE)
    lines = _read_text(folder / MERGES_FILE).split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    splitter = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    content = _bpe(vocabulary, merges, splitter, splitter | {"add_prefix_space": True})
    if isinstance(vocabulary, dict):
        content["added_tokens"] = [
            _special_token(end, vocabulary[end]) for end in END_OF_TEXT_TOKENS if end in vocabulary
        ]
    return content


def _is_gpt2(folder: Path) -> bool:
    """Whether tokenizer_config.json, or else config.json, names GPT-2."""
    for name, key in ((TOKENIZER_CONFIG_FILE, "tokenizer_class"), ("config.json", "model_type")):
        if (folder / name).is_file():
            values = read_json(folder / name)
            if isinstance(values, dict) and key in values:
                return str(values[key]).lower().startswith("gpt2")
    return False


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_MERGES_BYTES:
        raise DamagedError(
            f"{path} has {path.stat().st_size:,} bytes: expected at most {MAX_MERGES_BYTES:,}"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is damaged: it is not UTF-8 ({error})") from None
