"""Unbroken runs are cut for the training of BPE, in bounded time, and nowhere else."""

from __future__ import annotations

import base64
import random
import re

import pytest

from glasslm.data import long_words, tokenizers
from glasslm.data.long_words import MAX_PIECES, MAX_WORD_CHARACTERS, cut_long_words

NUMBERS = random.Random(0)
LONG = 40_000  # characters

UNBROKEN = {
    "DNA": "".join(NUMBERS.choices("ACGT", k=LONG)),
    "one letter": "a" * LONG,
    "blanks": " " * LONG,
    "line ends": "\n" * LONG,
    "NULs": "\0" * LONG,
    "digits": "".join(NUMBERS.choices("0123456789", k=LONG)),
    "superscripts": "".join(NUMBERS.choices("1²½Ⅷ", k=LONG)),
    "punctuation": "".join(NUMBERS.choices("!$%&/()=_", k=LONG)),
    "Chinese": "".join(NUMBERS.choices("天地玄黃宇宙洪荒", k=LONG)),
    "combining marks": "".join(NUMBERS.choices("\u0301\u0302\u0303", k=LONG)),
    "emoji": "".join(NUMBERS.choices("🙂🙃😀", k=LONG)),
}


def ignore_message(message: str) -> None:
    pass


@pytest.mark.parametrize("name", UNBROKEN)
def test_the_trainer_sees_no_long_word(name: str) -> None:
    messages: list[str] = []
    pieces = list(cut_long_words(["before ", UNBROKEN[name], " after"], messages.append))
    (message,) = messages
    assert "unbroken runs of more than 256 characters were cut: 1 of them" in message
    assert max(map(len, pieces)) <= MAX_WORD_CHARACTERS
    assert sorted("".join(pieces)) == sorted(f"before {UNBROKEN[name]} after")


@pytest.mark.parametrize("name", UNBROKEN)
def test_the_tokenizer_of_an_unbroken_text_is_lossless(name: str) -> None:
    text = UNBROKEN[name]
    bpe = tokenizers.train_bpe([text], 280)
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert tokenizers.parse_tokenizer(bpe.to_json()).encode(text).tolist() == ids.tolist()


def test_other_texts_reach_the_trainer_unchanged() -> None:
    blob = base64.b64encode(NUMBERS.randbytes(LONG)).decode()  # letters and digits in turns
    dashes, indent = "-" * MAX_WORD_CHARACTERS, " " * (MAX_WORD_CHARACTERS - 1)
    texts = ["some words, and\n", "x1" * 2000, blob, f"{dashes}\n{indent}deep"]
    messages: list[str] = []
    assert list(cut_long_words(texts, messages.append)) == texts
    assert messages == []


def test_of_many_pieces_an_even_share_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_words, "MAX_PIECES", 8)
    words = [chr(0x4E00 + i) * MAX_WORD_CHARACTERS for i in range(100)]
    messages: list[str] = []
    pieces = list(cut_long_words(["".join(words)], messages.append))
    assert [piece for piece in pieces if piece] == words[::16]
    assert "1 of 16 pieces was used" in messages[0]


def test_the_work_for_unbroken_text_is_bounded() -> None:
    """The number of characters that the trainer sees, which its time is proportional to."""
    texts = (letters * LONG for letters in ["ACGT"] * 100)
    seen = sum(map(len, cut_long_words(texts, ignore_message)))
    assert seen <= MAX_PIECES * MAX_WORD_CHARACTERS


def test_words_are_those_of_the_split_pattern() -> None:
    """Each word that the pre-tokenizer makes of the pieces is short."""
    from tokenizers import pre_tokenizers

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = " ".join(text[:2000] for text in UNBROKEN.values()) + "".join(UNBROKEN.values())
    for piece in cut_long_words([text], ignore_message):
        for word, (start, end) in splitter.pre_tokenize_str(piece):
            assert end - start <= MAX_WORD_CHARACTERS + 1, word[:20]  # with the blank before it
    assert re.search(r"\w{9000}", text)
