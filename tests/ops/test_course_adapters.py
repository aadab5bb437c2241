"""The adapters that a course's test suite asks for, written with glasslm.ops alone.

Stanford's CS336, assignment 1, tests functions of these signatures against stored results. Here
PyTorch computes what they should return. The layouts are the course's: heads are leading axes, and
rotary positions rotate neighbouring entries.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import ops
from glasslm.config.schema import ModelConfig

torch = pytest.importorskip("torch")
F = torch.nn.functional
D, H, D_FF, T, V, THETA, LAYERS = 16, 4, 24, 6, 11, 10_000.0, 2
Q = D // H


def run_linear(weights: Any, in_features: Any) -> Any:
    return torch.from_numpy(ops.linear(in_features, weights)[0])


def run_embedding(weights: Any, token_ids: Any) -> Any:
    return torch.from_numpy(ops.embedding(token_ids, weights)[0])


def run_swiglu(w1: Any, w2: Any, w3: Any, in_features: Any) -> Any:
    return torch.from_numpy(ops.swiglu(in_features, w1, w3, w2)[0])


def run_softmax(in_features: Any, dim: int) -> Any:
    return torch.from_numpy(ops.softmax(in_features, dim)[0])


def run_rmsnorm(eps: float, weights: Any, in_features: Any) -> Any:
    return torch.from_numpy(ops.rms_norm(in_features, weights, eps)[0])


def run_cross_entropy(inputs: Any, targets: Any) -> Any:
    return torch.from_numpy(ops.cross_entropy(inputs, targets)[0]).mean()


def run_scaled_dot_product_attention(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    return torch.from_numpy(ops.scaled_dot_product_attention(q, k, v, mask)[0])


def run_rope(d_k: int, theta: float, x: Any, token_positions: Any) -> Any:
    cos, sin = ops.rope_tables(token_positions, d_k, theta)
    y, _ = ops.rope(np.asarray(x)[..., None, :], cos, sin, interleaved=True)
    return torch.from_numpy(y[..., 0, :])


def run_multihead_self_attention(heads: int, wq: Any, wk: Any, wv: Any, wo: Any, x: Any) -> Any:
    q, k, v = (ops.linear(x, w)[0].reshape(*x.shape[:-1], heads, -1) for w in (wq, wk, wv))
    mixed, _ = ops.attention(q, k, v)
    return run_linear(wo, mixed.reshape(*x.shape))


def run_multihead_self_attention_with_rope(
    heads: int, theta: float, wq: Any, wk: Any, wv: Any, wo: Any, x: Any, token_positions: Any
) -> Any:
    q, k, v = (ops.linear(x, w)[0].reshape(*x.shape[:-1], heads, -1) for w in (wq, wk, wv))
    tables = ops.rope_tables(token_positions, q.shape[-1], theta)
    q, k = (ops.rope(a, *tables, interleaved=True)[0] for a in (q, k))
    mixed, _ = ops.attention(q, k, v)
    return run_linear(wo, mixed.reshape(*x.shape))


CALLS_OF_GET_BATCH = itertools.count()
NAMES = {  # ours: the course's
    "attention_norm": "ln1",
    "attention.q": "attn.q_proj",
    "attention.k": "attn.k_proj",
    "attention.v": "attn.v_proj",
    "attention.o": "attn.output_proj",
    "feedforward_norm": "ln2",
    "feedforward.gate": "ffn.w1",
    "feedforward.down": "ffn.w2",
    "feedforward.up": "ffn.w3",
}


def split_halves(w: Any) -> np.ndarray[Any, Any]:
    """The rows of wq or wk, so that pairs (2j, 2j + 1) of each head become (j, j + Q / 2)."""
    order = np.arange(Q).reshape(-1, 2).T.reshape(-1)
    return np.asarray(w).reshape(H, Q, D)[:, order].reshape(D, D)


def block_weights(weights: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    arrays = {ours: weights[f"{prefix}{theirs}.weight"] for ours, theirs in NAMES.items()}
    return {
        f"{name}.weight": split_halves(w) if name in ("attention.q", "attention.k") else w
        for name, w in arrays.items()
    }


CONFIG = ModelConfig(
    d_model=D, n_heads=H, n_layers=LAYERS, d_ff=D_FF, block_size=T, tie_embeddings=False
)


def run_transformer_block(weights: dict[str, Any], in_features: Any) -> Any:
    return torch.from_numpy(ops.block(in_features, block_weights(weights), CONFIG)[0])


def run_transformer_lm(weights: dict[str, Any], in_indices: Any) -> Any:
    arrays = {
        "embedding.weight": weights["token_embeddings.weight"],
        "norm.weight": weights["ln_final.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    for i in range(LAYERS):
        block = block_weights(weights, f"layers.{i}.")
        arrays |= {f"blocks.{i}.{name}": w for name, w in block.items()}
    return torch.from_numpy(ops.transformer(in_indices, arrays, CONFIG)[0])


def run_get_batch(dataset: Any, batch_size: int, context_length: int, device: str) -> Any:
    batch = ops.sample_batch(dataset, batch_size, context_length, step=next(CALLS_OF_GET_BATCH))
    return tuple(torch.from_numpy(ids).to(device) for ids in batch)


def run_gradient_clipping(parameters: list[Any], max_l2_norm: float) -> None:
    with_gradient = [p for p in parameters if p.grad is not None]
    clipped, _ = ops.clip_by_norm([p.grad for p in with_gradient], max_l2_norm)
    for p, gradient in zip(with_gradient, clipped, strict=True):
        p.grad = torch.from_numpy(gradient)


def run_get_lr_cosine_schedule(it: int, high: float, low: float, warmup: int, end: int) -> float:
    if it < warmup:
        return high * it / warmup
    return ops.learning_rate(it - warmup, end - warmup + 1, lr=high, min_lr=low)


class AdamW(torch.optim.Optimizer):  # type: ignore[misc]
    """AdamW over the arrays of PyTorch's parameters, which share their memory with NumPy."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            options = {key: group[key] for key in ("lr", "decay", "betas", "eps")}
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("m", torch.zeros_like(p))
                state.setdefault("v", torch.zeros_like(p))
                state["t"] = state.get("t", 0) + 1
                arrays = [a.detach().numpy() for a in (p, p.grad, state["m"], state["v"])]
                ops.adamw(*arrays, t=state["t"], **options)


