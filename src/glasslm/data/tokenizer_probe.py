"""Limits for a tokenizer.json from elsewhere: growth of a text, memory, time, aborts.

A pattern may take exponential time, and a normalizer may write a hundred thousand characters for
each one. The growth is computed from the file. A file with components that are not known to be fast
encodes short texts in a process of its own, which has limits; this is done once for each shape.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from glasslm import files
from glasslm.data.cache import cache_dir
from glasslm.data.library_call import run_interruptibly
from glasslm.errors import InputError

MAX_GROWTH = 64  # characters for each character of a text; Unicode's NFKC writes up to 18
MAX_TOKEN_ID = 1 << 24
MAX_PROBE_CPU_S, MAX_PROBE_S = 20, 120  # seconds of computing, and by the clock
MAX_PROBE_BYTES = 8 << 30  # of address space
PROBE_LENGTHS = (200, 20_000)  # characters; exponential and quadratic patterns fail at one of them
MAX_PROBE_UNITS = 48  # characters and words of the patterns, each repeated in texts of its own

# Components whose time and output are linear in the length of the text.
FAST_COMPONENTS = {
    "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Strip", "BertNormalizer",
    "ByteLevel", "Prepend", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Metaspace",
    "Digits", "Punctuation", "CharDelimiterSplit", "UnicodeScripts", "ByteFallback", "Fuse",
    "WordPiece", "BPEDecoder", "CTC", "FixedLength",
}  # fmt: skip
COMPONENTS = ("normalizer", "pre_tokenizer", "decoder")
COMMAND = [sys.executable, "-P", "-m", "glasslm.data.tokenizer_probe"]


def require_bounded(content: dict[str, Any]) -> None:
    """Raise InputError unless the tokenizer.json `content` needs bounded time and memory.

    Errors of its structure are left to the library.
    """
    components = {name: content.get(name) for name in COMPONENTS}
    for name, component in components.items():
        if (growth := _growth(component)) > MAX_GROWTH:
            raise InputError(
                f"this tokenizer.json writes up to {growth:,} characters for each character of a "
                f"text (its {name}): expected at most {MAX_GROWTH}"
            )
    model = content.get("model")
    if not isinstance(model, dict):
        return
    names = ("continuing_subword_prefix", "end_of_word_suffix")
    settings = {name: model.get(name) for name in names}
    for name, value in settings.items():
        if isinstance(value, str) and len(value) > MAX_GROWTH:
            raise InputError(
                f"this tokenizer.json has a {name} of {len(value):,} characters: expected at most "
                f"{MAX_GROWTH}"
            )
    _require_dense_ids(content, model)
    if not all(map(_is_fast, components.values())):
        _probe_once(components | {"model": settings | {"type": model.get("type")}}, content)


def _require_dense_ids(content: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise InputError for an id that no model has: a list of all ids would fill the memory."""
    vocabulary, added = model.get("vocab"), content.get("added_tokens")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    largest = max((i for i in ids if isinstance(i, int)), default=0)
    if largest > MAX_TOKEN_ID:
        raise InputError(
            f"this tokenizer.json has the id {largest:,}: expected at most {MAX_TOKEN_ID:,}"
        )


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """The components of a sequence, at any depth; the component itself if it is none."""
    if not isinstance(component, dict):
        return
    if component.get("type") == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders"):
            parts = component.get(key)
            for part in parts if isinstance(parts, list) else ():
                yield from _parts(part)
    else:
        yield component


def _growth(component: Any) -> int:
    """Upper bound of the characters that a component writes for each character that it reads."""
    growth = 1
    for part in _parts(component):
        written = [part.get("content"), part.get("prepend"), part.get("replacement")]
        growth *= max([1, *(len(text) for text in written if isinstance(text, str))])
        if part.get("type") == "Precompiled":
            growth *= _charsmap_growth(part.get("precompiled_charsmap"))
    return growth


def _charsmap_growth(charsmap: Any) -> int:
    """The longest text that a precompiled map of SentencePiece writes for a character.

    The map has the size of a trie in 4 bytes, the trie, and texts that end with NUL.
    """
    try:
        data = base64.b64decode(charsmap or "")
    except (ValueError, TypeError):
        return 1  # the library refuses it
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")) or 1


def _is_fast(component: Any) -> bool:
    """Whether all parts of a component take time that is linear in the length of the text."""
    return all(
        str(part.get("type")) in FAST_COMPONENTS
        or (
            part.get("type") in ("Replace", "Split")
            and isinstance(part.get("pattern"), dict)
            and "String" in part["pattern"]
        )
        for part in _parts(component)
    )


def _probe_once(shape: dict[str, Any], content: dict[str, Any]) -> None:
    """Probe a shape of tokenizer, unless a file in the cache says that it was bounded."""
    key = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    marker = cache_dir("tokenizers") / key
    if marker.exists():
        return
    patterns = [part.get("pattern") for name in COMPONENTS for part in _parts(shape[name])]
    texts = list(_probe_texts(json.dumps(patterns, ensure_ascii=False)))
    job = json.dumps({"tokenizer": content, "texts": texts}).encode()
    if error := run_interruptibly(lambda: _run_probe(job)):
        raise InputError(f"this tokenizer.json cannot be used: {error}")
    files.write_atomic(marker, b"")


def _probe_texts(patterns: str) -> Iterator[str]:
    """Runs of the characters and words of `patterns`, with an end that a pattern may reject."""
    words = re.findall(r"[A-Za-z]{2,8}", patterns)
    characters = [c for c in "aA1 .é中_\n" + patterns if c.isprintable() or c == "\n"]
    units = list(dict.fromkeys([*characters[: 2 * MAX_PROBE_UNITS], *words]))
    for unit in units[:MAX_PROBE_UNITS]:
        for length in PROBE_LENGTHS:
            yield unit * (length // len(unit)) + "\x01"


def _run_probe(job: bytes) -> str:
    """Encode the texts of `job` in a process with limits; returns what went wrong, or nothing."""
    environment = os.environ | {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}
    try:
        result = subprocess.run(
            COMMAND, input=job, capture_output=True, timeout=MAX_PROBE_S, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"encoding short texts takes more than {MAX_PROBE_S} seconds"
    if result.returncode == 0:
        return ""
    if error := result.stdout.decode("utf-8", "replace").strip():
        return error
    return (
        f"encoding short texts needs more than {MAX_PROBE_CPU_S} seconds or "
        f"{MAX_PROBE_BYTES >> 30} GiB, or ends the tokenizers library (exit code "
        f"{result.returncode})"
    )


def _encode_with_limits() -> int:
    """The process of the probe: it prints the error of the library and returns 1, or 0."""
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (MAX_PROBE_CPU_S, MAX_PROBE_CPU_S))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":  # macOS refuses it
            resource.setrlimit(resource.RLIMIT_AS, (MAX_PROBE_BYTES, MAX_PROBE_BYTES))
    from tokenizers import Tokenizer

    job = json.loads(sys.stdin.buffer.read())
    try:
        library = Tokenizer.from_str(json.dumps(job["tokenizer"]))
    except Exception:  # Bare; the caller reads the file again and reports it.
        return 0
    for text in job["texts"]:
        try:
            encoding = library.encode_batch_fast([text], add_special_tokens=False)[0]
            library.decode(encoding.ids)
        except Exception:  # Bare: a model without a token for unknown text.
            continue
        except BaseException as error:  # a panic of Rust
            print(f"the library fails on the text {text[:8]!r}... of {len(text):,}: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(_encode_with_limits())
