"""Tokenizers in transformers have the ids and texts of glasslm, and files from others are checked
first.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from glasslm.data import tokenizers
from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer, SubwordTokenizer, Tokenizer
from glasslm.errors import DamagedError, InputError
from glasslm.interop import families, hf_tokenizer

# Line ends, blanks, a combining accent, a joiner, signs that stand for blanks, NUL, U+FFFD.
ALPHABET = "abcé\n\r\t \x00\x1c\x85\u00a0\u0301\u200d\u2028\u3000▁ĠĊ#語🎭👩\ufffd<|>_"
TRICKY = st.text("ab's1. \n\t\r\x1c\x85\u3000é語🎭") | st.text()
TEXT = "the cat sat on the mat, and the cat's hat sat there.\n\nWho sat? The cat did.\n" * 20
MODEL_TYPES = [family.model_type for family in families.FAMILIES if family.model_type != "qwen2"]

Folder = Callable[..., Path]


def with_end() -> SubwordTokenizer:
    """BPE with an end of text, as GPT-2's is."""
    library = Library.from_str(tokenizers.train_bpe([TEXT], 300).to_json())
    library.add_special_tokens(["<|endoftext|>"])
    return SubwordTokenizer(library.to_str())


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: CharTokenizer(ALPHABET),
    "byte": ByteTokenizer,
    "bpe": lambda: tokenizers.train_bpe([TEXT], 300),
    "gpt2": with_end,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A model folder without its weights."""

    def make(tokenizer: Tokenizer, model_type: str = "llama", block_size: int = 24) -> Path:
        path = tmp_path_factory.mktemp("model")
        (path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        for name, content in hf_tokenizer.tokenizer_files(tokenizer, block_size).items():
            (path / name).write_bytes(content)
        return path

    return make


@pytest.fixture(scope="module")
def auto() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer


@pytest.fixture(scope="module")
def pairs(auto: Any, folder: Folder) -> dict[str, tuple[Tokenizer, Any]]:
    """For each kind the tokenizer of glasslm and that of transformers."""
    return {
        kind: (ours := make(), auto.from_pretrained(folder(ours))) for kind, make in MAKERS.items()
    }


def same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2"])
@given(text=TRICKY)
def test_any_text_has_the_same_ids_there(
    pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str
) -> None:
    same(*pairs[kind], text)


@given(text=st.text(ALPHABET))
def test_characters_have_the_same_ids_there(
    pairs: dict[str, tuple[Tokenizer, Any]], text: str
) -> None:
    same(*pairs["char"], text)


@given(ids=st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_are_shown_alike(
    pairs: dict[str, tuple[Tokenizer, Any]], ids: list[int]
) -> None:
    for kind in ("byte", "bpe"):
        ours, theirs = pairs[kind]
        assert theirs.decode(ids) == ours.decode(ids)


def test_an_unknown_character_is_an_error_there(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    """An unknown character is never another token and never left out."""
    _, theirs = pairs["char"]
    for text in ("x", "abx", "x\n", "ab語x🎭", "A", "ệ"):
        with pytest.raises(Exception, match=hf_tokenizer.UNKNOWN_TOKEN):
            theirs(text)


def test_only_an_end_of_text_is_special_there(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    for kind, (ours, theirs) in pairs.items():
        expected = ["<|endoftext|>"] if kind == "gpt2" else []
        assert theirs.all_special_tokens == expected
        assert theirs.eos_token == theirs.bos_token == (expected[0] if expected else None)
        assert len(theirs) == ours.vocab_size
        assert theirs.model_max_length == 24
    ours, theirs = pairs["gpt2"]
    text, end = "the cat<|endoftext|>", ours.vocab_size - 1
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    parsed = ours.with_special_tokens(["<|endoftext|>"]).encode(text).tolist()
    assert theirs(text, split_special_tokens=False)["input_ids"] == parsed
    assert parsed == [*ours.encode("the cat").tolist(), end]
    assert theirs.decode([end], skip_special_tokens=True) == ours.decode([end]) == ""


def test_a_word_that_only_looks_like_an_end_is_none() -> None:
    library = Library.from_str(MAKERS["bpe"]().to_json())
    library.add_tokens(["</s>"])
    assert hf_tokenizer.end_of_text(SubwordTokenizer(library.to_str())) is None
    library.add_special_tokens(["<|endoftext|>"])
    assert hf_tokenizer.end_of_text(SubwordTokenizer(library.to_str())) == (
        "<|endoftext|>",
        library.get_vocab_size() - 1,
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_type_leaves_the_tokenizer_as_it_is(
    auto: Any, folder: Folder, model_type: str
) -> None:
    for kind, make in MAKERS.items():
        ours = make()
        same(
            ours,
            auto.from_pretrained(folder(ours, model_type)),
            ALPHABET if kind == "char" else TEXT + ALPHABET,
        )


@pytest.mark.slow
def test_gpt2_is_the_same_there_and_from_its_older_files(
    auto: Any, folder: Folder, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "TIKTOKEN_CACHE_DIR", str(shutil.copytree(data_dir / "gpt2", tmp_path / "tiktoken"))
    )
    ours = tokenizers.load_gpt2(lambda message: None)
    theirs = auto.from_pretrained(folder(ours, "gpt2"))
    same(ours, theirs, TEXT + "naïve 語🎭  \n\n don't  1234\x85")
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", 50256)
    assert hf_tokenizer.read_tokenizer(folder(ours), 50257).sha256 == ours.sha256

    merges, words = sorted((data_dir / "gpt2").iterdir(), key=lambda path: path.stat().st_size)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copy(words, old / "vocab.json")
    shutil.copy(merges, old / "merges.txt")
    again = hf_tokenizer.read_tokenizer(old, 50257)
    assert (again.kind, again.sha256) == ("gpt2", ours.sha256)


def test_a_tokenizer_of_another_make_adds_nothing_there(auto: Any, folder: Folder) -> None:
    """glasslm does not train on tokens that a post-processor adds, so the export drops it."""
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    library.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    )
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    ours = SubwordTokenizer(library.to_str())
    theirs = auto.from_pretrained(folder(ours))
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT).tolist()


# -- and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_what_left_comes_back_the_same(kind: str, folder: Folder) -> None:
    ours = MAKERS[kind]()
    model_folder = folder(ours)
    for path in (model_folder, model_folder / "tokenizer.json"):
        back = hf_tokenizer.read_tokenizer(path, ours.vocab_size)
        assert type(back) is type(ours)
        assert (back.sha256, back.token_bytes) == (ours.sha256, ours.token_bytes)


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_what_transformers_saved_again_comes_back_the_same(
    kind: str, pairs: dict[str, tuple[Tokenizer, Any]], tmp_path: Path
) -> None:
    ours, theirs = pairs[kind]
    theirs.save_pretrained(tmp_path)
    assert hf_tokenizer.read_tokenizer(tmp_path, ours.vocab_size).sha256 == ours.sha256


@given(alphabet=st.text(min_size=1, max_size=40))
def test_any_alphabet_comes_back(folder: Folder, alphabet: str) -> None:
    ours = CharTokenizer(alphabet)
    described = json.loads(hf_tokenizer.tokenizer_files(ours, 8)["tokenizer.json"])
    back = hf_tokenizer._match_own_tokenizer(described)
    assert isinstance(back, CharTokenizer)
    assert back.sha256 == ours.sha256


def test_what_only_looks_like_ours_is_not_taken_for_it(tmp_path: Path) -> None:
    """Single characters, but in another order, split into words first, or one of them special."""
    content = json.loads(hf_tokenizer.tokenizer_files(CharTokenizer("abc "), 8)["tokenizer.json"])
    swapped, split, special = (json.loads(json.dumps(content)) for _ in range(3))
    swapped["model"]["vocab"] = {"b": 0, "a": 1, "c": 2, " ": 3}
    split["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    special["added_tokens"] = [hf_tokenizer._special_token("a", 1)]
    for described, ids in ((swapped, [0, 3, 1]), (split, [2, 1]), (special, [2, 0, 1])):
        (tmp_path / "tokenizer.json").write_text(json.dumps(described))
        back = hf_tokenizer.read_tokenizer(tmp_path, 4)
        assert isinstance(back, SubwordTokenizer)
        assert back.encode("b a").tolist() == ids


def unigram() -> SubwordTokenizer:
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator(
        [TEXT], trainers.UnigramTrainer(vocab_size=60, special_tokens=["<s>", "</s>"])
    )
    return SubwordTokenizer(library.to_str())


@pytest.mark.parametrize("make", [*MAKERS.values(), unigram], ids=[*MAKERS, "unigram"])
@pytest.mark.parametrize("more", [1, 64])
def test_rows_without_a_token_get_one_without_text(
    make: Callable[[], Tokenizer], more: int, folder: Folder, tmp_path: Path
) -> None:
    ours = make()
    rows = ours.vocab_size + more
    path = folder(ours)
    padded = hf_tokenizer.read_tokenizer(path, rows)
    assert padded.vocab_size == rows
    text = "the cat sat" if ours.kind == "json" else ALPHABET
    assert padded.encode(text).tolist() == ours.encode(text).tolist()
    assert padded.token_bytes[ours.vocab_size :] == [b""] * more
    if ours.kind != "char":  # where "▁" would be taken for a blank
        assert padded.token_bytes[: ours.vocab_size] == ours.token_bytes
    if ours.kind in ("byte", "bpe", "gpt2"):
        written = f"the<|unused_{rows - 1}|>"
        assert padded.encode(written).tolist() == ours.encode(written).tolist()
    again = tokenizers.parse_tokenizer(padded.to_json())  # as a run folder keeps it
    assert (again.vocab_size, again.sha256) == (rows, padded.sha256)
    assert hf_tokenizer.read_tokenizer(folder(padded), rows).vocab_size == rows
    names = json.loads(padded.to_json())["added_tokens"]
    assert f"<|unused_{rows - 1}|>" in [token["content"] for token in names if token["special"]]


def test_holes_between_the_ids_are_filled(tmp_path: Path) -> None:
    words = {"<s>": 0, "a": 2, "b": 5, "ab": 9}
    library = Library(models.BPE(vocab=words, merges=[("a", "b")]))
    library.decoder = decoders.Fuse()
    library.save(str(tmp_path / "tokenizer.json"))
    back = hf_tokenizer.read_tokenizer(tmp_path, 12)
    assert back.token_bytes == [b"<s>", b"", b"a", b"", b"", b"b", b"", b"", b"", b"ab", b"", b""]
    assert back.encode("abba").tolist() == [9, 5, 2]
    assert sorted(json.loads(back.to_json())["model"]["vocab"].values()) == list(range(12))
    assert back.vocab_size == 12


def list_token(path: Path, i: int, **options: Any) -> None:
    """List a token in tokenizer_config.json alone."""
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_bytes()) | {"added_tokens_decoder": {str(i): options}}
    file.write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(
    "options",
    [
        {"content": "<|im_end|>", "special": True},
        {"content": "<|im_end|>", "special": True, "lstrip": True},
        {"content": "<|im_end|>"},
        {"content": "<|endoftext|>", "special": True, "rstrip": True},
    ],
)
def test_tokens_that_tokenizer_config_lists_are_those_of_transformers(
    options: dict[str, Any], auto: Any, folder: Folder
) -> None:
    tokenizer = with_end().with_special_tokens(["<|endoftext|>"])
    path = folder(tokenizer, block_size=64)
    list_token(path, tokenizer.vocab_size, **options)
    back = hf_tokenizer.read_tokenizer(path, tokenizer.vocab_size + 1)
    ours = back.with_special_tokens(["<|endoftext|>"])
    text = "the cat <|im_end|> sat <|endoftext|> on"
    ids = ours.encode(text).tolist()
    assert auto.from_pretrained(path)(text)["input_ids"] == ids
    assert (tokenizer.vocab_size in ids) == (options["content"] == "<|im_end|>")


@pytest.mark.parametrize(("i", "content"), [(5, "<|im_end|>"), (310, "<|im_end|>"), (5, "e")])
def test_a_listed_token_with_the_id_of_another_is_refused(
    i: int, content: str, folder: Folder
) -> None:
    path = folder(with_end())
    list_token(path, i, content=content, special=True)
    with pytest.raises(InputError, match=rf"gives '{re.escape(content)}' the id {i}, but it gets"):
        hf_tokenizer.read_tokenizer(path, 320)


def test_fewer_rows_than_ids_are_refused_with_both(folder: Folder) -> None:
    for kind, highest in (("byte", 255), ("gpt2", MAKERS["gpt2"]().vocab_size - 1)):
        with pytest.raises(InputError, match=rf"ids up to {highest}\b.*only 200 rows"):
            hf_tokenizer.read_tokenizer(folder(MAKERS[kind]()), 200)


def test_dropout_stays_behind(folder: Folder) -> None:
    """With it, AutoTokenizer would give other ids at each call."""
    library = Library.from_str(tokenizers.train_bpe([TEXT], 300).to_json())
    library.model.dropout = 0.9
    ours = SubwordTokenizer(library.to_str())
    theirs = Library.from_file(str(folder(ours) / "tokenizer.json"))
    assert theirs.encode(TEXT).ids == ours.encode(TEXT).tolist()


def older_files(tokenizer: SubwordTokenizer, folder: Path, encoding: str = "utf-8") -> None:
    model = json.loads(tokenizer.to_json())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    merges = "#version: 0.2\n" + merges
    (folder / "merges.txt").write_text(merges, encoding=encoding, newline="\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_vocabulary_and_merges_are_read_where_they_are_gpt2s(tmp_path: Path, encoding: str) -> None:
    ours = tokenizers.train_bpe([TEXT], 300)
    older_files(ours, tmp_path, encoding)
    with pytest.raises(InputError, match="save_pretrained"):
        hf_tokenizer.read_tokenizer(tmp_path, 300)  # no file says how texts are split
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    back = hf_tokenizer.read_tokenizer(tmp_path, ours.vocab_size)
    assert back.encode(TEXT + ALPHABET).tolist() == ours.encode(TEXT + ALPHABET).tolist()
    assert back.token_bytes == ours.token_bytes
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(InputError, match="save_pretrained"):
        hf_tokenizer.read_tokenizer(tmp_path, 300)


def test_sentencepiece_and_nothing_at_all_are_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tokenizer\.json.*save_pretrained"):
        hf_tokenizer.read_tokenizer(tmp_path, 10)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(InputError, match=r"SentencePiece.*save_pretrained"):
        hf_tokenizer.read_tokenizer(tmp_path, 10)


def model(**changes: Any) -> str:
    described = json.loads(hf_tokenizer.tokenizer_files(CharTokenizer("abc"), 8)["tokenizer.json"])
    described["model"] |= changes.pop("model", {})
    return json.dumps(described | changes)


HOSTILE = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 100,
    "nested": b"[" * 1_000_000,
    "nested in a vocabulary": b'{"model": {"vocab": ' + b'{"a":' * 100_000,
    "nested for the library":
        b'{"model": {"vocab": {"a": 0}}, "normalizer": ' + b'{"a":' * 500 + b"0" + b"}" * 502,
    "a list": b"[]",
    "not a number": b'{"model": {"vocab": {"a": NaN}}}',
    "no model": b'{"added_tokens": []}',
    "no vocabulary": model(model={"vocab": None}).encode(),
    "an endless vocabulary": model(model={"vocab": {"a": 2**32 - 2}}).encode(),
    "beyond all integers": model(model={"vocab": {"a": 10**30}}).encode(),
    "negative": model(model={"vocab": {"a": -1}}).encode(),
    "words for ids": model(model={"vocab": {"a": "0"}}).encode(),
    "no ids": model(model={"vocab": {"a": None}}).encode(),
    "true": model(model={"vocab": {"a": True}}).encode(),
    "pieces that are none": model(model={"type": "Unigram", "vocab": [["a", 0.0], "b"]}).encode(),
    "pieces of lists": model(model={"type": "Unigram", "vocab": [[["a"], 0.0]]}).encode(),
    "added far away": model(added_tokens=[{"id": 2**31, "content": "z", "special": True}]).encode(),
    "added without a name": model(added_tokens=[{"id": 1}]).encode(),
    "added words": model(added_tokens="abc").encode(),
    "merges of nothing": model(model={"merges": [["x", "y"]]}).encode(),
    "what makes the library panic": model(model={"continuing_subword_prefix": "longer",
        "merges": [["a", "b"]], "vocab": {"a": 0, "b": 1, "ab": 2}}).encode(),
    "an unknown model": model(model={"type": "Magic"}).encode(),
    "an unknown part": model(normalizer={"type": "Magic"}).encode(),
    "a bad pattern": model(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("},
        "behavior": "Isolated", "invert": False}).encode(),
    "a surrogate": model(model={"vocab": {"\ud800": 0}}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(HOSTILE[name])
    began = time.process_time()
    with pytest.raises((InputError, DamagedError)) as caught:
        hf_tokenizer.read_tokenizer(tmp_path, 1000)
    assert time.process_time() - began < 1
    assert "tokenizer.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]
)
def test_a_file_of_ten_gigabytes_is_not_read(name: str, tmp_path: Path) -> None:
    if name != "tokenizer.json":
        older_files(tokenizers.train_bpe([TEXT], 260), tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with open(tmp_path / name, "wb") as file:
        file.truncate(10 << 30)
    began = time.process_time()
    with pytest.raises(DamagedError, match="10,737,418,240"):
        hf_tokenizer.read_tokenizer(tmp_path, 1000)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("words", "merges"), [("[]", ""), ('{"a": 0, "b": 1}', "a b c\n"), ('{"a": 0}', "a b\n")]
)
def test_hostile_older_files_are_refused(words: str, merges: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "vocab.json").write_text(words)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(InputError):
        hf_tokenizer.read_tokenizer(tmp_path, 1000)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises((InputError, DamagedError)):
        hf_tokenizer.read_tokenizer(tmp_path, 1000)
