"""The tokenizer inside a GGUF file: "gpt2" for BPE, "rwkv" for characters and bytes.

"rwkv" is a trie of byte strings whose longest match is the next token. For characters and bytes
that is the whole tokenizer, and it is the only kind for which llama.cpp does not take some ordinary
token as the end of a text.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from glasslm.data.tokenizers import SubwordTokenizer, Tokenizer
from glasslm.errors import InputError
from glasslm.interop import hf_tokenizer
from glasslm.interop.hf_special_tokens import TokenSettings, default_settings, role_ids

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of a token

# The pre-tokenizers that llama.cpp has (how a text is split before bytes are merged), by its names,
# and the regular expressions of two of them.
GPT2, LLAMA3, QWEN2 = "gpt-2", "llama-bpe", "qwen2"
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SEPARATOR_PATTERN = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    WORD_PATTERN + r"\p{N}{1,3}" + SEPARATOR_PATTERN: LLAMA3,
    WORD_PATTERN + r"\p{N}" + SEPARATOR_PATTERN: QWEN2,
}

# Options of a tokenizer.json that llama.cpp does not have: of the model, and of an added token.
UNSUPPORTED_MODEL_OPTIONS = (
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
)
UNSUPPORTED_TOKEN_OPTIONS = ("lstrip", "rstrip", "single_word")

# The character that stands for byte 255. UTF-8 does not use this byte, so no text holds this token.
BYTE_255 = "ÿ"


@dataclass(frozen=True)
class GGUFTokenizer:
    """The values of the keys tokenizer.ggml.*."""

    model: str
    tokens: list[str]  # (V,)
    types: list[int]  # (V,)
    pre: str | None = None
    merges: tuple[str, ...] = ()
    end: int | None = None
    begin: int | None = None
    pad: int | None = None
    chat_template: str = ""
    turn_end: int | None = None  # ends an answer, where another token ends the text


def convert_tokenizer(tokenizer: Tokenizer, settings: TokenSettings | None = None) -> GGUFTokenizer:
    """The same tokenizer for llama.cpp; `settings`: roles of special tokens, and a chat template.

    Raises InputError where llama.cpp cannot split texts in the same way.
    """
    settings = default_settings(tokenizer) if settings is None else settings
    ids = role_ids(settings, hf_tokenizer.token_ids(tokenizer))
    eos = ids["eos_token_id"]
    if isinstance(tokenizer, SubwordTokenizer):
        converted = _convert_bpe(json.loads(tokenizer.to_json()), tokenizer, eos)
    else:
        converted = _convert_trie(tokenizer)
    begin, pad = ids["bos_token_id"], ids["pad_token_id"]
    template, ends = settings.get("chat_template", ""), settings.get("generation_eos_ids", [])
    return dataclasses.replace(
        converted,
        begin=converted.end if begin is None else begin,
        pad=pad,
        chat_template=template,
        end=converted.end if eos is None else eos,
        turn_end=ends[0] if template and ends and ends[0] != eos else None,
    )


def _convert_trie(tokenizer: Tokenizer) -> GGUFTokenizer:
    """A character or byte tokenizer for llama.cpp."""
    # A trie of longer byte strings has branches without a token, and llama.cpp hangs on an unknown
    # character there.
    long_tokens = [token.decode() for token in tokenizer.token_bytes if len(token) > 1]
    if long_tokens:
        raise InputError(
            "llama.cpp can read a character tokenizer of ASCII alone, and this one has "
            f"{len(long_tokens)} other characters ({''.join(long_tokens[:20])}): train with "
            "--tokenizer byte or --tokenizer bpe, then export"
        )
    # The first character must be a token for the same reason: "<b" is no <|endoftext|>.
    special = tokenizer.special_tokens
    unknown = [
        token
        for token in special
        if not token.isascii()
        or not token.isprintable()
        or "\\" in token
        or token[0].encode() not in tokenizer.token_bytes
    ]
    if unknown:
        raise InputError(
            f"llama.cpp cannot read the special token {unknown[0]!r} with this tokenizer: expected "
            "printable ASCII whose first character is in the vocabulary. Train with --tokenizer "
            "byte or bpe, then export"
        )
    ordinary = tokenizer.token_bytes[: tokenizer.vocab_size - len(special)]
    return GGUFTokenizer(
        "rwkv",
        [*map(_escape_token, ordinary), *special],
        [NORMAL] * len(ordinary) + [CONTROL] * len(special),
        end=tokenizer.end_id,
    )


def _escape_token(token: bytes) -> str:
    r"""A token for "rwkv": printable ASCII as it is, other bytes as \x and two digits."""
    return "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}"
        for byte in token
    )


def _convert_bpe(
    content: dict[str, Any], tokenizer: SubwordTokenizer, end: int | None
) -> GGUFTokenizer:
    """A BPE tokenizer for llama.cpp; `content` is that of its tokenizer.json, `end` its eos."""
    model, added = content["model"], content["added_tokens"]
    pre = _pre_tokenizer(content)
    texts = {i: text for text, i in model["vocab"].items()} | {
        token["id"]: token["content"] for token in added
    }
    types = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    ids = range(tokenizer.vocab_size)
    if end is None:  # without an end of text in the file, llama.cpp ends a text at token 11
        end = model["vocab"].get(BYTE_255)
    if end is None:
        raise InputError(
            "llama.cpp needs an end of text, and this tokenizer has neither <|endoftext|> nor all "
            "bytes: expected one of them. Train with --tokenizer bpe, gpt2 or byte, then export"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return GGUFTokenizer(
        "gpt2",
        [texts.get(i, f"<|unused_{i}|>") for i in ids],
        [types.get(i, NORMAL if i in texts else UNUSED) for i in ids],
        pre,
        tuple(merges)
        or (f"{BYTE_255} {BYTE_255}",),  # llama.cpp needs a merge; this one never applies
        end,
    )


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json.

    Raises InputError where llama.cpp has none.
    """
    model, added = content["model"], content["added_tokens"]
    name = _known_pre_tokenizer(content.get("pre_tokenizer") or {})
    # llama.cpp has no normalizer. NFC leaves text that is NFC already unchanged, as nearly all text
    # is.
    plain = model["type"] == "BPE" and (content.get("normalizer") or {"type": "NFC"}) == {
        "type": "NFC"
    }
    unsupported = any(model.get(key) for key in UNSUPPORTED_MODEL_OPTIONS) or any(
        token[key] for token in added for key in UNSUPPORTED_TOKEN_OPTIONS
    )
    if (
        name is None
        or not plain
        or unsupported
        or bool(model.get("ignore_merges")) != (name == LLAMA3)
    ):
        raise InputError(
            "llama.cpp cannot split texts as this tokenizer.json does: expected byte-level BPE "
            "that splits texts like GPT-2, Llama 3 or Qwen2. Train with --tokenizer bpe, gpt2 or "
            "byte, then export"
        )
    return name


def _known_pre_tokenizer(splitter: dict[str, Any]) -> str | None:
    match splitter:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return PRE_TOKENIZERS.get(pattern)
    return None