def run_save_checkpoint(model: Any, optimizer: Any, iteration: int, out: Path) -> None:
    arrays = {f"model/{name}": w for name, w in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        arrays |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    ops.save_checkpoint(out, arrays | {"iteration": iteration})


def run_load_checkpoint(src: Path, model: Any, optimizer: Any) -> int:
    arrays = ops.load_checkpoint(src)
    state: dict[int, dict[str, Any]] = {}
    for name, array in arrays.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            value = torch.from_numpy(array)
            state.setdefault(int(index), {})[key] = int(value) if key == "t" else value
    weights = {
        name.removeprefix("model/"): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith("model/")
    }
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(arrays["iteration"])


# -- against PyTorch -------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def check_equal(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance)


def rotate(x: Any, positions: Any) -> Any:
    """Neighbouring entries of x (..., T, Q) as complex numbers, times e^(i angle)."""
    angles = positions[..., None] * THETA ** (-torch.arange(0, Q, 2) / Q)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], Q // 2, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def attend(weights: dict[str, Any], x: Any, with_rope: bool = True) -> Any:
    q, k, v = (
        (x @ weights[f"attn.{name}_proj.weight"].T).unflatten(-1, (H, Q)).transpose(-2, -3)
        for name in "qkv"
    )
    if with_rope:
        q, k = (rotate(a, torch.arange(x.shape[-2])) for a in (q, k))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(-2, -3).flatten(-2) @ weights["attn.output_proj.weight"].T


def feed_forward(weights: dict[str, Any], x: Any) -> Any:
    w1, w2, w3 = (weights[f"ffn.w{i}.weight"] for i in (1, 2, 3))
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def block(weights: dict[str, Any], x: Any) -> Any:
    x = x + attend(weights, F.rms_norm(x, (D,), weights["ln1.weight"], 1e-5))
    return x + feed_forward(weights, F.rms_norm(x, (D,), weights["ln2.weight"], 1e-5))


def draw_block(seed: int = 0) -> dict[str, Any]:
    shapes = {"ffn.w1": (D_FF, D), "ffn.w2": (D, D_FF), "ffn.w3": (D_FF, D)}
    weights = {
        name: draw(*shapes.get(name, (D,) if name.startswith("ln") else (D, D)), seed=seed + i)
        for i, name in enumerate(NAMES.values())
    }
    return {f"{name}.weight": w / math.sqrt(D) for name, w in weights.items()}


def test_layers() -> None:
    x, weights = draw(2, 3, T, D), draw_block()
    w = weights["ffn.w1.weight"]
    check_equal(run_linear(w, x), x @ w.T)
    tokens = torch.arange(6).reshape(2, 3)
    check_equal(run_embedding(w, tokens), w[tokens])
    check_equal(
        run_swiglu(w, *(weights[f"ffn.w{i}.weight"] for i in (2, 3)), x), feed_forward(weights, x)
    )
    check_equal(
        run_rmsnorm(1e-5, weights["ln1.weight"], x),
        F.rms_norm(x, (D,), weights["ln1.weight"], 1e-5),
    )
    for dim in range(-4, 4):
        check_equal(run_softmax(x + 100, dim), F.softmax(x + 100, dim))
    targets = torch.tensor([0, 5, 2])
    for scale in (1, 1000):  # 1000: exp overflows unless the maximum is subtracted
        check_equal(
            run_cross_entropy(scale * x[0, :, 0], targets),
            F.cross_entropy(scale * x[0, :, 0], targets),
        )


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_any_mask(lead: tuple[int, ...], masked: bool) -> None:
    q, k, v = draw(*lead, T, Q), draw(*lead, 9, Q, seed=1), draw(*lead, 9, 5, seed=2)
    mask = draw(*lead, T, 9, seed=3) > 0 if masked else None
    if mask is not None:
        mask[..., 0] = True
    check_equal(
        run_scaled_dot_product_attention(q, k, v, mask),
        F.scaled_dot_product_attention(q, k, v, mask),
    )


