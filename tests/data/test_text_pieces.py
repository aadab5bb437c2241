"""Pieces of a stream of strings: cut between words, sampled, or taken from the beginning."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.data import text_pieces
from glasslm.data.text_pieces import cut_between_words, subsample, take_characters


def test_cutting_is_bounded_where_no_blank_comes() -> None:
    pieces = list(cut_between_words(["語" * 70] * 10, 4))
    assert "".join(pieces) == "語" * 700
    assert max(map(len, pieces)) <= 64


@pytest.mark.parametrize("document", ["emma", "語" * 9])
def test_cutting_reads_a_text_without_blanks_once(
    document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = 0

    def search(text: str, start: int) -> re.Match[str] | None:
        nonlocal searched
        match = word_end.search(text, start)
        searched += max(0, (match.end() if match else len(text)) - start)
        return match

    word_end = text_pieces._WORD_END
    monkeypatch.setattr(text_pieces, "_WORD_END", SimpleNamespace(search=search))
    texts = [document, "<|endoftext|>"] * 2_000
    assert "".join(cut_between_words(texts, 500)) == "".join(texts)
    assert searched < 2 * len("".join(texts))


@given(st.lists(st.text("ab \n", max_size=9), max_size=9), st.integers(1, 4))
def test_pieces_end_where_a_search_of_the_whole_text_ends_them(texts: list[str], size: int) -> None:
    pieces, text = list(cut_between_words(texts, size)), "".join(texts)
    start, expected = 0, []
    while start < len(text):
        ends = [
            end
            for end in range(start + size + 1, len(text))
            if not text[end - 1].isspace() and text[end].isspace()
        ]
        expected.append(text[start : min([*ends, len(text)])])
        start += len(expected[-1])
    if max(map(len, expected), default=0) < 16 * size:  # no piece ends within a word
        assert pieces == expected


def test_a_subsample_is_evenly_spaced() -> None:
    assert list(subsample("abcdefgh", 0.25)) == ["d", "h"]
    assert list(subsample("abc", 1.5)) == ["a", "b", "c"]


def test_the_first_characters_may_end_inside_a_piece() -> None:
    assert list(take_characters(["abc", "defg", "h"], 5)) == ["abc", "de"]
