"""Which lines of glasslm computed the values of each name: functions, and text that marks a line.

A file is a path in engines/ (or begins with inference/), a function its qualified name there. A
marker is the beginning of a line inside that function, so no number of a line is written down; a
test finds every marker.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from glasslm.config.schema import ModelConfig

OPS, MODEL, ATTENTION = "numpy/ops.py", "numpy/model.py", "numpy/attention.py"
TORCH_ATTENTION, TORCH_MODEL = "torch/attention.py", "torch/model.py"
TORCH_ENGINE, TORCH_LAYERS = "torch/engine.py", "torch/layers.py"


class Place(NamedTuple):
    """A function, and the beginnings of the lines in it that computed a value."""

    file: str  # below engines/, or of inference/
    function: str
    markers: tuple[str, ...]


class Kind(NamedTuple):
    """The names of one kind, where each engine computes them, and where that is derived."""

    pattern: str
    numpy: tuple[Place, ...]
    torch: tuple[Place, ...]
    derivation: str  # a heading of docs/backward.md


LINEAR = Place(OPS, "linear", ("y = np.matmul(x, w.T",))
LINEAR_BACK = Place(OPS, "linear", ("dx = np.matmul(dy, w,", "dw = np.matmul(dy.T, x,"))
AUTOGRAD = (Place(TORCH_ENGINE, "TorchEngine.inspect", ("gradients = torch.autograd.grad(",)),)
SCORES = "scores_and_weights"
TORCH_LINEAR = Place(TORCH_LAYERS, "Linear.forward", ("y = F.linear(input, weight, bias)",))
ACTIVATION_OPS = {
    "swiglu": ("silu", "y = np.multiply(x, s"),
    "geglu": ("gelu", "y *= 0.5"),
    "geglu_exact": ("gelu_exact", "y = np.multiply(x, cdf"),
    "gelu": ("gelu", "y *= 0.5"),
    "gelu_exact": ("gelu_exact", "y = np.multiply(x, cdf"),
    "relu": ("relu", "y = np.maximum"),
    "relu2": ("relu2", "y = np.multiply"),
}


def source_kinds(c: ModelConfig) -> list[Kind]:
    """The kinds of names of a model with this config; the first whose pattern fits is right."""
    return [*_attention_kinds(), *_feedforward_kinds(c), *_stream_kinds(c), *_gradient_kinds(c)]


def _attention_kinds() -> list[Kind]:
    prefix = r"blocks\.\d+\.attention"
    return [
        Kind(
            rf"{prefix}\.scores",
            (Place(ATTENTION, SCORES, ("scores = (np.matmul(q,",)),),
            (Place(TORCH_ATTENTION, SCORES, ("scores = upcast(q @",)),),
            "attention",
        ),
        Kind(
            rf"{prefix}\.weights",
            (Place(ATTENTION, SCORES, ("weights = np.exp(", "weights /= weights.sum(")),),
            (Place(TORCH_ATTENTION, SCORES, ("return scores, softmax(biased)",)),),
            "attention",
        ),
        Kind(
            rf"{prefix}\.heads",
            (Place(ATTENTION, "_attend", ("np.matmul(weights, v, out=out)", "out *= rsum")),),
            (Place(TORCH_ATTENTION, "attention", ("return F.scaled_dot_product_attention(",)),),
            "attention",
        ),
        Kind(
            prefix,
            (Place(MODEL, "Model._attention", ('y, o_back = self._linear(f"{prefix}.o"',)), LINEAR),
            (Place(TORCH_ATTENTION, "Attention.forward", ("return self.o(y.transpose",)),),
            "linear",
        ),
    ]


def _feedforward_kinds(c: ModelConfig) -> list[Kind]:
    prefix = r"blocks\.\d+\.feedforward(\.experts\.\d+|\.shared)?"
    op, marker = ACTIVATION_OPS[c.feedforward]
    activation = [Place(OPS, op, (marker,))]
    if c.is_gated:
        activation.append(Place(OPS, "gate", ("y = ",)))
    gated = "return self.down(self._activate(self.gate(x)) * self.up(x))"
    plain = "return self.down(self._activate(self.up(x)))"
    forward = (Place(TORCH_MODEL, "FeedForward.forward", (gated if c.is_gated else plain,)),)
    down = Place(MODEL, "Model._mlp", ('y, down_back = self._linear(f"{prefix}.down"',))
    mixture = Place("numpy/moe.py", "mixture", ("y = np.matmul(gates[:, None], outputs",))
    return [
        Kind(rf"{prefix}\.preactivation", (LINEAR,), (TORCH_LINEAR,), "linear"),
        Kind(rf"{prefix}\.activation", tuple(activation), forward, "gate" if c.is_gated else op),
        Kind(
            prefix,
            (mixture,) if c.n_experts else (down, LINEAR),
            forward,
            "mixture" if c.n_experts else "linear",
        ),
    ]


def _stream_kinds(c: ModelConfig) -> list[Kind]:
    is_layer_norm = c.norm == "layernorm"
    norm = "layer_norm" if is_layer_norm else "rms_norm"
    torch_norm = "LayerNorm.forward" if is_layer_norm else "RMSNorm.forward"
    torch_marker = "return F.layer_norm(" if is_layer_norm else "return F.rms_norm("
    function = "Model._parallel" if c.residual == "parallel" else "Model._residual"
    residual = "y += x" if c.has_final_norm else "h += x"
    torch_residual = ("x = x + attend(", "return x + y") if c.has_final_norm else ("return self.",)
    readout = Place(MODEL, "Model._readout", ("logits, head_back = self._linear(",))
    return [
        Kind(
            "embedding",
            (Place(OPS, "embedding", ("out = np.take(table, tokens",)),),
            (Place(TORCH_MODEL, "Transformer.hidden_states", ("x = self.embedding(tokens)",)),),
            "embedding",
        ),
        Kind(
            r"blocks\.\d+",
            (Place(MODEL, function, (residual,)),),
            (Place(TORCH_MODEL, "Block.forward", torch_residual),),
            "The block",
        ),
        Kind(
            "norm",
            (Place(OPS, norm, ("y = np.multiply(unit, gain",)),),
            (Place(TORCH_LAYERS, torch_norm, (torch_marker,)),),
            norm,
        ),
        Kind(
            "logits",
            (readout, LINEAR),
            (Place(TORCH_MODEL, "Transformer.logits", ("logits = torch.nn.functional.linear(",)),),
            "linear",
        ),
        Kind(
            "nats",
            (Place(OPS, "cross_entropy", ("nats = -p[rows, columns]", "nats += np.log(total")),),
            (Place("torch/objective.py", "cross_entropy", ("return F.cross_entropy(",)),),
            "cross_entropy",
        ),
    ]


def _gradient_kinds(c: ModelConfig) -> list[Kind]:
    is_layer_norm = c.norm == "layernorm"
    norm = "layer_norm" if is_layer_norm else "rms_norm"
    back = ("dx = inner_back(", "dx += dy") if c.has_final_norm else ("dh = norm_back(", "dx += dh")
    residual = Place(MODEL, "Model._residual", back)
    if c.residual == "parallel":
        residual = Place(MODEL, "Model._parallel", ("dx = feedforward_back(", "dx += dy"))
    norm_back = Place(OPS, norm, ("dx = np.multiply(dy, gain", "dx *= rstd"))
    gain = Place(OPS, norm, ("dgain = np.einsum(",))
    table = Place(OPS, "embedding", ("dtable[ordered[starts]] =",))
    return [
        Kind(
            r"gradient/(embedding|blocks\.\d+)",
            (residual, norm_back),
            AUTOGRAD,
            norm,
        ),
        Kind(r"gradient/.*norm\.(weight|bias)", (gain,), AUTOGRAD, norm),
        Kind(r"gradient/(embedding|position)\.weight", (table,), AUTOGRAD, "embedding"),
        Kind(r"gradient/.*", (LINEAR_BACK,), AUTOGRAD, "linear"),
    ]


def find_kind(name: str, c: ModelConfig) -> Kind | None:
    """The kind of a name; None for a name without one."""
    return next((kind for kind in source_kinds(c) if re.fullmatch(kind.pattern, name)), None)
