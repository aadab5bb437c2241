"""Windows and texts beyond the context: against explicit masks, Hugging Face and no cache."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from both_engines import TOLERANCE, Array, assert_near, make_pair, wide_weights  # noqa: E402 - need PyTorch
from torch import Tensor  # noqa: E402

from glasslm.config.schema import (  # noqa: E402
    RELATIVE_POSITIONS,
    AttentionName,
    ModelConfig,
    Position,
    Precision,
)
from glasslm.engines.memory_estimate import cache_bytes  # noqa: E402
from glasslm.engines.positions import rope_cos_sin  # noqa: E402
from glasslm.engines.protocol import Batch  # noqa: E402
from glasslm.engines.torch import attention as module  # noqa: E402
from glasslm.engines.torch.attention import AttentionContext, attention, explicit_attention  # noqa: E402
from glasslm.lab.checks.gradient_check import small_model  # noqa: E402

V, BLOCK = 7, small_model().block_size
LONG = 3 * BLOCK
TEXTS = np.random.default_rng(0).integers(0, V, (3, LONG))
ROLLING: list[tuple[Position, int]] = [
    (position, window)
    for position in sorted(RELATIVE_POSITIONS)
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


def make_model(position: Position, window: int, **more: Any) -> ModelConfig:
    return dataclasses.replace(
        small_model(), position=position, window=window, n_kv_heads=2, **more
    )


def calls(counts: list[list[int]], texts: Array = TEXTS) -> Iterator[tuple[Array, Array, Array]]:
    """Tokens (3, T), padded, counts (3,), and how many tokens each row has read before."""
    read = np.zeros(3, np.int64)
    for count in counts:
        tokens = np.full((3, max(count)), V - 1)
        for row, n in enumerate(count):
            tokens[row, :n] = texts[row, read[row] : read[row] + n]
        yield tokens, np.array(count), read.copy()
        read += count
    np.testing.assert_array_equal(read, LONG)


def uncached_log_probabilities(engine: Any) -> Array:
    """(3, LONG, V) log-probabilities by passes over the whole texts, for each next token."""
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
    """At three times the context, in both engines, in all schedules, in the memory of the window.

    A window that is wider than the context does not roll. It is a mask as well.
    """
    model = make_model(position, window)
    assert model.has_rolling_cache == (window <= BLOCK)
    engines = make_pair(model, precision)
    whole = [uncached_log_probabilities(engine) for engine in engines]
    bound = TOLERANCE[precision] * np.abs(whole[0]).max()
    np.testing.assert_allclose(whole[0], whole[1], rtol=0, atol=bound)
    for engine, expected in zip(engines, whole):
        for counts in SCHEDULES.values():
            last, every = engine.new_cache(3, LONG), engine.new_cache(3, LONG)
            for tokens, count, before in calls(counts):
                after_last = engine.logits(tokens, last, count)
                after_each = engine.logits(tokens, every, count, every=True)
                for row, n in enumerate(count):
                    right = expected[row, before[row] : before[row] + n]
                    np.testing.assert_allclose(
                        log_softmax(after_each[row, :n]), right, rtol=0, atol=bound
                    )
                    np.testing.assert_allclose(
                        log_softmax(after_last[row])[None][:n], right[-1:], rtol=0, atol=bound
                    )
                np.testing.assert_array_equal(last.lengths, before + count)
            cache_size = last.keys.nbytes + last.values.nbytes
            assert cache_size == cache_bytes(model, 3, LONG, {"fp64": 8, "fp32": 4}[precision])
            assert last.keys.shape[3] == (window if model.has_rolling_cache else LONG)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_window_over_absolute_positions_is_a_mask_over_an_ordinary_cache(
    position: Position, window: int
) -> None:
    model = make_model(position, window)
    texts = TEXTS[:, :BLOCK]
    for engine in make_pair(model, "fp64"):
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
                actual = -log_softmax(logits[row, :n])
                for column in range(n):
                    index = read[row] + column
                    if index < BLOCK - 1:
                        target = texts[row, index + 1]
                        assert actual[column, target] == pytest.approx(
                            expected[row, index], abs=1e-10
                        )
            read += count
        with pytest.raises(AssertionError, match="room"):
            engine.logits(texts[:, :1], cache, np.array([0, 0, 1]))


@pytest.mark.parametrize("window", [4, BLOCK])
def test_a_cleared_row_of_a_full_ring_starts_anew(window: int) -> None:
    """The old contents of its slots are hidden, also while the other row continues."""
    for engine in make_pair(make_model("rope", window), "fp64"):
        expected = uncached_log_probabilities(engine)
        cache = engine.new_cache(2, LONG)
        engine.logits(TEXTS[:2, :BLOCK], cache, np.array([BLOCK, BLOCK]))
        engine.logits(TEXTS[:2, BLOCK:-3], cache, np.array([2 * BLOCK - 3, 2 * BLOCK - 3]))
        cache.clear(0)
        logits = engine.logits(
            TEXTS[1:2, -3:-2].repeat(2, 0), cache, np.array([0, 1])
        )  # a row with nothing in it
        np.testing.assert_allclose(log_softmax(logits[1]), expected[1, -3], atol=1e-10)
        for index in range(2):
            new = np.array([[TEXTS[2, index]], [TEXTS[1, index - 2]]])
            logits = engine.logits(new, cache, np.array([1, 1]))
            np.testing.assert_allclose(log_softmax(logits[0]), expected[2, index], atol=1e-10)
            np.testing.assert_allclose(log_softmax(logits[1]), expected[1, index - 2], atol=1e-10)


def test_a_cache_that_is_smaller_than_the_window_refuses_more() -> None:
    for engine in make_pair(make_model("rope", 5), "fp64"):
        cache = engine.new_cache(3, 4)
        engine.logits(TEXTS[:, :4], cache, np.array([4, 4, 4]))
        with pytest.raises(AssertionError, match="room"):
            engine.logits(TEXTS[:, 4:5], cache, np.array([1, 1, 1]))


# -- training and scoring --------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["auto", "plain", "flash"])
@pytest.mark.parametrize("position", sorted(RELATIVE_POSITIONS))
def test_both_engines_learn_the_same_through_a_window(
    position: Position, algorithm: AttentionName
) -> None:
    """T is no multiple of a tile, and the window begins and ends within tiles."""
    T, window = 45, 17
    model = dataclasses.replace(make_model(position, window, attention=algorithm), block_size=T)
    by_numpy, by_torch = make_pair(model, "fp64")
    rng = np.random.default_rng(1)
    data = Batch(rng.integers(0, V, (4, T)), rng.integers(0, V, (4, T)), 0, np.arange(4))
    expected, actual = by_numpy.gradients(data, 0.1), by_torch.gradients(data, 0.1)
    assert_near(actual, expected, 1e-10)
    unlimited = make_pair(dataclasses.replace(model, window=0), "fp64")[0].gradients(data, 0.1)
    assert any(
        np.abs(unlimited[name] - expected[name]).max() > 1e-3 * np.abs(expected[name]).max()
        for name in expected
    )


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [1, 3, 7, 12, 23, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_all_ways_of_attention_see_the_window_alone(
    window: int, kv_heads: int, biased: bool
) -> None:
    """Explicit in tiles, by a fused kernel with a mask, and by equation 1 with a mask of loops."""
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
    context = AttentionContext(None, bias if biased else None, hidden[None], False, "plain", window)
    torch.testing.assert_close(explicit_attention(q, k, v, context), expected)
    torch.testing.assert_close(attention(q, k, v, context), expected)
    torch.testing.assert_close(attention(q, k, v, context._replace(algorithm="flash")), expected)


def test_auto_plain_and_flash_choose_the_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain is always explicit, flash never; auto only where a CPU compiles it."""
    calls: list[str] = []
    monkeypatch.setattr(
        module, "explicit_attention", lambda q, k, v, context: calls.append("explicit") or q
    )
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, *_, **__: calls.append("fused") or q,
    )
    x = torch.zeros(1, 1, 2, 2)
    for compiling in (False, True):
        monkeypatch.setattr("torch.compiler.is_compiling", lambda compiling=compiling: compiling)
        for algorithm in ("auto", "plain", "flash", None):
            attention(x, x, x, AttentionContext(None, None, None, True, algorithm))
    assert calls == [
        "fused",
        "explicit",
        "fused",
        "fused",
        "explicit",
        "explicit",
        "fused",
        "fused",
    ]