def test_positions_and_heads() -> None:
    weights, x = draw_block(), draw(2, T, D)
    projections = [
        weights[f"attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "output_proj")
    ]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 3, 0, 9, 1, 4]])
    check_equal(
        run_rope(Q, THETA, x[..., :Q].contiguous(), positions),
        rotate(x[..., :Q].contiguous(), positions),
    )
    heads = draw(2, H, T, Q)
    check_equal(run_rope(Q, THETA, heads, positions[:, None]), rotate(heads, positions[:, None]))
    check_equal(
        run_multihead_self_attention(H, *projections, x), attend(weights, x, with_rope=False)
    )
    check_equal(
        run_multihead_self_attention_with_rope(H, THETA, *projections, x, torch.arange(T)),
        attend(weights, x),
    )


def test_a_block_and_a_language_model() -> None:
    check_equal(
        run_transformer_block(draw_block(), draw(2, T, D)), block(draw_block(), draw(2, T, D))
    )
    weights = {
        "token_embeddings.weight": draw(V, D),
        "ln_final.weight": draw(D),
        "lm_head.weight": draw(V, D, seed=4),
    }
    layers = [draw_block(10 * (i + 1)) for i in range(LAYERS)]
    for i, layer in enumerate(layers):
        weights |= {f"layers.{i}.{name}": w for name, w in layer.items()}
    tokens = torch.randint(V, (3, T - 2), generator=torch.Generator().manual_seed(0))
    x = weights["token_embeddings.weight"][tokens]
    for layer in layers:
        x = block(layer, x)
    expected = F.rms_norm(x, (D,), weights["ln_final.weight"], 1e-5) @ weights["lm_head.weight"].T
    check_equal(run_transformer_lm(weights, tokens), expected, 1e-4)


def test_batches_start_anywhere_alike() -> None:
    dataset, context = np.arange(100), 7
    counts = np.zeros(100)
    for _ in range(500):
        x, y = run_get_batch(dataset, 32, context, "cpu")
        assert x.shape == y.shape == (32, context)
        assert torch.equal(y, x + 1)
        counts += np.bincount(x[:, 0], minlength=100)
    expected = 500 * 32 / (100 - context)
    assert not counts[100 - context :].any()
    assert abs(counts[: 100 - context] - expected).max() < 6 * expected**0.5


def test_clipping_and_the_schedule() -> None:
    for max_norm in (0.01, 1e6):
        parameters, copies = (
            [torch.nn.Parameter(torch.ones(5, 5)) for _ in range(4)] for _ in range(2)
        )
        for index, (p, copy) in enumerate(zip(parameters[:-1], copies[:-1], strict=True)):
            p.grad, copy.grad = draw(5, 5, seed=index), draw(5, 5, seed=index)
        run_gradient_clipping(parameters, max_norm)
        torch.nn.utils.clip_grad_norm_(copies, max_norm)
        for p, copy in zip(parameters[:-1], copies[:-1], strict=True):
            check_equal(p.grad, copy.grad, 1e-6)
        assert parameters[-1].grad is None
    rates = [run_get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    np.testing.assert_allclose(rates[:8], np.arange(8) / 7)
    np.testing.assert_allclose(rates[14], 0.55)
    np.testing.assert_allclose(rates[8], 0.1 + 0.45 * (1 + math.cos(math.pi / 14)))
    assert rates[21:] == [0.1] * 4


def test_adamw_and_checkpoints(tmp_path: Path) -> None:
    def train(optimizer_class: Any, steps: int, model: Any = None) -> tuple[Any, Any]:
        model = model or torch.nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(draw(2, 3))
        options: dict[str, Any] = {
            "lr": 1e-2,
            "weight_decay": 0.01,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
        }
        optimizer = optimizer_class(model.parameters(), **options)
        advance(model, optimizer, steps)
        return model, optimizer

    def advance(model: Any, optimizer: Any, steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            (model(draw(4, 3, seed=step)) ** 2).sum().backward()
            optimizer.step()

    ours, optimizer = train(AdamW, 20)
    check_equal(ours.weight, train(torch.optim.AdamW, 20)[0].weight, 1e-6)
    path = tmp_path / "new" / "checkpoint.safetensors"
    run_save_checkpoint(ours, optimizer, 20, path)
    loaded, other = train(AdamW, 1)
    assert run_load_checkpoint(path, loaded, other) == 20
    for model, its_optimizer in ((ours, optimizer), (loaded, other)):
        advance(model, its_optimizer, 5)
    assert torch.equal(loaded.weight, ours.weight)
