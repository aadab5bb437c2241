"""Pieces of a stream of strings: cut between words, sampled, or taken from the beginning."""

from __future__ import annotations

from glasslm.data.text_pieces import cut_between_words, subsample, take_characters


def test_cutting_is_bounded_where_no_blank_comes() -> None:
    pieces = list(cut_between_words(["語" * 70] * 10, 4))
    assert "".join(pieces) == "語" * 700
    assert max(map(len, pieces)) <= 64


def test_a_subsample_is_evenly_spaced() -> None:
    assert list(subsample("abcdefgh", 0.25)) == ["d", "h"]
    assert list(subsample("abc", 1.5)) == ["a", "b", "c"]


def test_the_first_characters_may_end_inside_a_piece() -> None:
    assert list(take_characters(["abc", "defg", "h"], 5)) == ["abc", "de"]
