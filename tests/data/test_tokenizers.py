"""Tokenizers: exact decoding, ids equal to those of other libraries, and errors for bad text."""

from __future__ import annotations

import collections
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from glasslm.data import tokenizers
from glasslm.data.stream_decoder import StreamDecoder
from glasslm.data.text_pieces import cut_between_words
from glasslm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
)
from glasslm.errors import InputError

# Splitting depends on blanks of several kinds, apostrophes, digits, long characters and special
# tokens as text.
TRICKY = st.text("ab's1. \n\t\r\x1c\x85\u3000é語🎭") | st.text() | st.just("a <|endoftext|> b")


def sample_text() -> str:
    """A text with the repetition of a language, without a file."""
    draw = np.random.default_rng(0)
    words = [
        "".join(draw.choice(list("etaoinshrdlu"), size)) for size in draw.integers(1, 9, 300)
    ]  # a few words often, most rarely
    chosen = [words[min(299, int(i))] for i in draw.exponential(40, 6000)]
    return "".join(
        word + (" ", ", ", "\n", ".\n\n")[int(i)] for word, i in zip(chosen, draw.choice(4, 6000))
    )


@pytest.fixture(scope="module")
def bpe() -> SubwordTokenizer:
    return tokenizers.train_bpe([sample_text()], 400)


