"""What a tokenizer.json says: bytes of its tokens, its kind, the token that ends documents.

Letters: V vocabulary size.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from glasslm.errors import InputError

GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's encoder.py).

    A printable byte has its own character, the others have characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTE_OF_CHARACTER = _byte_of_character()


def text_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token with other characters is taken as text."""
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode()


def read_token_bytes(vocabulary: dict[str, int], description: dict[str, Any]) -> list[bytes]:
    """(V,) bytes of each id; empty for ids without a token and for special tokens.

    The decoder of the file decides: byte-level, SentencePiece (▁, <0x0A>) or WordPiece. The bytes
    are exact for the first two. WordPiece drops spaces and case, so its bytes are an estimate.
    """
    decoder, byte_level = json.dumps(description.get("decoder") or {}), uses_byte_level(description)
    word_by_word = '"WordPiece"' in decoder or not description.get("decoder")
    special = {token["content"]: token["special"] for token in description["added_tokens"]}
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if token in special:
            result[i] = b"" if special[token] else token.encode()
        elif byte_level:
            result[i] = text_bytes(token)
        elif (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token)) and '"ByteFallback"' in decoder:
            result[i] = bytes([int(byte[1], 16)])
        elif word_by_word:
            result[i] = (token[2:] if token.startswith("##") else " " + token).encode()
        else:
            result[i] = token.replace("▁", " ").encode()
    return result


def uses_byte_level(description: dict[str, Any]) -> bool:
    """Whether the tokens are bytes, so that a text is the sum of its tokens."""
    parts = (description.get("decoder"), description.get("pre_tokenizer"))
    return '"ByteLevel"' in json.dumps(parts)


def detect_kind(description: dict[str, Any], is_own: bool) -> str:
    """bpe, gpt2 or json. A tokenizer.json has no field for it.

    `is_own`: glasslm has added the special tokens.
    """
    model, splitter = description["model"], description.get("pre_tokenizer") or {}
    byte_level = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if (
        model["type"] != "BPE"
        or not byte_level
        or splitter["add_prefix_space"]
        or description.get("normalizer")
        or model.get("continuing_subword_prefix")  # tokens with more than their bytes
        or model.get("end_of_word_suffix")
        or not BYTE_OF_CHARACTER.keys() <= model["vocab"].keys()  # a byte without a token vanishes
    ):
        return "json"
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    merges_file = "#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges)
    if hashlib.sha256(merges_file.encode()).hexdigest() == GPT2_MERGES_SHA256:
        return "gpt2"
    plain = {"special": True, "lstrip": False, "rstrip": False, "single_word": False}
    is_plain = all(plain.items() <= token.items() for token in description["added_tokens"])
    return "bpe" if is_plain and (is_own or not description["added_tokens"]) else "json"


def read_end_mark(content: dict[str, Any]) -> str:
    """The special token of a tokenizer.json that ends documents; "" without one.

    It has the entry "eos_token": true among the added tokens, which other programs ignore.
    """
    tokens = content.get("added_tokens") or []
    return next((token["content"] for token in tokens if token.get("eos_token") is True), "")


def mark_end(description: dict[str, Any], end: str) -> str:
    """A tokenizer.json whose special tokens are parsed, and `end` ends documents."""
    for token in description["added_tokens"]:
        token.pop("eos_token", None)
        if token["content"] == end:
            token["eos_token"] = True
    return json.dumps(description, indent=2, ensure_ascii=False)


def own_tokenizer_json(content: dict[str, Any], special_tokens: Mapping[str, int]) -> str:
    """glasslm's own tokenizer.json."""
    special = {"special_tokens": list(special_tokens)} if special_tokens else {}
    return json.dumps(content | special)


def read_special_tokens(content: dict[str, Any]) -> list[str]:
    """The special tokens of glasslm's own tokenizer.json. Raises InputError."""
    tokens = content.get("special_tokens", [])
    is_valid = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    if not is_valid or not all(tokens) or len(set(tokens)) < len(tokens):
        raise InputError("this is not a tokenizer: special_tokens is not a list of different texts")
    return tokens


def parse_tokenizer_json(text: str) -> dict[str, Any]:
    """The object in the JSON of a tokenizer. Raises InputError for other text."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise InputError("this is not a tokenizer: its JSON is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"this is not a tokenizer: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError("this is not a tokenizer: its JSON is no object")
    return content
