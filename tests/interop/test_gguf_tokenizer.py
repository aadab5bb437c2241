"""Tokenizers in GGUF files: transformers and llama.cpp find the same tokens, and other splitting
rules are refused.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

pytest.importorskip("gguf")

from exported_models import llama_cpp, make_export, small_config, value

from glasslm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
    parse_tokenizer,
    train_bpe,
)
from glasslm.errors import InputError
from glasslm.interop import gguf_file, gguf_tokenizer

PIECES = [
    *"ab1 '\n\t\r.!sS-_=",
    "  ",
    "'s",
    "'LL",
    "'ve",
    "\u00a0",
    "\u2009",
    "é",
    "Σ",
    "中",
    "٣",
    "²",
    "Ⅻ",
    "ः",
    "🙂",
    "\x00",
]
WORDS = (
    "the cat sees a dog. a dog's tail isn't long; 12 345 dogs!\n\n  The   naïve “cat”… \tsees\r\n"
    * 3
)


def train_unsplit_bpe() -> dict[str, Any]:
    """BPE trained on text that is not split into words: it shows every difference in splitting."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    draw = random.Random(1)
    texts = ("".join(draw.choices(PIECES, k=8)) for _ in range(4000))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    return json.loads(library.to_str())


def bpe_with(**parts: Any) -> SubwordTokenizer:
    """A BPE tokenizer with some parts of its tokenizer.json replaced."""
    return SubwordTokenizer(json.dumps(json.loads(train_bpe([WORDS], 300).to_json()) | parts))


def added_token(content: str, **flags: bool) -> dict[str, Any]:
    usual = {
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    return {"id": 300, "content": content} | usual | flags


def split_by(pattern: str, ignore_merges: bool = False) -> SubwordTokenizer:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    model = UNSPLIT_BPE["model"] | {"ignore_merges": ignore_merges}
    return bpe_with(
        model=model, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]}
    )


UNSPLIT_BPE = train_unsplit_bpe()
LLAMA3, QWEN2 = gguf_tokenizer.PRE_TOKENIZERS
TOKENIZERS = {
    "char": CharTokenizer("".join(map(chr, range(128)))),
    "byte": ByteTokenizer(),
    "bpe": bpe_with(model=UNSPLIT_BPE["model"]),
    "bpe without pairs": train_bpe(["ab"], 300),
    "bpe with an end": bpe_with(added_tokens=[added_token("<|endoftext|>")]),
    "bpe with a word": bpe_with(added_tokens=[added_token("<think>", special=False)]),
    "llama 3": split_by(LLAMA3, ignore_merges=True),
    "qwen 2": split_by(QWEN2),
}


def unescaped(token: str) -> bytes:
    r"""As llama.cpp reads a token of "rwkv": \x and two digits are a byte."""
    return token.encode().decode("unicode_escape").encode("latin-1")


