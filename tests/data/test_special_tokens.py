"""Special tokens are one token each, and documents end with the first of them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as library
from numpy.typing import NDArray

from glasslm.config.schema import DataConfig
from glasslm.data.dataset import Dataset, prepare_dataset, tokenize_source
from glasslm.data.sources import corpora
from glasslm.data.special_tokens import TokenPattern, encode_pieces
from glasslm.data.text_pieces import cut_between_words
from glasslm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
    parse_tokenizer,
    train_bpe,
)
from glasslm.errors import InputError

END, START = "<|endoftext|>", "<|im_start|>"
STORY = "Once there was a cat. "
TEXT = f"{STORY}{END}{START}{STORY * 3}{END}\n{STORY}<|endof{END}"


def plain_tokenizers() -> list[Tokenizer]:
    return [CharTokenizer(STORY + "<|endof\n"), ByteTokenizer(), train_bpe([STORY * 40], 280)]


@pytest.fixture(params=plain_tokenizers(), ids=lambda tokenizer: tokenizer.kind)
def plain(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param


def prepare(
    path: Path, text: str | list[str], tokenizer: str = "byte", **settings: Any
) -> tuple[Dataset, list[str]]:
    """The dataset of texts, one a file, and the messages that it sent."""
    path.mkdir(exist_ok=True)
    for i, part in enumerate([text] if isinstance(text, str) else text):
        (path / f"{i}.txt").write_text(part, encoding="utf-8", newline="")
    data = DataConfig(text_file=(str(path),), tokenizer=tokenizer, **settings)
    messages: list[str] = []
    source = corpora.find_source(data, messages.append)
    return prepare_dataset(data, source, messages.append), messages


def all_ids(dataset: Dataset) -> list[int]:
    parts = (dataset.train, dataset.val, dataset.test)
    return [int(i) for part in parts if part for i in part.tokens[:]]


# -- tokenizers ------------------------------------------------------------------------------------


def test_special_tokens_follow_the_vocabulary_and_are_never_split(plain: Tokenizer) -> None:
    tokenizer = plain.with_special_tokens([END, START])
    V = plain.vocab_size
    assert dict(tokenizer.special_tokens) == {END: V, START: V + 1}
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.kind) == (V + 2, V, plain.kind)
    ids = tokenizer.encode(TEXT).tolist()
    assert (ids.count(V), ids.count(V + 1)) == (3, 1)
    assert tokenizer.decode(ids) == TEXT.replace(END, "").replace(START, "")
    # Between special tokens the ids are those of the tokenizer without them.
    assert ids[: ids.index(V)] == plain.encode(STORY).tolist()
    assert tokenizer.byte_lengths[[V, V + 1]].tolist() == [0, 0]


def test_no_ordinary_text_gives_a_special_token(plain: Tokenizer) -> None:
    tokenizer = plain.with_special_tokens([END])
    ids = tokenizer.encode("<|endof").tolist() + tokenizer.encode(END[1:-1][:7]).tolist()
    assert tokenizer.end_id not in ids


def test_the_saved_tokenizer_is_the_same(plain: Tokenizer) -> None:
    assert parse_tokenizer(plain.to_json()).end_id is None
    tokenizer = plain.with_special_tokens([START, END])  # START ends documents
    again = parse_tokenizer(tokenizer.to_json())
    assert (again.sha256, list(again.special_tokens)) == (tokenizer.sha256, [START, END])
    assert again.sha256 != plain.sha256
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_the_library_reads_the_same_ids_from_the_saved_bpe() -> None:
    tokenizer = train_bpe([STORY * 40], 280).with_special_tokens([END, START])
    other = library.Tokenizer.from_str(tokenizer.to_json())
    assert other.encode(TEXT, add_special_tokens=False).ids == tokenizer.encode(TEXT).tolist()
    assert other.decode(other.encode(TEXT).ids) == tokenizer.decode(tokenizer.encode(TEXT))


def test_without_a_mark_the_special_tokens_of_a_file_are_text() -> None:
    content = json.loads(train_bpe([STORY * 40], 280).with_special_tokens([END]).to_json())
    del content["added_tokens"][0]["eos_token"]
    tokenizer = SubwordTokenizer(json.dumps(content))
    assert (tokenizer.end_id, tokenizer.unused_special_tokens) == (None, (END,))
    assert len(tokenizer.encode(END)) > 1
    # Its own id is used where the token is asked for.
    assert tokenizer.with_special_tokens([END]).vocab_size == tokenizer.vocab_size


def test_an_unknown_character_is_named_where_it_is_in_the_text() -> None:
    tokenizer = CharTokenizer("abc", [END])
    with pytest.raises(InputError, match=f"first at character {len(END) + 2};"):
        tokenizer.encode(f"ab{END}X")


@pytest.mark.parametrize("tokens", ["x", [1], [""], ["a", "a"]])
def test_a_damaged_list_of_special_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(InputError, match="special_tokens"):
        parse_tokenizer(json.dumps({"kind": "byte", "special_tokens": tokens}))


# -- streams ---------------------------------------------------------------------------------------


def test_pieces_of_any_size_have_whole_special_tokens() -> None:
    rng, tokens = random.Random(0), ("<e>", "<e>x", "ab")
    pattern = TokenPattern(tokens)
    for _ in range(200):
        text = "".join(rng.choice(["<", "e", ">", "x", "a", "b", " ", *tokens]) for _ in range(30))
        cuts = sorted(rng.sample(range(30), 6))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None])]
        split = list(pattern.split(pieces))
        assert "".join(split) == text
        expected = [match[0] for match in pattern.compile().finditer(text)]
        assert [piece for piece in split if piece in tokens] == expected


def test_no_cut_is_inside_a_special_token() -> None:
    end = "<the end>"  # with a blank, and in text without blanks
    for text in (f"word {end}" * 40, f"x{end[:4]}{end[5:]}" * 400):
        tokens = TokenPattern((end, end.replace(" ", "")))
        pieces = list(cut_between_words([text], 5, tokens))
        assert "".join(pieces) == text
        assert len(pieces) > 10
        whole = [match[0] for match in tokens.compile().finditer(text)]
        assert [m[0] for piece in pieces for m in tokens.compile().finditer(piece)] == whole


# -- documents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_each_file_ends_with_one_token(tmp_path: Path, tokenizer: str) -> None:
    texts = [STORY * 4, STORY * 6 + "\n", f"{STORY * 5}{END}\n", ""]
    dataset, messages = prepare(tmp_path, texts, tokenizer, vocab_size=270, special_tokens=(END,))
    ids, end = all_ids(dataset), dataset.tokenizer.end_id
    assert end is not None
    assert ids.count(end) == 3
    ends = [i for i, token in enumerate(ids) if token == end]
    decoded = [dataset.tokenizer.decode(ids[a:b]) for a, b in zip([0, *ends], [*ends, len(ids)])]
    assert decoded == [texts[0], texts[1], STORY * 5, "\n"]
    assert dataset.facts["special_tokens"] == {END: 3}
    assert any(f"{END} 3 (ends of documents)" in message for message in messages)


def test_the_end_of_a_document_has_no_bytes(tmp_path: Path) -> None:
    dataset, _ = prepare(tmp_path, [STORY * 4, STORY * 6], special_tokens=(END,))
    facts, lengths = dataset.facts, dataset.tokenizer.byte_lengths
    for part, name in ((dataset.train, "train"), (dataset.val, "val")):
        assert lengths[part.tokens[:]].sum() == part.bytes == facts[f"{name}_bytes"]
    assert facts["train_bytes"] + facts["val_bytes"] == len(STORY) * 10


def test_a_separator_becomes_the_end(tmp_path: Path) -> None:
    text = f"{STORY}\n\n\n{STORY}\n\n\n\n\n\n{STORY}"
    dataset, _ = prepare(tmp_path, text, document_separator="\n\n\n")
    assert dataset.tokenizer.decode(all_ids(dataset)) == STORY * 3
    assert all_ids(dataset).count(256) == 3


def test_a_separator_across_two_reads_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glasslm.data.sources.text_files.CHUNK_BYTES", 5)
    dataset, _ = prepare(tmp_path, f"{STORY}##{STORY}##{STORY}", document_separator="##")
    assert all_ids(dataset).count(256) == 3
    assert "#" not in dataset.tokenizer.decode(all_ids(dataset))


def test_a_separator_that_the_text_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not contain --document-separator '@@'"):
        prepare(tmp_path, f"{STORY}{END}{STORY}", document_separator="@@")


def test_a_split_is_not_inside_a_special_token(tmp_path: Path) -> None:
    for n in range(8, 60):  # the boundary moves through both ends
        text = ("x" * n + END) * 2 + "y" * 30
        dataset, _ = prepare(tmp_path / str(n), text, special_tokens=(END,), val_fraction=0.5)
        assert all_ids(dataset).count(256) == 3


def test_special_tokens_leave_the_alphabet_and_bpe_alone(tmp_path: Path) -> None:
    text = f"{STORY * 20}{END}" * 20
    char, _ = prepare(tmp_path, text, "char", special_tokens=(END,))
    assert isinstance(char.tokenizer, CharTokenizer)
    assert char.tokenizer.alphabet == "".join(sorted(set(STORY)))
    bpe, _ = prepare(tmp_path, text, "bpe", vocab_size=400, special_tokens=(END,))
    assert not any(b"|" in token and len(token) > 1 for token in bpe.tokenizer.token_bytes)


def test_rows_of_a_parquet_file_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [STORY * 3, f"{STORY}\n\n{STORY}", STORY * 2]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "rows.parquet")
    data = DataConfig(text_file=(str(tmp_path / "rows.parquet"),), special_tokens=(END,))
    source = corpora.find_source(data, lambda message: None)
    assert "".join(source.text()) == "".join(row + END for row in rows)
    plain = corpora.find_source(DataConfig(text_file=data.text_file), lambda message: None)
    assert "".join(plain.text()) == "\n\n".join(rows)


def test_tokenize_source_ends_documents_in_the_same_way(tmp_path: Path) -> None:
    dataset, _ = prepare(tmp_path, [STORY * 4, STORY * 6], special_tokens=(END, START))
    data = DataConfig(text_file=(str(tmp_path),), special_tokens=(END, START))
    source = corpora.find_source(data, lambda message: None)
    assert tokenize_source(source, dataset.tokenizer, "strict").tolist() == all_ids(dataset)


def test_other_documents_are_another_dataset(tmp_path: Path) -> None:
    text = f"{STORY}\n\n{STORY}##{STORY}"
    settings: list[dict[str, Any]] = [
        {},
        {"special_tokens": (END,)},
        {"special_tokens": (START,)},
        {"special_tokens": (END, START)},
        {"document_separator": "\n\n"},
        {"document_separator": "##"},
    ]
    hashes = {prepare(tmp_path, text, **changes)[0].sha256 for changes in settings}
    assert len(hashes) == len(settings)
    assert prepare(tmp_path, text, **settings[4])[0].sha256 in hashes  # from the cache


# -- what is said ----------------------------------------------------------------------------------


def test_a_text_that_spells_special_tokens_is_reported(tmp_path: Path) -> None:
    for _ in range(2):  # the second time from the cache
        dataset, messages = prepare(tmp_path, TEXT)
        note = next(message for message in messages if "spells" in message)
        assert f"{END} 3 times, {START} 1 time" in note
        assert "ordinary text here, of several tokens" in note
        assert "--special-tokens '<|endoftext|>' '<|im_start|>'" in note
    assert dataset.tokenizer.decode(all_ids(dataset)) == TEXT
    _, messages = prepare(tmp_path, TEXT, special_tokens=(END, START))
    assert not any("spells" in message for message in messages)
    _, messages = prepare(tmp_path, TEXT, special_tokens=(END,))
    assert any(f"spells {START} 1 time" in message for message in messages)


def test_special_tokens_of_a_tokenizer_file_are_reported(tmp_path: Path) -> None:
    content = train_bpe([STORY * 40], 280).with_special_tokens(["[SEP]"]).to_json()
    path = tmp_path / "tokenizer.json"
    path.write_text(content.replace('"eos_token": true', '"eos_token": false'), encoding="utf-8")
    text = f"{STORY * 4}[SEP]{STORY * 4}"
    dataset, messages = prepare(tmp_path / "text", text, str(path))
    assert any("spells [SEP] 1 time" in message for message in messages)
    assert dataset.tokenizer.decode(all_ids(dataset)) == text
    dataset, _ = prepare(tmp_path / "text", text, str(path), special_tokens=(END,))
    ids = all_ids(dataset)
    special = dataset.tokenizer.special_tokens
    assert (ids.count(special[END]), ids.count(special["[SEP]"])) == (1, 1)
    assert dataset.facts["train_bytes"] + dataset.facts["val_bytes"] == len(STORY) * 8


@pytest.mark.parametrize("tokens", [("a", "a"), ("",)])
def test_special_tokens_are_different_texts(tokens: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="special_tokens"):
        DataConfig(special_tokens=tokens)


def test_ordinary_text_is_encoded_in_whole_pieces() -> None:
    pieces: list[tuple[str, int]] = []

    def encode(text: str, start: int) -> NDArray[np.uint32]:
        pieces.append((text, start))
        return np.zeros(len(text), np.uint32)

    encode_pieces("one two<|e|>four five", {"<|e|>": 9, "<|e|><|e|>": 8}, encode)
    assert pieces == [("one two", 0), ("four five", 12)]
