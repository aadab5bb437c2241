"""The tokenizer inside a GGUF file: byte pairs as llama.cpp's "gpt2", characters and bytes as its "rwkv".

"rwkv" is a trie of byte strings, of which the longest that matches is the token: for characters and bytes that is all
there is to do, and it is the one kind without an end of text, for which llama.cpp would else take a token of ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from glasslm.data.tokenizers import SubwordTokenizer, Tokenizer
from glasslm.errors import InputError
from glasslm.interop import vocabulary

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # what a token is, by llama.cpp's numbers

# How a text is cut before bytes are paired, by the name that llama.cpp has for it.
GPT2, LLAMA3, QWEN2 = "gpt-2", "llama-bpe", "qwen2"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
BETWEEN = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {WORDS + r"\p{N}{1,3}" + BETWEEN: LLAMA3, WORDS + r"\p{N}" + BETWEEN: QWEN2}

EXTRAS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
)
STRIPS = ("lstrip", "rstrip", "single_word")

BYTE_255 = "ÿ"  # its stand-in; UTF-8 has no such byte, so that no text holds this token


@dataclass(frozen=True)
class Vocabulary:
    """What the keys tokenizer.ggml.* say."""

    model: str
    tokens: list[str]  # (V,)
    types: list[int]  # (V,)
    pre: str | None = None
    merges: tuple[str, ...] = ()
    end: int | None = None


def of(tokenizer: Tokenizer) -> Vocabulary:
    """The same tokens, found in a text by the same rules. Raises InputError where llama.cpp has no such rules."""
    if isinstance(tokenizer, SubwordTokenizer):
        return _of_pairs(json.loads(tokenizer.to_json()), tokenizer)
    long = [token.decode() for token in tokenizer.token_bytes if len(token) > 1]
    if long:  # such a trie has branches without a token, and at an unknown character on one llama.cpp never ends
        raise InputError(
            f"llama.cpp can read a character tokenizer of ASCII alone, and this one has {len(long)} other characters "
            f"({''.join(long[:20])}): train with --tokenizer byte or --tokenizer bpe, and export that"
        )
    return Vocabulary(
        "rwkv",
        [_escaped(token) for token in tokenizer.token_bytes],
        [NORMAL] * tokenizer.vocab_size,
    )


def _escaped(token: bytes) -> str:
    r"""Bytes as "rwkv" writes them: what is printable in ASCII as it is, else \x and two digits."""
    return "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}"
        for byte in token
    )


def _of_pairs(described: dict[str, Any], tokenizer: SubwordTokenizer) -> Vocabulary:
    """`described`: the content of a tokenizer.json."""
    model, added = described["model"], described["added_tokens"]
    pre = _cut(described)
    texts = {i: text for text, i in model["vocab"].items()} | {
        token["id"]: token["content"] for token in added
    }
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    ids = range(tokenizer.vocab_size)
    known = vocabulary.end_of_text(tokenizer)
    end = known.id if known else None
    if end is None:  # llama.cpp ends a text at token 11 unless it is told another
        end = model["vocab"].get(BYTE_255)
    if end is None:
        raise InputError(
            "llama.cpp needs an end of text, and this tokenizer has neither <|endoftext|> nor all bytes"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary(
        "gpt2",
        [texts.get(i, f"<|unused_{i}|>") for i in ids],
        [kinds.get(i, NORMAL if i in texts else UNUSED) for i in ids],
        pre,
        tuple(merges) or (f"{BYTE_255} {BYTE_255}",),  # there must be one; this one never happens
        end,
    )


def _cut(described: dict[str, Any]) -> str:
    """llama.cpp's name for the cutting of a tokenizer.json. Raises InputError where it has none for it."""
    model, added = described["model"], described["added_tokens"]
    name = _named(described.get("pre_tokenizer") or {})
    # Text in NFC, as nearly all of it is, passes the normalizer NFC unchanged; llama.cpp leaves it out.
    plain = model["type"] == "BPE" and (described.get("normalizer") or {"type": "NFC"}) == {
        "type": "NFC"
    }
    extras = any(model.get(key) for key in EXTRAS) or any(
        token[key] for token in added for key in STRIPS
    )
    if name is None or not plain or extras or bool(model.get("ignore_merges")) != (name == LLAMA3):
        raise InputError(
            "llama.cpp has no rules like those of this tokenizer.json: expected byte-level BPE that cuts text as "
            "GPT-2, Llama 3 or Qwen2. Train with --tokenizer bpe, gpt2 or byte, and export that"
        )
    return name


def _named(splitter: dict[str, Any]) -> str | None:
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
            return CUTS.get(pattern)
    return None