@pytest.mark.parametrize("name", ["char", "byte"])
def test_characters_and_bytes_are_the_tokens_of_a_trie(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    vocabulary = gguf_tokenizer.convert_tokenizer(tokenizer)
    assert [unescaped(token) for token in vocabulary.tokens] == tokenizer.token_bytes
    assert len(set(vocabulary.tokens)) == tokenizer.vocab_size == len(vocabulary.types)
    assert (vocabulary.model, vocabulary.end, vocabulary.merges) == ("rwkv", None, ())


def test_the_end_of_a_text_is_a_token_that_no_text_holds() -> None:
    """Without an end of text in the file, llama.cpp takes token 11, which may be a comma."""
    bpe, ended = (
        gguf_tokenizer.convert_tokenizer(TOKENIZERS["bpe"]),
        gguf_tokenizer.convert_tokenizer(TOKENIZERS["bpe with an end"]),
    )
    assert bpe.end is not None
    assert TOKENIZERS["bpe"].token_bytes[bpe.end] == b"\xff"
    assert (ended.end, ended.types[300]) == (300, gguf_tokenizer.CONTROL)
    assert (
        gguf_tokenizer.convert_tokenizer(TOKENIZERS["bpe with a word"]).types[300]
        == gguf_tokenizer.USER_DEFINED
    )
    assert gguf_tokenizer.convert_tokenizer(TOKENIZERS["bpe without pairs"]).merges == ("ÿ ÿ",)


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["bpe"]
    gguf_file.write(
        make_export(tmp_path, small_config(n_layers=1), tokenizer), tmp_path / "m.gguf", "f16"
    )
    vocabulary = gguf_tokenizer.convert_tokenizer(tokenizer)
    expected = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": vocabulary.tokens,
        "merges": list(vocabulary.merges),
        "token_type": vocabulary.types,
        "bos_token_id": vocabulary.end,
        "eos_token_id": vocabulary.end,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    assert {
        key: value(tmp_path / "m.gguf", f"tokenizer.ggml.{key}") for key in expected
    } == expected
    assert len(vocabulary.tokens) == tokenizer.vocab_size


@pytest.mark.parametrize(
    "tokenizer",
    [
        bpe_with(normalizer={"type": "Lowercase"}),
        bpe_with(
            pre_tokenizer={
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        ),
        bpe_with(pre_tokenizer={"type": "Whitespace"}),
        bpe_with(added_tokens=[added_token("<mask>", lstrip=True)]),
        split_by(r"\d+|\D+"),
        split_by(LLAMA3, ignore_merges=False),
        split_by(QWEN2, ignore_merges=True),
        parse_tokenizer(
            '{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'
        ),
    ],
)
def test_other_rules_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="--tokenizer bpe"):
        gguf_tokenizer.convert_tokenizer(tokenizer)


def test_dropout_is_no_rule_of_a_trained_tokenizer() -> None:
    model = UNSPLIT_BPE["model"] | {"dropout": 0.5}
    assert gguf_tokenizer.convert_tokenizer(bpe_with(model=model)).merges


def test_characters_beyond_ascii_are_refused() -> None:
    with pytest.raises(InputError, match=r"2 other characters \(äé\): train with --tokenizer byte"):
        gguf_tokenizer.convert_tokenizer(CharTokenizer("abäé"))


def test_a_tokenizer_that_cannot_end_is_refused() -> None:
    described = json.loads(train_bpe([WORDS], 300).to_json())
    del described["model"]["vocab"][gguf_tokenizer.BYTE_255]
    with pytest.raises(InputError, match="end of text"):
        gguf_tokenizer.convert_tokenizer(SubwordTokenizer(json.dumps(described)))


def test_transformers_finds_the_same_byte_pairs(tmp_path: Path) -> None:
    """... but for the letter ÿ, which it takes for the end of a text."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in ("bpe", "bpe with an end", "llama 3", "qwen 2"):
        tokenizer = TOKENIZERS[name]
        gguf_file.write(
            make_export(tmp_path, small_config(n_layers=1), tokenizer), tmp_path / "m.gguf", "f16"
        )
        there = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        draw = random.Random(2)
        for text in ("".join(draw.choices(PIECES, k=12)) for _ in range(50)):
            assert (
                there(text, add_special_tokens=False)["input_ids"]
                == tokenizer.encode(text).tolist()
            ), (name, text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_finds_the_same_tokens(name: str, tmp_path: Path) -> None:
    library, tokenizer = llama_cpp(), TOKENIZERS[name]
    gguf_file.write(
        make_export(tmp_path, small_config(n_layers=1), tokenizer), tmp_path / "m.gguf", "f16"
    )
    reader = library.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    characters = (
        st.characters(max_codepoint=127)
        if name == "char"
        else st.characters(exclude_categories=["Cs"])
    )

    @settings(max_examples=200)
    @given(
        st.text(characters)
        | st.lists(st.sampled_from(["a", "dog's", " ", "  ", "\n", "12345", "!?", "\t"])).map(
            "".join
        )
    )
    def same(text: str) -> None:
        ids = reader.tokenize(text.encode(), add_bos=True, special=False)
        assert ids == tokenizer.encode(text).tolist()
        assert b"".join(reader.detokenize([token]) for token in ids) == text.encode()

    same()
    reader.close()


@pytest.mark.parametrize("name", ["char", "byte", "bpe"])
def test_llama_cpp_writes_the_same_text_and_does_not_stop(name: str, tmp_path: Path) -> None:
    library, tokenizer = llama_cpp(), TOKENIZERS[name]
    model = make_export(tmp_path, small_config(block_size=64), tokenizer)
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    reader = library.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False, type_k=0, type_v=0)
    tokens = tokenizer.encode("the cat").astype(np.int64)
    start = len(tokens)
    while len(tokens) < 60:
        tokens = np.append(tokens, model.logits(tokens[None])[0, -1].argmax())
    generated = []
    for token in reader.generate(tokens[:start].tolist(), temp=0.0, repeat_penalty=1.0):
        generated.append(token)
        if len(generated) == 60 - start:
            break
    assert generated == tokens[start:].tolist()
    vocabulary = library.llama_model_get_vocab(reader._model.model)
    end_tokens = [
        token
        for token in range(tokenizer.vocab_size)
        if library.llama_vocab_is_eog(vocabulary, token)
    ]
    assert [tokenizer.token_bytes[token] for token in end_tokens] == (
        [b"\xff"] if name == "bpe" else []
    )
    reader.close()


def test_llama_cpp_refuses_a_character_that_the_model_does_not_know(tmp_path: Path) -> None:
    library = llama_cpp()
    gguf_file.write(
        make_export(tmp_path, small_config(), CharTokenizer("abc\n")), tmp_path / "m.gguf", "f32"
    )
    reader = library.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    assert reader.create_completion("abc", max_tokens=2)["choices"][0]["finish_reason"] == "length"
    with pytest.raises(RuntimeError, match="-1"):
        reader.create_completion("abXc", max_tokens=2)
    reader.close()
