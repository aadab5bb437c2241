"""GGUF files hold what was exported, for the library that describes the format, for transformers and for llama.cpp."""

import dataclasses
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

import gguf

from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
    from_json,
    train_bpe,
)
from glasslm.errors import InputError
from glasslm.interop import gguf_file, gguf_vocabulary
from glasslm.interop.gguf_file import Kind, Reading
from glasslm.interop.model_export import Leaving
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs.run_folder import Run

ALPHABET = "".join(map(chr, range(48, 48 + 37)))
SMALL = ModelConfig(d_model=32, n_layers=2, n_heads=4, block_size=24)
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


def kin(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


GPT2: dict[str, Any] = {"norm": "layernorm", "feedforward": "gelu", "position": "learned"}
MODELS = {
    "llama": kin(),
    "llama, untied": kin(tie_embeddings=False),
    "llama, shared keys": kin(n_kv_heads=2),
    "llama, one key": kin(n_kv_heads=1, d_ff=50),
    "llama, biases": kin(bias=True),
    "llama, scaled embeddings": kin(scale_embeddings=True),
    "llama, longer by linear": kin(rope_scaling="linear", rope_factor=4.0),
    "llama, longer by ntk": kin(rope_scaling="ntk", rope_factor=4.0, n_kv_heads=2),
    "llama, other numbers": kin(rope_base=500.0, norm_eps=1e-2),
    "llama, a window as wide as the context": kin(window=24, bias=True),
    "llama, experts": kin(n_experts=4, experts_per_token=2, n_kv_heads=2),
    "llama, all experts": kin(n_experts=3, experts_per_token=3, tie_embeddings=False),
    "qwen3": kin(qk_norm=True, n_kv_heads=2),
    "qwen3, longer by linear": kin(qk_norm=True, rope_scaling="linear", rope_factor=2.0),
    "qwen3, wide heads": kin(
        qk_norm=True, d_model=256, n_heads=2, n_kv_heads=1, n_layers=1, d_ff=64
    ),
    "qwen3moe": kin(qk_norm=True, n_experts=4, experts_per_token=2),
    "qwen3moe, wide experts": kin(qk_norm=True, n_experts=3, experts_per_token=2, d_ff=768),
    "gpt2": kin(**GPT2),
    "gpt2, untied": kin(**GPT2, tie_embeddings=False, bias=True),
    "gpt2, sinusoids": kin(**GPT2 | {"position": "sinusoidal"}, d_ff=70),
    "gpt2, no positions": kin(**GPT2 | {"position": "none"}, bias=True, norm_eps=1e-2),
    "gpt2, scaled embeddings": kin(**GPT2, scale_embeddings=True),
    "gpt2, of its length": kin(**GPT2, bias=True, block_size=1024),
}


def leaving(folder: Path, config: ModelConfig, tokenizer: Tokenizer | None = None) -> Leaving:
    """A model whose every weight is drawn, norms and biases too, so that a name that was mixed up shows."""
    tokenizer = tokenizer or CharTokenizer(ALPHABET)
    rng = np.random.default_rng(3)
    weights = {
        name: (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in initial_weights(parameter_table(config, tokenizer.vocab_size), 3)
    }
    run = folder / "phi3-faust"  # a name that llama.cpp takes for Microsoft's
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(
        json.dumps({"format": 1, "config": {}, "data": {"sha256": "d" * 64}}), "utf-8"
    )
    return Leaving(Run(run), 7, config.resolved(), tokenizer, weights)


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def value(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def test_the_tensors_of_a_llama_are_those_that_were_written(tmp_path: Path) -> None:
    model = leaving(tmp_path, kin(n_kv_heads=2, tie_embeddings=False, bias=True))
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    there, here = tensors(tmp_path / "m.gguf"), model.weights
    for theirs, ours in {
        "token_embd.weight": "embedding.weight", "output.weight": "head.weight", "output_norm.weight": "norm.weight",
        "blk.1.attn_norm.weight": "blocks.1.attention_norm.weight",
        "blk.1.attn_v.weight": "blocks.1.attention.v.weight", "blk.1.attn_v.bias": "blocks.1.attention.v.bias",
        "blk.1.attn_output.weight": "blocks.1.attention.o.weight",
        "blk.1.attn_output.bias": "blocks.1.attention.o.bias",
        "blk.1.ffn_norm.weight": "blocks.1.feedforward_norm.weight",
        "blk.1.ffn_gate.weight": "blocks.1.feedforward.gate.weight",
        "blk.1.ffn_up.bias": "blocks.1.feedforward.up.bias",
        "blk.1.ffn_down.weight": "blocks.1.feedforward.down.weight",
    }.items():  # fmt: skip
        assert np.array_equal(there[theirs].data, here[ours]), theirs
    assert not there["blk.1.attn_k.bias"].data.any()
    assert len(there) == len(here) + 2  # a bias of the keys in each block


def test_neighbours_turn_together_as_halves_did(tmp_path: Path) -> None:
    """Rope on neighbours of the exported query and key gives the scores that rope on halves of ours gives."""
    model = leaving(tmp_path, kin(n_kv_heads=2, bias=True))
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    there, here, Q = tensors(tmp_path / "m.gguf"), model.weights, 8
    x = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    angles = 5 / 10_000 ** (np.arange(0, Q, 2) / Q)
    turn = np.exp(1j * angles)

    def halves(name: str) -> Any:
        head = (here[f"blocks.0.attention.{name}.weight"] @ x).reshape(-1, Q)[1]
        return (head[: Q // 2] + 1j * head[Q // 2 :]) * turn

    def neighbours(name: str) -> Any:
        head = (there[f"blk.0.attn_{name}.weight"].data @ x).reshape(-1, Q)[1]
        return (head[::2] + 1j * head[1::2]) * turn

    assert np.allclose(halves("q"), neighbours("q"), atol=1e-6)
    assert np.allclose(halves("k"), neighbours("k"), atol=1e-6)
    bias = here["blocks.0.attention.q.bias"].reshape(4, Q)
    assert np.array_equal(there["blk.0.attn_q.bias"].data.reshape(4, Q)[2][::2], bias[2][: Q // 2])


def test_the_tensors_of_experts_are_stacked(tmp_path: Path) -> None:
    model = leaving(tmp_path, kin(n_experts=4, qk_norm=True))
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    there = tensors(tmp_path / "m.gguf")
    for theirs, ours in {"gate": "gate", "up": "up", "down": "down"}.items():
        stacked = there[f"blk.1.ffn_{theirs}_exps.weight"].data
        for expert in range(4):
            assert np.array_equal(
                stacked[expert],
                model.weights[f"blocks.1.feedforward.experts.{expert}.{ours}.weight"],
            )
    assert np.array_equal(
        there["blk.0.attn_q.weight"].data, model.weights["blocks.0.attention.q.weight"]
    )  # neox
    assert np.array_equal(
        there["blk.0.attn_q_norm.weight"].data, model.weights["blocks.0.attention.q_norm.weight"]
    )
    assert np.array_equal(
        there["blk.0.ffn_gate_inp.weight"].data, model.weights["blocks.0.feedforward.router.weight"]
    )
    assert "output.weight" not in there


def test_the_tensors_of_a_gpt2(tmp_path: Path) -> None:
    model = leaving(tmp_path, kin(**GPT2, bias=True))
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    there, here = tensors(tmp_path / "m.gguf"), model.weights
    qkv = np.concatenate([here[f"blocks.0.attention.{part}.weight"] for part in "qkv"])
    assert np.array_equal(there["blk.0.attn_qkv.weight"].data, qkv)
    assert np.array_equal(there["blk.0.attn_qkv.bias"].data[:32], here["blocks.0.attention.q.bias"])
    assert np.array_equal(there["blk.0.ffn_up.weight"].data, here["blocks.0.feedforward.up.weight"])
    assert np.array_equal(there["position_embd.weight"].data, here["position.weight"])


@pytest.mark.parametrize("name", ["llama, experts", "gpt2"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_fewer_bits_are_as_near_as_their_format_can_be(
    name: str, kind: Kind, tmp_path: Path
) -> None:
    model = leaving(tmp_path, MODELS[name])
    for each in ("f32", kind):
        gguf_file.write(model, tmp_path / f"{each}.gguf", each)  # type: ignore[arg-type]
    exact, near = tensors(tmp_path / "f32.gguf"), tensors(tmp_path / f"{kind}.gguf")
    rounded = set()
    for tensor, original in exact.items():
        data = gguf.dequantize(near[tensor].data, near[tensor].tensor_type).reshape(
            original.data.shape
        )
        if near[tensor].tensor_type == gguf.GGMLQuantizationType.F32:
            assert np.array_equal(data, original.data)
            continue
        rounded.add(tensor)
        blocks = original.data.reshape(-1, 32)
        if kind == "q8_0":  # half a step of the scale, and the rounding of the scale itself
            scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
            bound = (0.5 + 127 * 2**-11) * scale + 2**-24
        else:
            bound = np.abs(blocks) * 2**-11 + 2**-25
        assert (np.abs(data.reshape(-1, 32) - blocks) <= bound * (1 + 1e-6)).all()
        assert not np.array_equal(data, original.data)
    small = {"position_embd.weight"} | {f"blk.{i}.ffn_gate_inp.weight" for i in range(2)}
    assert rounded == {tensor for tensor in exact if exact[tensor].data.ndim > 1} - small


def test_the_numbers_of_the_architecture_and_where_it_is_from(tmp_path: Path) -> None:
    model = leaving(
        tmp_path, kin(n_kv_heads=2, rope_scaling="linear", rope_factor=4.0, norm_eps=1e-6, d_ff=96)
    )
    path = tmp_path / "deep" / "er" / "m.gguf"
    gguf_file.write(model, path, "q8_0")
    expected = {
        "general.architecture": "llama", "general.file_type": 7, "general.quantization_version": 2,
        "llama.context_length": 24, "llama.embedding_length": 32, "llama.block_count": 2,
        "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0,
        "llama.vocab_size": 37, "glasslm.run": "phi3-faust", "glasslm.step": "7", "glasslm.data_sha256": "d" * 64,
        "glasslm.tokenizer_sha256": model.tokenizer.sha256, "glasslm.config_sha256": model.run.config_sha256,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: value(path, key) for key in expected} == expected
    assert value(path, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert value(path, "llama.rope.freq_base") == 10_000
    assert value(path, "tokenizer.ggml.eos_token_id") is None
    assert "phi3" not in value(path, "general.name")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama, longer by ntk",
            {"llama.rope.freq_base": 10_000 * 4 ** (8 / 6), "llama.rope.scaling.type": None},
        ),
        (
            "llama, a window as wide as the context",
            {"general.architecture": "llama", "llama.context_length": 24},
        ),
        ("llama, all experts", {"llama.expert_count": 3, "llama.expert_used_count": 3}),
        (
            "qwen3moe",
            {"qwen3moe.expert_feed_forward_length": 96, "qwen3moe.attention.key_length": 8},
        ),
        (
            "gpt2, no positions",
            {"gpt2.attention.layer_norm_epsilon": 1e-2, "gpt2.attention.head_count": 4},
        ),
    ],
)
def test_the_numbers_of_other_architectures(
    name: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    gguf_file.write(leaving(tmp_path, MODELS[name]), tmp_path / "m.gguf", "f16")
    found = {key: value(tmp_path / "m.gguf", key) for key in expected}
    assert found == {
        key: v if isinstance(v, str | None) else pytest.approx(v, rel=1e-6)
        for key, v in expected.items()
    }


REFUSED = {
    "--window 0": kin(window=5),
    "--feedforward swiglu": kin(feedforward="geglu"),
    "--feedforward gelu": kin(**GPT2 | {"feedforward": "relu"}),
    "--experts-per-token 2": kin(qk_norm=True, n_experts=4, experts_per_token=1),
    "--norm rmsnorm": kin(norm="layernorm"),
    "--no-shared-expert": kin(n_experts=4, shared_expert=True),
}


@pytest.mark.parametrize("cure", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_with_the_switch(
    cure: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=cure):
        gguf_file.write(leaving(tmp_path, REFUSED[cure]), tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*"))


def test_widths_that_blocks_do_not_fill_are_refused_by_q8_0_alone(tmp_path: Path) -> None:
    model = leaving(tmp_path, kin(d_model=40, d_ff=100))
    with pytest.raises(
        InputError, match=r"d_model is 40 and d_ff is 100.*f16.*--d-model 64 --d-ff 128"
    ):
        gguf_file.write(model, tmp_path / "m.gguf", "q8_0")
    gguf_file.write(model, tmp_path / "m.gguf", "f16")


def test_a_file_is_there_as_a_whole_or_as_it_was(tmp_path: Path) -> None:
    """A weight too large for 16 bits is found when others are written already."""
    model = leaving(tmp_path, kin())
    gguf_file.write(model, tmp_path / "m.gguf", "f16")
    before = (tmp_path / "m.gguf").read_bytes()
    model.weights["blocks.1.feedforward.down.weight"][3, 4] = -7e4
    with pytest.raises(InputError, match=r"blk.1.ffn_down.weight reaches 7e\+04.*take f32"):
        gguf_file.write(model, tmp_path / "m.gguf", "f16")
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", model.run.path.name}


# -- tokenizers --------------------------------------------------------------------------------------------------------


def across() -> dict[str, Any]:
    """Byte pairs learnt from text that was not cut: wherever a text is not cut alike, they show it."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    draw = random.Random(1)
    texts = ("".join(draw.choices(PIECES, k=8)) for _ in range(4000))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    return json.loads(library.to_str())


def changed(**parts: Any) -> SubwordTokenizer:
    """A tokenizer.json of the right kind, with some parts of another."""
    return SubwordTokenizer(json.dumps(json.loads(train_bpe([WORDS], 300).to_json()) | parts))


def added(content: str, **flags: bool) -> dict[str, Any]:
    usual = {
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    return {"id": 300, "content": content} | usual | flags


def cut_by(pattern: str, ignore_merges: bool = False) -> SubwordTokenizer:
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
    model = ACROSS["model"] | {"ignore_merges": ignore_merges}
    return changed(model=model, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})


ACROSS = across()
LLAMA3, QWEN2 = gguf_vocabulary.CUTS
TOKENIZERS = {
    "char": CharTokenizer("".join(map(chr, range(128)))),
    "byte": ByteTokenizer(),
    "bpe": changed(model=ACROSS["model"]),
    "bpe without pairs": train_bpe(["ab"], 300),
    "bpe with an end": changed(added_tokens=[added("<|endoftext|>")]),
    "bpe with a word": changed(added_tokens=[added("<think>", special=False)]),
    "llama 3": cut_by(LLAMA3, ignore_merges=True),
    "qwen 2": cut_by(QWEN2),
}


def unescaped(token: str) -> bytes:
    r"""As llama.cpp reads a token of "rwkv": \x and two digits are a byte."""
    return token.encode().decode("unicode_escape").encode("latin-1")


@pytest.mark.parametrize("name", ["char", "byte"])
def test_characters_and_bytes_are_the_tokens_of_a_trie(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    vocabulary = gguf_vocabulary.of(tokenizer)
    assert [unescaped(token) for token in vocabulary.tokens] == tokenizer.token_bytes
    assert len(set(vocabulary.tokens)) == tokenizer.vocab_size == len(vocabulary.types)
    assert (vocabulary.model, vocabulary.end, vocabulary.merges) == ("rwkv", None, ())


def test_the_end_of_a_text_is_a_token_that_no_text_holds() -> None:
    """llama.cpp takes token 11, a comma perhaps, unless it is told another."""
    bpe, ended = (
        gguf_vocabulary.of(TOKENIZERS["bpe"]),
        gguf_vocabulary.of(TOKENIZERS["bpe with an end"]),
    )
    assert bpe.end is not None
    assert TOKENIZERS["bpe"].token_bytes[bpe.end] == b"\xff"
    assert (ended.end, ended.types[300]) == (300, gguf_vocabulary.CONTROL)
    assert (
        gguf_vocabulary.of(TOKENIZERS["bpe with a word"]).types[300] == gguf_vocabulary.USER_DEFINED
    )
    assert gguf_vocabulary.of(TOKENIZERS["bpe without pairs"]).merges == ("ÿ ÿ",)


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["bpe"]
    gguf_file.write(leaving(tmp_path, kin(n_layers=1), tokenizer), tmp_path / "m.gguf", "f16")
    vocabulary = gguf_vocabulary.of(tokenizer)
    expected = {
        "model": "gpt2", "pre": "gpt-2", "tokens": vocabulary.tokens, "merges": list(vocabulary.merges),
        "token_type": vocabulary.types, "bos_token_id": vocabulary.end, "eos_token_id": vocabulary.end,
        "add_bos_token": False, "add_eos_token": False, "add_space_prefix": False,
    }  # fmt: skip
    assert {
        key: value(tmp_path / "m.gguf", f"tokenizer.ggml.{key}") for key in expected
    } == expected
    assert len(vocabulary.tokens) == tokenizer.vocab_size


@pytest.mark.parametrize(
    "tokenizer",
    [
        changed(normalizer={"type": "Lowercase"}),
        changed(
            pre_tokenizer={
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        ),
        changed(pre_tokenizer={"type": "Whitespace"}),
        changed(added_tokens=[added("<mask>", lstrip=True)]),
        cut_by(r"\d+|\D+"),
        cut_by(LLAMA3, ignore_merges=False),
        cut_by(QWEN2, ignore_merges=True),
        from_json('{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'),
    ],
)
def test_other_rules_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="--tokenizer bpe"):
        gguf_vocabulary.of(tokenizer)


def test_characters_beyond_ascii_are_refused() -> None:
    with pytest.raises(InputError, match=r"2 other characters \(äé\): train with --tokenizer byte"):
        gguf_vocabulary.of(CharTokenizer("abäé"))


def test_a_tokenizer_that_cannot_end_is_refused() -> None:
    described = json.loads(train_bpe([WORDS], 300).to_json())
    del described["model"]["vocab"][gguf_vocabulary.BYTE_255]
    with pytest.raises(InputError, match="end of text"):
        gguf_vocabulary.of(SubwordTokenizer(json.dumps(described)))


# -- other programs ----------------------------------------------------------------------------------------------------


SOME = {"llama, shared keys", "llama, biases"}  # each takes half a second


@pytest.mark.parametrize(
    "name",
    [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_transformers_computes_the_same_where_it_reads_the_whole_file(
    name: str, tmp_path: Path
) -> None:
    """... and something else, or nothing, where `misread` says so."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = leaving(tmp_path, MODELS[name])
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    wrong, ours = gguf_file.misread(model.config), model.logits(model.probe())
    try:
        found = gguf_file.logits_by_transformers(tmp_path / "m.gguf", model.probe())
    except (RuntimeError, ValueError):  # weights of other shapes than it expects
        found = np.full_like(ours, np.inf)
    assert Reading("transformers", ours, found).close(model.config, "f32") != bool(wrong)


def test_transformers_reads_fewer_bits(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = leaving(tmp_path, MODELS["llama, shared keys"])
    for kind, least, most in (("f32", 0, 1e-6), ("f16", 1e-5, 1e-3), ("q8_0", 1e-3, 5e-2)):
        gguf_file.write(model, tmp_path / "m.gguf", kind)  # type: ignore[arg-type]
        reading = next(gguf_file.readings(model, tmp_path / "m.gguf", kind))  # type: ignore[arg-type]
        assert reading.reader == "transformers"
        assert least <= reading.usual <= reading.largest <= most
        assert reading.close(model.config, kind)  # type: ignore[arg-type]


def test_transformers_finds_the_same_byte_pairs(tmp_path: Path) -> None:
    """... but for the letter ÿ, which it takes for the end of a text."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in ("bpe", "bpe with an end", "llama 3", "qwen 2"):
        tokenizer = TOKENIZERS[name]
        gguf_file.write(leaving(tmp_path, kin(n_layers=1), tokenizer), tmp_path / "m.gguf", "f16")
        there = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        draw = random.Random(2)
        for text in ("".join(draw.choices(PIECES, k=12)) for _ in range(50)):
            assert (
                there(text, add_special_tokens=False)["input_ids"]
                == tokenizer.encode(text).tolist()
            ), (name, text)


def test_a_difference_is_a_share_of_the_largest_logit_and_a_divergence_nats() -> None:
    ours = np.log(np.array([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]], np.float32))
    theirs = ours.copy()
    theirs[0, 2] = np.log([0.1, 0.8, 0.1])
    reading = Reading("llama.cpp", ours, theirs, same_tokens=True)
    assert reading.largest == pytest.approx(np.log(8) / np.log(10), rel=1e-6)
    assert reading.usual == 0
    assert reading.divergence == pytest.approx(0.7 * np.log(8) / 3, rel=1e-6)
    assert reading.close(SMALL, "f16")
    assert not reading.close(SMALL, "f32")
    gelu = kin(**GPT2)
    for reader, config, kind, bound in (
        ("llama.cpp", SMALL, "f32", 1e-5), ("llama.cpp", gelu, "f32", 2e-3), ("transformers", gelu, "f32", 1e-5),
        ("llama.cpp", SMALL, "f16", 5e-3), ("transformers", SMALL, "q8_0", 1e-1),
    ):  # fmt: skip
        shift = bound * np.log(10)  # the largest logit is -ln 10
        assert Reading(reader, ours, ours + np.float32(0.9 * shift)).close(config, kind)  # type: ignore[arg-type]
        assert not Reading(reader, ours, ours + np.float32(1.1 * shift)).close(config, kind)  # type: ignore[arg-type]
    assert not Reading("llama.cpp", ours, ours, same_tokens=False).close(SMALL, "f32")
    assert not Reading("llama.cpp", ours, np.full_like(ours, np.nan)).close(SMALL, "q8_0")


def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama.cpp is an extra")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_llama_cpp_computes_the_same(name: str, kind: Kind, tmp_path: Path) -> None:
    llama_cpp()
    model = leaving(tmp_path, MODELS[name])
    if kind == "q8_0" and model.config.d_ff % 32:
        return
    gguf_file.write(model, tmp_path / "m.gguf", kind)
    ours, theirs = (
        model.logits(model.probe()),
        gguf_file.logits_by_llama_cpp(tmp_path / "m.gguf", model.probe()),
    )
    reading = Reading("llama.cpp", ours, theirs)
    assert reading.close(model.config, kind), (reading.largest, reading.usual)


def test_gelu_is_all_that_llama_cpp_computes_otherwise(tmp_path: Path) -> None:
    """With biases of 20 every GELU is where it changes nothing, which its table of half precision leaves alone."""
    llama_cpp()
    model = leaving(tmp_path, kin(**GPT2, bias=True))
    for block in range(2):
        model.weights[f"blocks.{block}.feedforward.up.bias"] += np.float32(20)
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    theirs = gguf_file.logits_by_llama_cpp(tmp_path / "m.gguf", model.probe())
    assert Reading("llama.cpp", model.logits(model.probe()), theirs).largest < 1e-5


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_matrix_in_the_wrong_order_is_not_close(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp()
    model = leaving(tmp_path, kin())
    monkeypatch.setattr("glasslm.interop.gguf_file._interleaved", lambda rows, heads: rows)
    gguf_file.write(model, tmp_path / "m.gguf", kind)
    reading = list(gguf_file.readings(model, tmp_path / "m.gguf", kind))[-1]
    assert (reading.reader, reading.same_tokens) == ("llama.cpp", True)
    assert not reading.close(model.config, kind), reading.usual


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_finds_the_same_tokens(name: str, tmp_path: Path) -> None:
    library, tokenizer = llama_cpp(), TOKENIZERS[name]
    gguf_file.write(leaving(tmp_path, kin(n_layers=1), tokenizer), tmp_path / "m.gguf", "f16")
    reader = library.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    known = (
        st.characters(max_codepoint=127)
        if name == "char"
        else st.characters(exclude_categories=["Cs"])
    )

    @settings(max_examples=200)
    @given(
        st.text(known)
        | st.lists(st.sampled_from(["a", "dog's", " ", "  ", "\n", "12345", "!?", "\t"])).map(
            "".join
        )
    )
    def same(text: str) -> None:
        found = reader.tokenize(text.encode(), add_bos=True, special=False)
        assert found == tokenizer.encode(text).tolist()
        assert b"".join(reader.detokenize([token]) for token in found) == text.encode()

    same()
    reader.close()


@pytest.mark.parametrize("name", ["char", "byte", "bpe"])
def test_llama_cpp_writes_the_same_text_and_does_not_stop(name: str, tmp_path: Path) -> None:
    library, tokenizer = llama_cpp(), TOKENIZERS[name]
    model = leaving(tmp_path, kin(block_size=64), tokenizer)
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    reader = library.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False, type_k=0, type_v=0)
    tokens = tokenizer.encode("the cat").astype(np.int64)
    start = len(tokens)
    while len(tokens) < 60:
        tokens = np.append(tokens, model.logits(tokens[None])[0, -1].argmax())
    found = []
    for token in reader.generate(tokens[:start].tolist(), temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == 60 - start:
            break
    assert found == tokens[start:].tolist()
    words = library.llama_model_get_vocab(reader._model.model)
    ends = [
        token for token in range(tokenizer.vocab_size) if library.llama_vocab_is_eog(words, token)
    ]
    assert [tokenizer.token_bytes[token] for token in ends] == ([b"\xff"] if name == "bpe" else [])
    reader.close()


def test_llama_cpp_refuses_a_character_that_the_model_does_not_know(tmp_path: Path) -> None:
    library = llama_cpp()
    gguf_file.write(leaving(tmp_path, kin(), CharTokenizer("abc\n")), tmp_path / "m.gguf", "f32")
    reader = library.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    assert reader.create_completion("abc", max_tokens=2)["choices"][0]["finish_reason"] == "length"
    with pytest.raises(RuntimeError, match="-1"):
        reader.create_completion("abXc", max_tokens=2)
    reader.close()
