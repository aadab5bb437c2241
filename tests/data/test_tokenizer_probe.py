"""A tokenizer.json from elsewhere that takes exponential time, writes without bound, or aborts."""

import base64
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from glasslm.data import library_call, tokenizer_probe
from glasslm.data.tokenizers import SubwordTokenizer, parse_tokenizer
from glasslm.errors import InputError

pytest.importorskip("tokenizers")


def write_tokenizer(**fields: Any) -> str:
    """The JSON of a tokenizer of single letters; `fields` replace its own."""
    vocab = {letter: i for i, letter in enumerate("abxyz !")}
    model = {"type": "BPE", "vocab": vocab, "merges": []} | fields.pop("model", {})
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model} | fields)


def replace(content: str, pattern: str = "a", kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def normalizers(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def split(regex: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"x\0" + b"y" * 500 + b"\0")
UNBOUNDED: dict[str, tuple[dict[str, Any], str]] = {
    "a replacement": ({"normalizer": replace("b" * 100_000)}, "100,000 characters for each"),
    "a replacement by a pattern": ({"normalizer": replace("b" * 65, ".", "Regex")}, "65 char"),
    "replacements one after another": (
        {"normalizer": normalizers(replace("bb" * 5), normalizers(replace("a" * 10, "b")))},
        "100 characters for each",
    ),
    "a prefix": ({"normalizer": {"type": "Prepend", "prepend": "b" * 99}}, "99 characters"),
    "a charsmap": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP.decode()}},
        "500 characters",
    ),
    "a decoder": ({"decoder": replace("b" * 1000)}, "its decoder"),
    "a suffix of words": ({"model": {"end_of_word_suffix": "b" * 100}}, "end_of_word_suffix"),
    "an id": ({"model": {"vocab": {"a": 4_000_000_000}}}, "has the id 4,000,000,000"),
    "an added id": ({"added_tokens": [{"id": 1 << 31, "content": "b"}]}, "has the id"),
}


@pytest.mark.parametrize(("fields", "says"), UNBOUNDED.values(), ids=UNBOUNDED)
def test_growth_without_bound_is_refused_before_the_library_reads_it(
    fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        parse_tokenizer(write_tokenizer(**fields))


@pytest.mark.parametrize(
    "component",
    [{"type": []}, {"type": {}}, {"type": "Sequence", "pretokenizers": 5}],
)
def test_a_component_of_another_type_is_refused_by_the_library(component: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"not a tokenizer\.json that the tokenizers library reads"
    ):
        parse_tokenizer(write_tokenizer(pre_tokenizer=component))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    return tmp_path / "tokenizers"


def test_patterns_of_exponential_time_are_refused(cache: Path) -> None:
    """Each in a process of its own, whose library panics or is ended."""
    for pattern in (r"(x+)+$", r"(?:yz|yzyz)+$"):
        with pytest.raises(InputError, match="cannot be used"):
            parse_tokenizer(write_tokenizer(pre_tokenizer=split(pattern)))
    assert not any(cache.iterdir())


def test_a_pattern_is_tried_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pattern of Llama 3 is accepted; the second time no process is started."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    text = write_tokenizer(pre_tokenizer=split(pattern))
    assert parse_tokenizer(text).encode("ab xyz").tolist() == [0, 1, 5, 2, 3, 4]
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(tokenizer_probe, "_run_probe", None)
    parse_tokenizer(text)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("code", [-6, -9, -11, -24])
def test_an_abort_of_the_library_is_an_error_in_words(
    code: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack overflow or a limit ends the process of the probe, not this one."""
    command = f"import os; os.kill(os.getpid(), {-code})"

    monkeypatch.setattr(tokenizer_probe, "COMMAND", [sys.executable, "-S", "-c", command])
    with pytest.raises(InputError, match=f"ends the tokenizers library .exit code {code}"):
        parse_tokenizer(write_tokenizer(pre_tokenizer=split("a+")))


def test_a_panic_and_a_call_without_end_are_errors_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a text reaches what the probe did not."""

    class PanicException(BaseException):
        """As pyo3 has it: no Exception."""

    class Library:
        def encode_batch_fast(self, pieces: list[str], add_special_tokens: bool) -> Any:
            raise PanicException("retry-limit-in-match over")

    tokenizer = parse_tokenizer(write_tokenizer())
    assert isinstance(tokenizer, SubwordTokenizer)
    monkeypatch.setattr(tokenizer, "_library", Library())
    with pytest.raises(InputError, match="cannot express the text: retry-limit-in-match over"):
        tokenizer.encode("ab")
    with pytest.raises(InputError, match=r"it fails: it takes more than 0 seconds"):
        library_call.call_tokenizers(lambda: threading.Event().wait(5), "it fails", 0)


def test_the_error_and_the_result_of_a_call_are_those_of_its_thread() -> None:
    assert library_call.run_interruptibly(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        library_call.run_interruptibly(lambda: 1 // 0)