@pytest.mark.parametrize("algorithm", ["auto", "plain", "flash"])
def test_the_switch_reaches_every_block_but_not_the_cache(
    algorithm: AttentionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = make_pair(make_model("rope", 4, attention=algorithm), "fp64")
    calls: list[Tensor] = []
    right = module.explicit_attention
    monkeypatch.setattr(
        module, "explicit_attention", lambda q, *rest: (calls.append(q), right(q, *rest))[1]
    )
    engine.losses(TEXTS, TEXTS)
    assert len(calls) == (engine.config.model.n_layers if algorithm == "plain" else 0) * math.ceil(
        3 / engine.micro_batch_size
    )
    calls.clear()
    engine.logits(TEXTS, engine.new_cache(3, LONG), np.full(3, LONG))
    assert not calls


# -- Hugging Face ----------------------------------------------------------------------------------


def test_a_windowed_model_is_a_mistral() -> None:
    """The logits equal those of transformers' MistralForCausalLM, over a text beyond the window.

    Its angles are float32, hence the tolerance.
    """
    transformers = pytest.importorskip("transformers")
    T, window = 40, 7
    model = ModelConfig(
        d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, block_size=16, window=window
    )
    config = transformers.MistralConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rms_norm_eps=1e-5, tie_word_embeddings=True, sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.MistralForCausalLM(config).to(torch.float64).eval()
    names = {
        "embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "attention_norm.weight": "input_layernorm.weight",
        "feedforward_norm.weight": "post_attention_layernorm.weight",
        **{f"attention.{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"feedforward.{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    }  # fmt: skip
    state = {}
    for name, array in wide_weights(model.resolve(), V, np.float64).items():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        rest = name if block is None else name.split(".", 2)[2]
        state[names[rest] if block is None else f"model.layers.{block}.{names[rest]}"] = (
            torch.from_numpy(array)
        )
    theirs.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    tokens = np.random.default_rng(2).integers(0, V, (2, T))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    for engine in make_pair(model, "fp64"):
        cache = engine.new_cache(2, T)
        actual = [
            engine.logits(tokens[:, start : start + 8], cache, np.array([8, 8]), every=True)
            for start in range(0, T, 8)
        ]
        np.testing.assert_allclose(
            np.concatenate(actual, 1), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )


@pytest.mark.parametrize("Q", [4, 32, 128])
@pytest.mark.parametrize("factor", [1.0, 4.0, 7.5])
def test_scaled_rope_turns_as_in_hugging_face(factor: float, Q: int) -> None:
    """Dynamic NTK without a factor equals the fixed form for a text `factor` times as long."""
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
        cos, sin = rope_cos_sin(positions, 1, Q, np.float64, scaling, factor)  # type: ignore[arg-type]
        np.testing.assert_allclose(
            cos[:, 0, : Q // 2], np.cos(angles), atol=1e-4
        )  # their frequencies are float32
        np.testing.assert_allclose(sin[:, 0, Q // 2 :], np.sin(angles), atol=1e-4)
