"""Windows, and texts longer than the context, in both engines: against plain masks, Hugging Face, and no cache."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from both_engines import TOLERANCE, Array, assert_near, pair, wide_weights  # noqa: E402 - need PyTorch
from torch import Tensor  # noqa: E402

from glasslm.config.schema import RELATIVE, AttentionName, ModelConfig, Position, Precision  # noqa: E402
from glasslm.engines.memory_estimate import cache_bytes  # noqa: E402
from glasslm.engines.positions import rope_at  # noqa: E402
from glasslm.engines.protocol import Batch  # noqa: E402
from glasslm.engines.torch import attention as module  # noqa: E402
from glasslm.engines.torch.attention import Place, attention, written_out  # noqa: E402
from glasslm.lab.checks.gradient_check import small_model  # noqa: E402

V, BLOCK = 7, small_model().block_size
LONG = 3 * BLOCK
TEXTS = np.random.default_rng(0).integers(0, V, (3, LONG))
ROLLING: list[tuple[Position, int]] = [
    (position, window)
    for position in sorted(RELATIVE)
    for window in (1, 4, BLOCK, BLOCK + 3, LONG + 5)
]
SCHEDULES = {  # new tokens of each row, call by call, until all have read LONG
    "at once": [[LONG] * 3],
    "one by one": [[1, 1, 1]] * LONG,
    "in portions": [[BLOCK] * 3] * 3,
    "apart": [
        [5, 0, 1],
        [0, 2, 7],
        [1, 1, 1],
        [1, 0, 1],
        [6, 9, 1],
        [1, 1, 1],
        [2, 5, 0],
        [2, 0, 6],
    ],
    "one by one and apart": [[7, 0, 3], *[[1, 1, 1]] * 11, [0, 7, 4]],
}


def model_of(position: Position, window: int, **more: Any) -> ModelConfig:
    return dataclasses.replace(
        small_model(), position=position, window=window, n_kv_heads=2, **more
    )


def calls(counts: list[list[int]], texts: Array = TEXTS) -> Iterator[tuple[Array, Array, Array]]:
    """Tokens (3, T), padded, counts (3,), and how many tokens each row has read before."""
    read = np.zeros(3, np.int64)
    for count in counts:
        tokens = np.full((3, max(count)), V - 1)
        for row, some in enumerate(count):
            tokens[row, :some] = texts[row, read[row] : read[row] + some]
        yield tokens, np.array(count), read.copy()
        read += count
    np.testing.assert_array_equal(read, LONG)


def uncached(engine: Any) -> Array:
    """(3, LONG, V) log-probabilities by a pass over the whole texts, one candidate for each next token at a time."""
    return -np.stack([engine.losses(TEXTS, np.full_like(TEXTS, v)) for v in range(V)], -1)


def log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(("position", "window"), ROLLING)
def test_a_rolling_cache_equals_a_pass_over_the_whole_text(
    position: Position, window: int, precision: Precision
) -> None:
    """At three times the context, in both engines, in all schedules; its memory is that of the window.

    A window that is wider than the context does not roll, but is a mask as well.
    """
    model = model_of(position, window)
    assert model.has_rolling_cache == (window <= BLOCK)
    engines = pair(model, precision)
    whole = [uncached(engine) for engine in engines]
    bound = TOLERANCE[precision] * np.abs(whole[0]).max()
    np.testing.assert_allclose(whole[0], whole[1], rtol=0, atol=bound)
    for engine, expected in zip(engines, whole):
        for counts in SCHEDULES.values():
            last, every = engine.new_cache(3, LONG), engine.new_cache(3, LONG)
            for tokens, count, before in calls(counts):
                after_last = engine.logits(tokens, last, count)
                after_each = engine.logits(tokens, every, count, every=True)
                for row, some in enumerate(count):
                    right = expected[row, before[row] : before[row] + some]
                    np.testing.assert_allclose(
                        log_softmax(after_each[row, :some]), right, rtol=0, atol=bound
                    )
                    np.testing.assert_allclose(
                        log_softmax(after_last[row])[None][:some], right[-1:], rtol=0, atol=bound
                    )
                np.testing.assert_array_equal(last.lengths, before + count)
            held = last.keys.nbytes + last.values.nbytes
            assert held == cache_bytes(model, 3, LONG, {"fp64": 8, "fp32": 4}[precision])
            assert last.keys.shape[3] == (window if model.has_rolling_cache else LONG)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_window_over_places_is_a_mask_over_an_ordinary_cache(
    position: Position, window: int
) -> None:
    model = model_of(position, window)
    texts = TEXTS[:, :BLOCK]
    for engine in pair(model, "fp64"):
        cache = engine.new_cache(3, BLOCK)
        assert cache.keys.shape[3] == BLOCK
        expected = engine.losses(texts[:, :-1], texts[:, 1:])
        counts = [[2, 1, 4], [1, 1, 1], [2, 3, 0], [1, 1, 1]]
        read = np.zeros(3, np.int64)
        for count in counts:
            tokens = np.stack(
                [
                    np.resize(texts[row, read[row] : read[row] + n], max(count))
                    for row, n in enumerate(count)
                ]
            )
            logits = engine.logits(tokens, cache, np.array(count), every=True)
            for row, n in enumerate(count):
                found = -log_softmax(logits[row, :n])
                for column in range(n):
                    place = read[row] + column
                    if place < BLOCK - 1:
                        target = texts[row, place + 1]
                        assert found[column, target] == pytest.approx(
                            expected[row, place], abs=1e-10
                        )
            read += count
        with pytest.raises(AssertionError, match="room"):
            engine.logits(texts[:, :1], cache, np.array([0, 0, 1]))


@pytest.mark.parametrize("window", [4, BLOCK])
def test_a_cleared_row_of_a_full_ring_starts_anew(window: int) -> None:
    """Nothing of what its slots held before is seen, also while the other row goes on."""
    for engine in pair(model_of("rope", window), "fp64"):
        expected = uncached(engine)
        cache = engine.new_cache(2, LONG)
        engine.logits(TEXTS[:2, :BLOCK], cache, np.array([BLOCK, BLOCK]))
        engine.logits(TEXTS[:2, BLOCK:-3], cache, np.array([2 * BLOCK - 3, 2 * BLOCK - 3]))
        cache.clear(0)
        logits = engine.logits(
            TEXTS[1:2, -3:-2].repeat(2, 0), cache, np.array([0, 1])
        )  # a row with nothing in it
        np.testing.assert_allclose(log_softmax(logits[1]), expected[1, -3], atol=1e-10)
        for place in range(2):
            new = np.array([[TEXTS[2, place]], [TEXTS[1, place - 2]]])
            logits = engine.logits(new, cache, np.array([1, 1]))
            np.testing.assert_allclose(log_softmax(logits[0]), expected[2, place], atol=1e-10)
            np.testing.assert_allclose(log_softmax(logits[1]), expected[1, place - 2], atol=1e-10)


def test_a_cache_that_is_smaller_than_the_window_refuses_more() -> None:
    for engine in pair(model_of("rope", 5), "fp64"):
        cache = engine.new_cache(3, 4)
        engine.logits(TEXTS[:, :4], cache, np.array([4, 4, 4]))
        with pytest.raises(AssertionError, match="room"):
            engine.logits(TEXTS[:, 4:5], cache, np.array([1, 1, 1]))


# -- training and scoring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["auto", "plain", "flash"])
@pytest.mark.parametrize("position", sorted(RELATIVE))
def test_both_engines_learn_the_same_through_a_window(
    position: Position, way: AttentionName
) -> None:
    """T is no multiple of a tile, and the window begins within one tile and ends within another."""
    T, window = 45, 17
    model = dataclasses.replace(model_of(position, window, attention=way), block_size=T)
    one, other = pair(model, "fp64")
    rng = np.random.default_rng(1)
    some = Batch(rng.integers(0, V, (4, T)), rng.integers(0, V, (4, T)), 0, np.arange(4))
    expected, found = one.gradients(some, 0.1), other.gradients(some, 0.1)
    assert_near(found, expected, 1e-10)
    without = pair(dataclasses.replace(model, window=0), "fp64")[0].gradients(some, 0.1)
    assert any(
        np.abs(without[name] - expected[name]).max() > 1e-3 * np.abs(expected[name]).max()
        for name in expected
    )


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [1, 3, 7, 12, 23, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_all_ways_of_attention_see_the_window_alone(
    window: int, kv_heads: int, biased: bool
) -> None:
    """Written out in tiles, by a fused kernel with a mask, and as equation 1 says with the mask of a loop."""
    T, Q = 23, 6
    draw = torch.Generator().manual_seed(window)
    q, k, v = (
        torch.randn(2, heads, T, Q, generator=draw, dtype=torch.float64)
        for heads in (4, kv_heads, kv_heads)
    )
    hidden = torch.tensor([[not i - window < j <= i for j in range(T)] for i in range(T)])
    bias = torch.randn(4, T, T, generator=draw, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    wide_k, wide_v = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    scores = q @ wide_k.mT / Q**0.5 + (bias if biased else 0)
    expected = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ wide_v
    place = Place(None, bias if biased else None, hidden[None], False, "plain", window)
    torch.testing.assert_close(written_out(q, k, v, place), expected)
    torch.testing.assert_close(attention(q, k, v, place), expected)
    torch.testing.assert_close(attention(q, k, v, place._replace(way="flash")), expected)


def test_auto_plain_and_flash_choose_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain is always written out, flash never; auto only where a CPU compiles it."""
    taken: list[str] = []
    monkeypatch.setattr(
        module, "written_out", lambda q, k, v, place: taken.append("written out") or q
    )
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, *_, **__: taken.append("fused") or q,
    )
    x = torch.zeros(1, 1, 2, 2)
    for compiling in (False, True):
        monkeypatch.setattr("torch.compiler.is_compiling", lambda compiling=compiling: compiling)
        for way in ("auto", "plain", "flash", None):
            attention(x, x, x, Place(None, None, None, True, way))
    assert taken == [
        "fused",
        "written out",
        "fused",
        "fused",
        "written out",
        "written out",
        "fused",
        "fused",
    ]


