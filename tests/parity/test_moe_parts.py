"""The mixture of experts of both engines: the same outputs, routing and gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from glasslm.config.schema import ModelConfig  # noqa: E402 - after PyTorch, which may be missing
from glasslm.engines.numpy import moe, ops  # noqa: E402
from glasslm.engines.torch.layers import Linear  # noqa: E402
from glasslm.engines.torch.moe import MixtureOfExperts  # noqa: E402

Array = np.ndarray[Any, Any]

B, T, D, F, E = 3, 7, 8, 6, 5
BALANCE, Z = 0.3, 0.05  # coefficients, large enough to be seen in the gradient


class Expert(torch.nn.Module):
    """The smallest GELU feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Linear(D, F, bias=False), Linear(F, D, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down(torch.nn.functional.gelu(self.up(x), approximate="tanh"))


def numpy_expert(w: dict[str, Array], prefix: str) -> moe.Expert:
    def compute(x: Array) -> tuple[Array, Callable[[Array, dict[str, Array]], Array]]:
        inner, up_back = ops.linear(x, w[f"{prefix}.up.weight"], np.empty)
        h, gelu_back = ops.gelu(inner, np.empty)
        y, down_back = ops.linear(h, w[f"{prefix}.down.weight"], np.empty)

        def backward(dy: Array, gradients: dict[str, Array]) -> Array:
            dh, gradients[f"{prefix}.down.weight"] = down_back(dy)
            dx, gradients[f"{prefix}.up.weight"] = up_back(gelu_back(dh))
            return dx

        return y, backward

    return compute


def make_module(
    k: int, shared: bool, ties: bool = False, seed: int = 0
) -> tuple[MixtureOfExperts, Array, Array]:
    """The module with random weights, its input and the gradient of its output."""
    torch.manual_seed(seed)
    module = MixtureOfExperts(
        ModelConfig(d_model=D, n_heads=2, n_experts=E, experts_per_token=k, shared_expert=shared),
        Expert,
    )
    module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    if ties:  # experts 1 and 3 are always equally probable
        module.router.weight.data[3] = module.router.weight.data[1]
    draw = np.random.default_rng(seed)
    return module, draw.standard_normal((B, T, D)), draw.standard_normal((B, T, D))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4, E])
def test_both_agree_on_outputs_routing_and_gradients(k: int, shared: bool, ties: bool) -> None:
    module, x, dy = make_module(k, shared, ties)
    w = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    rows = x.reshape(-1, D)
    logits, router_back = ops.linear(rows, w["router.weight"], np.empty)
    experts = [numpy_expert(w, f"experts.{e}") for e in range(E)]
    y, routing, back = moe.mixture(rows, logits, experts, k, B, np.empty)
    gradients: dict[str, Array] = {}
    dx, dlogits = back(dy.reshape(-1, D), gradients, BALANCE, Z)
    dx_router, gradients["router.weight"] = router_back(dlogits)
    gradients["x"] = dx + dx_router
    if shared:
        shared_output, shared_back = numpy_expert(w, "shared")(rows)
        y, gradients["x"] = (
            y + shared_output,
            gradients["x"] + shared_back(dy.reshape(-1, D), gradients),
        )

    x_torch = torch.from_numpy(x).requires_grad_()
    out, actual = module(x_torch)
    ((out * torch.from_numpy(dy)).sum() + BALANCE * actual.balance + Z * actual.z).backward()
    by_autograd = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    by_autograd["x"] = x_torch.grad.numpy().reshape(-1, D)

    np.testing.assert_allclose(out.detach().numpy().reshape(-1, D), y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        [actual.balance.item(), actual.z.item()], [routing.balance, routing.z], rtol=1e-12
    )
    np.testing.assert_array_equal(actual.use.numpy(), routing.use)
    assert set(by_autograd) == set(gradients)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            by_autograd[name], gradient, rtol=1e-10, atol=1e-11, err_msg=name
        )


def test_experts_without_tokens_have_a_gradient() -> None:
    """DDP waits for the gradients of all parameters."""
    module, x, _ = make_module(1, shared=False)
    with torch.no_grad():
        module.router.weight.zero_()
    out, routing = module(torch.from_numpy(x))
    out.sum().backward()
    assert routing.use.tolist() == [B * T, 0, 0, 0, 0]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (name.startswith(("experts.0", "router"))), name


def test_generation_does_not_wait_for_experts_without_tokens() -> None:
    module, x, _ = make_module(2, shared=False)
    called: list[Any] = []
    for expert in module.experts:
        expert.register_forward_hook(lambda expert, inputs, output: called.append(expert))
    tokens = torch.from_numpy(x[:1, :1])
    expected, _ = module(tokens)
    assert len(called) == E
    called.clear()
    with torch.inference_mode():
        out, routing = module(tokens)
    assert [expert in called for expert in module.experts] == (routing.use > 0).tolist()
    assert len(called) == 2
    torch.testing.assert_close(out, expected)


def test_routing_is_computed_in_float32_where_activations_are_narrow() -> None:
    module, x, _ = make_module(2, shared=True)
    module.float()
    narrow = torch.from_numpy(x).bfloat16()
    out, actual = module(narrow)
    assert out.dtype == torch.bfloat16
    assert actual.balance.dtype == actual.z.dtype == torch.float32
    wide, expected = module(narrow.float())
    assert torch.equal(actual.use, expected.use)
    assert actual.z.item() == expected.z.item()
    assert (out - wide).abs().max() < 0.05 * wide.abs().max()


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of its own compiler's parts
def test_it_can_be_part_of_a_compiled_block() -> None:
    """Sizes that depend on the data stay out of the graph, so other sizes need no compilation."""
    module, x, dy = make_module(2, shared=True)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feedforward = module

        def forward(self, x: Any) -> Any:
            out, routing = self.feedforward(x * 2)
            return x + out, routing

    block, graphs = Block(), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def run(scale: float) -> list[Any]:
        module.zero_grad()
        out, routing = block(torch.from_numpy(x) * scale)
        ((out * torch.from_numpy(dy)).sum() + routing.balance + routing.z).backward()
        return [
            out.detach(),
            *routing,
            *(parameter.grad.clone() for parameter in module.parameters()),
        ]

    scales = (1.0, 3.0, -2.0)
    expected = [run(scale) for scale in scales]
    block.compile(backend=count)
    torch.testing.assert_close(run(scales[0]), expected[0])
    compiled = len(graphs)
    assert compiled
    for scale, eager in zip(scales[1:], expected[1:]):
        torch.testing.assert_close(run(scale), eager)
    assert len(graphs) == compiled