@pytest.fixture(scope="module")
def gpt2(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SubwordTokenizer:
    folder = tmp_path_factory.mktemp("tiktoken")
    for path in (data_dir / "gpt2").iterdir():
        shutil.copyfile(path, folder / path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        return tokenizers.load_gpt2(lambda message: None)


def foreign_tokenizer(model: str) -> Library:
    """A tokenizer like those of other projects, trained on `sample_text`."""
    if model == "unigram":
        library = Library(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        trainer = trainers.UnigramTrainer(
            vocab_size=200, show_progress=False, special_tokens=["<s>"]
        )
    else:
        library = Library(models.WordPiece(unk_token="[UNK]"))
        library.normalizer = normalizers.Lowercase()
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=200, show_progress=False, special_tokens=["[UNK]"]
        )
    library.train_from_iterator([sample_text()], trainer)
    library.enable_truncation(16)  # as a classifier's tokenizer.json has it
    library.enable_padding(length=16)
    return library


@given(text=st.text())
def test_bytes_express_any_text(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert bytes(ids.tolist()) == text.encode()
    assert ByteTokenizer().decode(ids) == text


@given(text=st.text(min_size=1))
def test_characters_come_back_and_are_numbered_by_code_point(text: str) -> None:
    tokenizer = CharTokenizer(text)
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("".join(sorted(set(text)))).tolist() == list(range(len(set(text))))


@given(text=TRICKY)
def test_bpe_expresses_any_text(bpe: SubwordTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.byte_lengths[ids].sum() == len(text.encode())


@given(text=TRICKY, size=st.integers(1, 5))
def test_a_text_cut_into_pieces_has_the_same_ids(
    bpe: SubwordTokenizer, text: str, size: int
) -> None:
    whole = bpe._library.encode(text, add_special_tokens=False).ids
    pieces = list(cut_between_words([text], size))
    assert "".join(pieces) == text
    if all(len(piece) < 16 * size for piece in pieces):  # else it was cut for want of a blank
        assert [i for piece in pieces for i in bpe.encode(piece).tolist()] == whole


def test_every_merge_joins_a_most_frequent_pair(bpe: SubwordTokenizer) -> None:
    words = [
        [bytes([byte]) for byte in piece.encode()]
        for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(
            sample_text()
        )
        for piece in [piece.replace("Ġ", " ").replace("Ċ", "\n")]
    ]
    counts = collections.Counter(map(tuple, words))
    for merge in bpe.merges[:25]:
        pairs: collections.Counter[tuple[bytes, bytes]] = collections.Counter()
        for word, times in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        assert pairs[merge] == max(pairs.values())
        joined: collections.Counter[tuple[bytes, ...]] = collections.Counter()
        for word, times in counts.items():
            joined[_merged(word, merge)] += times
        counts = joined


def _merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    result: list[bytes] = []
    for symbol in word:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)


def test_training_bpe_twice_gives_the_same_and_a_short_text_stops_early(
    bpe: SubwordTokenizer,
) -> None:
    assert tokenizers.train_bpe([sample_text()], 400).sha256 == bpe.sha256
    assert bpe.vocab_size == 400
    assert 256 <= tokenizers.train_bpe(["so short a text"], 400).vocab_size < 260


@pytest.mark.parametrize("make", [lambda: CharTokenizer("aé語🎭\n\0"), ByteTokenizer])
def test_a_tokenizer_is_restored_from_its_json(make: Callable[[], Tokenizer]) -> None:
    again = tokenizers.parse_tokenizer(make().to_json())
    assert (again.kind, again.token_bytes, again.sha256) == (
        make().kind,
        make().token_bytes,
        make().sha256,
    )


def test_bpe_is_a_file_that_the_library_reads(bpe: SubwordTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe.to_json(), encoding="utf-8")
    text = sample_text()[:2000] + "naïve 語"
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(text).ids == bpe.encode(text).tolist()
    assert library.decode(bpe.encode(text).tolist()) == text
    again = tokenizers.read_tokenizer(tmp_path / "tokenizer.json")
    assert (again.kind, again.sha256, again.token_bytes) == ("bpe", bpe.sha256, bpe.token_bytes)


def test_gpt2_equals_tiktoken(
    gpt2: SubwordTokenizer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = pytest.importorskip("tiktoken")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "gpt2"))
    reference = tiktoken.get_encoding("gpt2")
    assert gpt2.vocab_size == reference.n_vocab == 50257
    assert gpt2.token_bytes[:-1] == [reference.decode_single_token_bytes(i) for i in range(50256)]
    assert gpt2.token_bytes[-1] == b""  # <|endoftext|>
    text = (data_dir / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids = gpt2.encode(text)
    assert len(ids) == 338_025
    assert ids.tolist() == reference.encode_ordinary(text)
    draw = np.random.default_rng(1)
    for _ in range(200):
        text = "".join(draw.choice(list("ab's1. \n\t\r\x1c\x85\u3000é語🎭"), 40)) + "<|endoftext|>"
        assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)
    again = tokenizers.parse_tokenizer(gpt2.to_json())
    assert (again.kind, again.sha256) == ("gpt2", gpt2.sha256)


def test_foreign_tokenizers_are_neither_truncated_nor_padded() -> None:
    tokenizer = tokenizers.parse_tokenizer(foreign_tokenizer("unigram").to_str())
    text = sample_text()[:400].replace("\n", " ").replace("  ", " ")
    ids = tokenizer.encode(text)
    assert tokenizer.kind == "json"
    assert len(ids) > 16
    assert tokenizer.decode(ids).strip() == text.strip()  # Metaspace begins every text with a blank
    assert "<s>" in tokenizer.to_json()
    assert tokenizer.token_bytes[0] == b""
    with pytest.raises(InputError, match="cannot express"):
        tokenizer.encode("<s>")  # a special token in a text is text, and this vocabulary has no "<"


def test_dropout_of_a_file_is_for_its_training_alone(bpe: SubwordTokenizer) -> None:
    library = Library.from_str(bpe.to_json())
    library.model.dropout = 0.9
    tokenizer = tokenizers.parse_tokenizer(library.to_str())
    np.testing.assert_array_equal(tokenizer.encode(sample_text()), bpe.encode(sample_text()))
    assert tokenizers.parse_tokenizer(tokenizer.to_json()).sha256 == tokenizer.sha256


def test_a_byte_order_mark_of_a_file_is_not_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(CharTokenizer("abc").to_json(), encoding="utf-8-sig")
    assert tokenizers.read_tokenizer(path).sha256 == CharTokenizer("abc").sha256


def test_wordpiece_bytes_join_to_words() -> None:
    tokenizer = tokenizers.parse_tokenizer(foreign_tokenizer("wordpiece").to_str())
    words = [word for word in sample_text().replace(",", "").replace(".", "").split() if word][:50]
    assert tokenizer.decode(tokenizer.encode(" ".join(words))).split() == words


def test_sentencepiece_bytes() -> None:
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁a": 3, "▁": 4, "b": 6}
    library = Library(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    library.add_special_tokens(["<unk>"])
    tokenizer = SubwordTokenizer(library.to_str())
    assert tokenizer.token_bytes == [
        b"",
        b"\xc3",
        b"\xa9",
        b" a",
        b" ",
        b"",
        b"b",
    ]  # id 5 is a hole
    assert tokenizer.decode(tokenizer.encode("bé")) == "bé"  # as transformers decodes


@given(ids=st.lists(st.integers(0, 255)))
def test_streaming_gives_the_same_text_and_never_half_a_character(ids: list[int]) -> None:
    stream = StreamDecoder(ByteTokenizer())
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == ByteTokenizer().decode(ids)


@given(ids=st.lists(st.sampled_from([*b"ab", *"é🎭".encode(), 0xE0, 0x80, 0xFF])))
def test_a_token_begins_behind_what_is_replaced_before_it(ids: list[int]) -> None:
    text, offsets, n_chars = ByteTokenizer().decode(ids), [], 0
    stream = StreamDecoder(ByteTokenizer())
    for i in ids:
        offsets.append(n_chars + stream.count_replaced(i))
        n_chars += len(stream.push(i))
    assert offsets == sorted(offsets)
    assert set(offsets) == set(range(len(text)))
    for i, offset in zip(ids, offsets):
        assert text[offset] == chr(i) if i < 0x80 else not text[offset].isascii()


def test_streaming_waits_for_the_last_byte(bpe: SubwordTokenizer) -> None:
    text = "a 🎭 b"
    stream = StreamDecoder(bpe)
    pieces = [stream.push(i) for i in bpe.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert stream.flush() == ""


def test_unknown_characters_are_named_with_what_is_known() -> None:
    with pytest.raises(InputError) as caught:
        CharTokenizer("abc\n").encode("cab é\u202e")
    message = str(caught.value)
    assert "' ' (U+0020 SPACE)" in message
    assert "'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)" in message
    assert "\u202e" not in message  # escaped, or it would turn the terminal around
    assert "first at character 3" in message
    assert repr("\nabc") in message


@pytest.mark.parametrize("make", [lambda: CharTokenizer("abc"), ByteTokenizer])
def test_lone_surrogates_are_refused_with_their_place(make: Callable[[], Tokenizer]) -> None:
    with pytest.raises(InputError, match=r"lone surrogate U\+DCFF at character 2"):
        make().encode("ab\udcff")


def test_windows_line_ends_are_named() -> None:
    unix, windows = tokenizers.CharTokenizer("ab\n"), tokenizers.CharTokenizer("ab\r\n")
    with pytest.raises(InputError, match=r"Windows line ends \(CR LF\).* tr -d '\\r'"):
        unix.encode("a\r\nb")
    with pytest.raises(InputError, match=r"'c' \(U\+0063.*Windows line ends"):
        unix.encode("a\r\nc")
    assert windows.decode(windows.encode("a\r\nb")) == "a\r\nb"
    with pytest.raises(InputError) as caught:
        unix.encode("c")
    assert "Windows" not in str(caught.value)


def test_lone_surrogates_are_refused_by_bpe(bpe: SubwordTokenizer) -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        bpe.encode("ab\ud800")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": "chr"}', '{"model": {}}', '{"kind": "char", "alphabet": ""}']
)
def test_text_that_describes_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        tokenizers.parse_tokenizer(text)


def test_a_million_characters_encode_in_well_under_a_tenth_of_a_second() -> None:
    text = (sample_text() * 40)[:1_000_000]
    tokenizer = CharTokenizer(text)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        tokenizer.encode(text)
        best = min(best, time.perf_counter() - started)
    assert best < 0.1  # a few milliseconds on a quiet machine