@pytest.mark.parametrize("way", ["auto", "plain", "flash"])
def test_the_switch_reaches_every_block_but_not_the_cache(
    way: AttentionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = pair(model_of("rope", 4, attention=way), "fp64")
    taken: list[Tensor] = []
    right = module.written_out
    monkeypatch.setattr(
        module, "written_out", lambda q, *rest: (taken.append(q), right(q, *rest))[1]
    )
    engine.losses(TEXTS, TEXTS)
    assert len(taken) == (engine.config.model.n_layers if way == "plain" else 0) * math.ceil(
        3 / engine.micro_batch_size
    )
    taken.clear()
    engine.logits(TEXTS, engine.new_cache(3, LONG), np.full(3, LONG))
    assert not taken


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def test_a_windowed_model_is_a_mistral() -> None:
    """The logits of transformers' MistralForCausalLM with the same weights, over a text much longer than the window.

    It rotates by angles in float32, hence the tolerance.
    """
    transformers = pytest.importorskip("transformers")
    T, window = 40, 7
    model = ModelConfig(
        d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, block_size=16, window=window
    )
    config = transformers.MistralConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
        sliding_window=window, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.MistralForCausalLM(config).to(torch.float64).eval()
    names = {
        "embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "attention_norm.weight": "input_layernorm.weight", "feedforward_norm.weight": "post_attention_layernorm.weight",
        **{f"attention.{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"feedforward.{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    }  # fmt: skip
    state = {}
    for name, array in wide_weights(model.resolved(), V, np.float64).items():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        rest = name if block is None else name.split(".", 2)[2]
        state[names[rest] if block is None else f"model.layers.{block}.{names[rest]}"] = (
            torch.from_numpy(array)
        )
    theirs.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    tokens = np.random.default_rng(2).integers(0, V, (2, T))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    for engine in pair(model, "fp64"):
        cache = engine.new_cache(2, T)
        found = [
            engine.logits(tokens[:, at : at + 8], cache, np.array([8, 8]), every=True)
            for at in range(0, T, 8)
        ]
        np.testing.assert_allclose(
            np.concatenate(found, 1), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )


@pytest.mark.parametrize("Q", [4, 32, 128])
@pytest.mark.parametrize("factor", [1.0, 4.0, 7.5])
def test_scaled_rope_turns_as_in_hugging_face(factor: float, Q: int) -> None:
    """NTK's dynamic form, without a factor of its own, is what the fixed one is at a text `factor` times as long."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for scaling, kind, of_config, seq_len in (
        ("linear", "linear", factor, None),
        ("ntk", "dynamic", 1.0, 64 * factor),
    ):
        rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": of_config}
        config = transformers.LlamaConfig(
            hidden_size=4 * Q,
            num_attention_heads=4,
            head_dim=Q,
            max_position_embeddings=64,
            rope_parameters=rope,
        )
        frequencies, times = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)
        assert times == 1.0
        positions = np.arange(0, 300, 7)
        angles = positions[:, None] * frequencies.numpy().astype(np.float64)
        cos, sin = rope_at(positions, 1, Q, np.float64, scaling, factor)  # type: ignore[arg-type]
        np.testing.assert_allclose(
            cos[:, 0, : Q // 2], np.cos(angles), atol=1e-4
        )  # their frequencies are float32
        np.testing.assert_allclose(sin[:, 0, Q // 2 :], np.sin(angles), atol=1e-4)
