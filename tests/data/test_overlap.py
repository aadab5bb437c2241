"""Shared passages against brute force, and against copies that were planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.data import overlap, rolling_hash
from glasslm.data.overlap import WINDOW_BYTES, Passage, find_longest_passage, match_windows

TEXTS = st.lists(st.sampled_from(list(b"ab\0")), max_size=80).map(bytes)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def longest_shared_length(pieces: list[bytes], text: bytes) -> int:
    shared = [
        end - start
        for piece in pieces
        for start in range(len(piece))
        for end in range(start + 1, len(piece) + 1)
        if piece[start:end] in text
    ]
    return max(shared, default=0)


@given(st.lists(TEXTS, max_size=4), TEXTS, st.integers(1, 40))
def test_the_longest_passage_is_that_of_brute_force(
    pieces: list[bytes], text: bytes, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "CHUNK_BYTES", chunk)
        longest = find_longest_passage(pieces, text)
    assert longest.length == longest_shared_length(pieces, text)
    if longest.length:
        passage = pieces[longest.piece][longest.start : longest.start + longest.length]
        assert len(passage) == longest.length
        assert text.find(passage) == longest.text_start


@given(TEXTS, TEXTS, st.integers(1, 12), st.integers(1, 40))
def test_windows_are_found_where_they_stand(
    windows: bytes, text: bytes, width: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "CHUNK_BYTES", chunk)
        in_text = match_windows(windows, text, width)
    expected = [windows[i : i + width] in text for i in range(0, len(windows) - width + 1, width)]
    assert in_text.tolist() == expected


@pytest.mark.parametrize("chunk", [overlap.CHUNK_BYTES, 5_000])
@pytest.mark.parametrize("size", [17, 120, 3_000])
def test_a_planted_copy_is_found_at_its_exact_place(
    size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "CHUNK_BYTES", chunk)
    text, copied = noise(100_000, 1), noise(size, 2)
    text = text[:43_210] + copied + text[43_210:]
    pieces = [noise(500, 3), noise(77, 4) + copied + noise(33, 5), noise(500, 6)]
    assert find_longest_passage(pieces, text) == Passage(size, 1, 77, 43_210)


def test_a_passage_does_not_run_from_one_piece_into_the_next() -> None:
    text = noise(2_000)
    assert find_longest_passage([text[100:300], text[300:400]], text) == Passage(200, 0, 0, 100)


def test_equal_hashes_are_not_taken_for_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the base 1 a hash is the sum of the bytes, which does not know their order."""
    monkeypatch.setattr(rolling_hash, "BASE", 1)
    assert find_longest_passage([b"abcdef"], b"fedcba").length == 1
    assert not match_windows(b"abcdef", b"fedcba", 6).any()


def test_repetitive_texts_share_their_whole_length() -> None:
    assert find_longest_passage([b"a" * 3_000], b"a" * 200_000) == Passage(3_000, 0, 0, 0)
    assert match_windows(b"a" * 3_000, b"b" + b"a" * 200_000).all()


def test_empty_texts_share_nothing() -> None:
    assert (
        find_longest_passage([], b"abc").length == find_longest_passage([b"abc"], b"").length == 0
    )
    assert find_longest_passage([b"abc", b""], b"xyz").length == 0
    assert match_windows(b"a" * (WINDOW_BYTES - 1), b"a" * WINDOW_BYTES).size == 0


def test_shakespeare_repeats_no_long_passage(data_dir: Path) -> None:
    text = (data_dir / "tinyshakespeare.txt").read_bytes()
    train, val = text[:1_003_854], text[1_003_854:]
    longest = find_longest_passage([val], train)
    assert val[longest.start :][: longest.length] == b" you, Signior Gremio?\n\nGREMIO:\n"
    assert train[longest.text_start :][: longest.length] == b" you, Signior Gremio?\n\nGREMIO:\n"
    assert not match_windows(val, train).any()
