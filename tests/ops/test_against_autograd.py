"""glasslm.ops against PyTorch: outputs and gradients of every function, updates and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from op_calls import (
    ALIBI,
    CALLS,
    CONFIG,
    MASK,
    TOKENS,
    WEIGHTS,
    Call,
    H,
    K,
    Q,
    T,
    tokens_like,
    upstream,
)

from glasslm import ops
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.engines.protocol import Batch

torch = pytest.importorskip("torch")
F = torch.nn.functional


def gated_feedforward(activation: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda x, gate, up, down: (activation(x @ gate.T) * (x @ up.T)) @ down.T


def tanh_gelu(x: Any) -> Any:
    return F.gelu(x, approximate="tanh")


def attend_heads(mask: Any = None, bias: Any = None) -> Callable[..., Any]:
    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (a.transpose(-2, -3) for a in (q, k, v))
        k, v = (a.repeat_interleave(H // K, dim=-3) for a in (k, v))
        added_mask = torch.tril(torch.ones(T, T, dtype=bool)) if mask is None else mask
        if bias is not None:
            added_mask = torch.where(added_mask, bias, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, added_mask).transpose(-2, -3)

    return attend


def rotate(interleaved: bool) -> Callable[[Any], Any]:
    def call(x: Any) -> Any:
        angles = torch.arange(2, 2 + T)[:, None] * 10_000.0 ** (-torch.arange(0, Q, 2).double() / Q)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        turned = a * cos - b * sin, a * sin + b * cos
        return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)

    return call


def layer_norm(x: Any, gain: Any, bias: Any) -> Any:
    return F.layer_norm(x, gain.shape, gain, bias, 1e-5)


def cross_entropy(logits: Any) -> Any:
    targets = torch.from_numpy(tokens_like(tuple(logits.shape[:-1])))
    return F.cross_entropy(
        logits.movedim(-1, 1 if logits.ndim > 1 else 0), targets, reduction="none"
    )


MASK_TENSOR = torch.from_numpy(MASK)
REFERENCES: dict[str, Callable[..., Any]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "softmax along an axis": lambda x: F.softmax(x, -2),
    "silu": F.silu,
    "gelu": tanh_gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "linear": F.linear,
    "embedding": lambda table: F.embedding(torch.from_numpy(TOKENS.reshape(2, 4)), table),
    "rms_norm": lambda x, gain: F.rms_norm(x, gain.shape, gain, 1e-5),
    "layer_norm": layer_norm,
    "swiglu": gated_feedforward(F.silu),
    "geglu": gated_feedforward(tanh_gelu),
    "cross_entropy": cross_entropy,
    "rope": rotate(False),
    "rope, interleaved": rotate(True),
    "attention": attend_heads(),
    "attention with a mask": attend_heads(MASK_TENSOR),
    "attention with a bias": attend_heads(bias=torch.from_numpy(ALIBI)),
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "scaled_dot_product_attention with a mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, MASK_TENSOR
    ),
}


@pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
def test_outputs_and_gradients_equal_those_of_autograd(call: Call) -> None:
    if call.name not in REFERENCES:
        assert call.name in ("dropout", "block", "transformer")  # below, but dropout's own mask
        return
    for lead in [(), (3,), (2, 1, 2)]:
        inputs = call.draw(lead)
        y, backward = call.run(inputs)
        tensors = {name: torch.from_numpy(a).requires_grad_() for name, a in inputs.items()}
        expected = REFERENCES[call.name](*tensors.values())
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-9, atol=1e-12)
        expected.backward(torch.from_numpy(upstream(y)))
        for name, gradient in backward(upstream(y)).items():
            np.testing.assert_allclose(gradient, tensors[name].grad, rtol=1e-8, atol=1e-10)


def test_a_transformer_equals_the_pytorch_engine() -> None:
    call = next(call for call in CALLS if call.name == "transformer")
    weights = call.draw(())
    tokens = tokens_like((2, T))
    targets = tokens[:, ::-1].copy()
    logits, backward = ops.transformer(tokens, weights, CONFIG)
    nats, nats_back = ops.cross_entropy(logits, targets)
    gradients = backward(nats_back(1 / nats.size))
    compute = ComputeConfig(engine="torch", precision="fp64", device="cpu", threads=1)
    engine = make_engine(RunConfig(model=CONFIG.resolve()), 7, compute)
    engine.load(weights.items())
    names = [f"{GRADIENT_PREFIX}{name}" for name in WEIGHTS]
    batch = Batch(tokens, targets, 0, np.arange(2))
    expected = engine.inspect(batch, ["logits", *names])
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-9, atol=1e-12)
    for name in WEIGHTS:
        np.testing.assert_allclose(
            gradients[name],
            expected[f"{GRADIENT_PREFIX}{name}"],
            rtol=1e-7,
            atol=1e-10,
            err_msg=name,
        )


def test_blocks_in_sequence_are_the_transformer() -> None:
    weights = next(call for call in CALLS if call.name == "transformer").draw(())
    tokens = tokens_like((2, T))
    x, _ = ops.embedding(tokens, weights["embedding.weight"])
    for i in range(CONFIG.n_layers):
        prefix = f"blocks.{i}."
        own = {
            name.removeprefix(prefix): array
            for name, array in weights.items()
            if name.startswith(prefix)
        }
        x, _ = ops.block(x, own, CONFIG)
    x, _ = ops.rms_norm(x, weights["norm.weight"])
    logits, _ = ops.linear(x, weights["embedding.weight"])
    np.testing.assert_allclose(logits, ops.transformer(tokens, weights, CONFIG)[0], rtol=1e-12)


# -- compare_updates ---------------------------------------------------------------------------


def compare_updates(
    shape: tuple[int, ...], optimizer: Callable[[Any], Any], step: Callable[[Any, Any, int], None]
) -> None:
    """Ten updates of one weight by PyTorch and by `step(p, g, t)` end at the same weight."""
    rng = np.random.default_rng(0)
    p = rng.standard_normal(shape)
    parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
    reference = optimizer([parameter])
    for t in range(1, 11):
        g = rng.standard_normal(shape)
        parameter.grad = torch.from_numpy(g.copy())
        reference.step()
        before = g.copy()
        g.flags.writeable = False
        step(p, g, t)
        assert np.array_equal(g, before)
    np.testing.assert_allclose(p, parameter.detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adamw_and_sgd_take_the_steps_of_pytorch(shape: tuple[int, ...], eps: float) -> None:
    m, v = np.zeros(shape), np.zeros(shape)
    options: dict[str, Any] = {"betas": (0.8, 0.99), "eps": eps, "lr": 0.01}
    compare_updates(
        shape,
        lambda p: torch.optim.AdamW(p, weight_decay=0.1, **options),
        lambda p, g, t: ops.adamw(p, g, m, v, t=t, decay=0.1, **options),
    )
    momentum = np.zeros(shape)
    compare_updates(
        shape,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p, g, t: ops.sgd(p, g, momentum, lr=0.1, momentum=0.9),
    )


def test_clipping_equals_that_of_pytorch() -> None:
    arrays = {"w": np.linspace(-3, 3, 6).reshape(2, 3), "b": np.array(4.0)}

    def clip_norm(bound: float) -> dict[str, Any]:
        return ops.clip_by_norm(arrays, bound)[0]

    def clip_value(bound: float) -> dict[str, Any]:
        return ops.clip_by_value(arrays, bound)

    for ours, theirs in (
        (clip_norm, torch.nn.utils.clip_grad_norm_),
        (clip_value, torch.nn.utils.clip_grad_value_),
    ):
        for bound in (0.5, 2.0, 100.0):
            zeros = [torch.zeros(array.shape).double() for array in arrays.values()]
            parameters = [torch.nn.Parameter(zero) for zero in zeros]
            for p, array in zip(parameters, arrays.values(), strict=True):
                p.grad = torch.from_numpy(array.copy())
            theirs(parameters, bound)
            for p, clipped in zip(parameters, ours(bound).values(), strict=True):
                np.testing.assert_allclose(clipped, p.grad, rtol=1e-5)


def test_step_decay_equals_that_of_pytorch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for step in range(10):
        rate = ops.step_decay(step, lr=0.3, every=3, factor=0.5)
        assert rate == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
