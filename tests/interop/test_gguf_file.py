"""GGUF files hold the exported tensors and hyperparameters, for the library that describes the
format.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf
from exported_models import GPT2, MODELS, VARIANT_FIELDS, make_export, small_config, value

from glasslm.errors import InputError
from glasslm.interop import gguf_file
from glasslm.interop.gguf_file import Quantization


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_the_tensors_of_a_llama_are_those_that_were_written(tmp_path: Path) -> None:
    model = make_export(tmp_path, small_config(n_kv_heads=2, tie_embeddings=False, bias=True))
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    in_file, weights = tensors(tmp_path / "m.gguf"), model.weights
    for theirs, ours in {
        "token_embd.weight": "embedding.weight",
        "output.weight": "head.weight",
        "output_norm.weight": "norm.weight",
        "blk.1.attn_norm.weight": "blocks.1.attention_norm.weight",
        "blk.1.attn_v.weight": "blocks.1.attention.v.weight",
        "blk.1.attn_v.bias": "blocks.1.attention.v.bias",
        "blk.1.attn_output.weight": "blocks.1.attention.o.weight",
        "blk.1.attn_output.bias": "blocks.1.attention.o.bias",
        "blk.1.ffn_norm.weight": "blocks.1.feedforward_norm.weight",
        "blk.1.ffn_gate.weight": "blocks.1.feedforward.gate.weight",
        "blk.1.ffn_up.bias": "blocks.1.feedforward.up.bias",
        "blk.1.ffn_down.weight": "blocks.1.feedforward.down.weight",
    }.items():
        assert np.array_equal(in_file[theirs].data, weights[ours]), theirs
    assert not in_file["blk.1.attn_k.bias"].data.any()
    assert len(in_file) == len(weights) + 2  # a bias of the keys in each block


def test_neighbours_turn_together_as_halves_did(tmp_path: Path) -> None:
    """Rope on neighbours of the exported query and key gives the scores that rope on halves of ours
    gives.
    """
    model = make_export(tmp_path, small_config(n_kv_heads=2, bias=True))
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    in_file, weights, Q = tensors(tmp_path / "m.gguf"), model.weights, 8
    x = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    angles = 5 / 10_000 ** (np.arange(0, Q, 2) / Q)
    turn = np.exp(1j * angles)

    def halves(name: str) -> Any:
        head = (weights[f"blocks.0.attention.{name}.weight"] @ x).reshape(-1, Q)[1]
        return (head[: Q // 2] + 1j * head[Q // 2 :]) * turn

    def neighbours(name: str) -> Any:
        head = (in_file[f"blk.0.attn_{name}.weight"].data @ x).reshape(-1, Q)[1]
        return (head[::2] + 1j * head[1::2]) * turn

    assert np.allclose(halves("q"), neighbours("q"), atol=1e-6)
    assert np.allclose(halves("k"), neighbours("k"), atol=1e-6)
    bias = weights["blocks.0.attention.q.bias"].reshape(4, Q)
    assert np.array_equal(
        in_file["blk.0.attn_q.bias"].data.reshape(4, Q)[2][::2], bias[2][: Q // 2]
    )


def test_the_tensors_of_experts_are_stacked(tmp_path: Path) -> None:
    model = make_export(tmp_path, small_config(n_experts=4, qk_norm=True))
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    in_file = tensors(tmp_path / "m.gguf")
    for theirs, ours in {"gate": "gate", "up": "up", "down": "down"}.items():
        stacked = in_file[f"blk.1.ffn_{theirs}_exps.weight"].data
        for expert in range(4):
            assert np.array_equal(
                stacked[expert],
                model.weights[f"blocks.1.feedforward.experts.{expert}.{ours}.weight"],
            )
    assert np.array_equal(
        in_file["blk.0.attn_q.weight"].data, model.weights["blocks.0.attention.q.weight"]
    )  # neox
    assert np.array_equal(
        in_file["blk.0.attn_q_norm.weight"].data, model.weights["blocks.0.attention.q_norm.weight"]
    )
    assert np.array_equal(
        in_file["blk.0.ffn_gate_inp.weight"].data,
        model.weights["blocks.0.feedforward.router.weight"],
    )
    assert "output.weight" not in in_file


def test_the_tensors_of_a_gpt2(tmp_path: Path) -> None:
    model = make_export(tmp_path, small_config(**GPT2, bias=True))
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    in_file, weights = tensors(tmp_path / "m.gguf"), model.weights
    qkv = np.concatenate([weights[f"blocks.0.attention.{part}.weight"] for part in "qkv"])
    assert np.array_equal(in_file["blk.0.attn_qkv.weight"].data, qkv)
    assert np.array_equal(
        in_file["blk.0.attn_qkv.bias"].data[:32], weights["blocks.0.attention.q.bias"]
    )
    assert np.array_equal(
        in_file["blk.0.ffn_up.weight"].data, weights["blocks.0.feedforward.up.weight"]
    )
    assert np.array_equal(in_file["position_embd.weight"].data, weights["position.weight"])


@pytest.mark.parametrize("name", ["llama, experts", "gpt2"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_fewer_bits_are_as_near_as_their_format_can_be(
    name: str, kind: Quantization, tmp_path: Path
) -> None:
    model = make_export(tmp_path, MODELS[name])
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
    model = make_export(
        tmp_path,
        small_config(n_kv_heads=2, rope_scaling="linear", rope_factor=4.0, norm_eps=1e-6, d_ff=96),
    )
    path = tmp_path / "deep" / "er" / "m.gguf"
    gguf_file.write(model, path, "q8_0")
    expected = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.context_length": 24,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.vocab_size": 37,
        "glasslm.run": "phi3-faust",
        "glasslm.step": "7",
        "glasslm.data_sha256": "d" * 64,
        "glasslm.tokenizer_sha256": model.tokenizer.sha256,
        "glasslm.config_sha256": model.run.config_sha256,
        "tokenizer.ggml.add_bos_token": False,
    }
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
    gguf_file.write(make_export(tmp_path, MODELS[name]), tmp_path / "m.gguf", "f16")
    values = {key: value(tmp_path / "m.gguf", key) for key in expected}
    assert values == {
        key: v if isinstance(v, str | None) else pytest.approx(v, rel=1e-6)
        for key, v in expected.items()
    }


REFUSED = {
    "--window 0": small_config(window=5),
    "--feedforward swiglu": small_config(feedforward="geglu"),
    "--feedforward gelu": small_config(**GPT2 | {"feedforward": "relu"}),
    "--experts-per-token 2": small_config(qk_norm=True, n_experts=4, experts_per_token=1),
    "--norm rmsnorm": small_config(norm="layernorm"),
    "--no-shared-expert": small_config(n_experts=4, shared_expert=True),
}


@pytest.mark.parametrize("cure", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_with_the_switch(
    cure: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=cure):
        gguf_file.write(make_export(tmp_path, REFUSED[cure]), tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("field", [*VARIANT_FIELDS, "rope_scaling"])
def test_a_variant_that_llama_cpp_does_not_have_is_refused_with_a_switch(field: str) -> None:
    scaling = {"rope_scaling": "linear", "rope_factor": 2.0} if field == "rope_scaling" else {}
    config = small_config(**scaling)
    object.__setattr__(config, field, "newvariant")
    with pytest.raises(InputError, match=rf"newvariant.* \(--{field.replace('_', '-')} "):
        gguf_file.llama_cpp_config(config)


def test_a_model_type_that_llama_cpp_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(gguf_file.ARCHITECTURES, "qwen3")
    with pytest.raises(InputError, match="qwen3"):
        gguf_file.llama_cpp_config(small_config(qk_norm=True))


def test_widths_that_blocks_do_not_fill_are_refused_by_q8_0_alone(tmp_path: Path) -> None:
    model = make_export(tmp_path, small_config(d_model=40, d_ff=100))
    with pytest.raises(
        InputError, match=r"d_model is 40 and d_ff is 100.*f16.*--d-model 64 --d-ff 128"
    ):
        gguf_file.write(model, tmp_path / "m.gguf", "q8_0")
    gguf_file.write(model, tmp_path / "m.gguf", "f16")


def test_a_file_is_there_as_a_whole_or_as_it_was(tmp_path: Path) -> None:
    """A weight too large for 16 bits is detected after other tensors are written."""
    model = make_export(tmp_path, small_config())
    gguf_file.write(model, tmp_path / "m.gguf", "f16")
    before = (tmp_path / "m.gguf").read_bytes()
    model.weights["blocks.1.feedforward.down.weight"][3, 4] = -7e4
    with pytest.raises(InputError, match=r"blk.1.ffn_down.weight reaches 7e\+04.*take f32"):
        gguf_file.write(model, tmp_path / "m.gguf", "f16")
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", model.run.path.name}
