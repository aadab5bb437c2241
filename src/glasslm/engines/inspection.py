"""The names under which `Engine.inspect` gives activations and gradients: the same in both engines.

B rows, T positions, D width, H heads, Q head size, F inner width of the feed-forward, V vocabulary,
n tokens of an expert. An Edit overwrites those with a star. With norms before the sublayers (pre),
the outputs of attention and feed-forward are what they add to the stream.

  * embedding                                    (B, T, D)     the residual stream before block 0
    blocks.0.attention.scores                    (B, H, T, T)  before the softmax; hidden: -inf
    blocks.0.attention.weights                   (B, H, T, T)  softmax of scores and ALiBi's bias
  * blocks.0.attention.heads                     (B, T, H, Q)  each head's mean of values, before o
  * blocks.0.attention                           (B, T, D)     its output, before a norm after it
    blocks.0.feedforward.preactivation           (B, T, F)     the input of the activation function
  * blocks.0.feedforward.activation              (B, T, F)     the neurons: the input of down
    blocks.0.feedforward.experts.0.preactivation (n, F)        of an expert (shared: (B, T, F))
    blocks.0.feedforward.experts.0.activation    (n, F)        of an expert (shared*: (B, T, F))
  * blocks.0.feedforward                         (B, T, D)     its output, before a norm after it
  * blocks.0                                     (B, T, D)     the residual stream after the block
    norm                                         (B, T, D)     after the last norm, with pre-norm
    logits                                       (B, T, V)
    gradient/embedding, gradient/blocks.0        (B, T, D)     of the objective by the stream there
    gradient/blocks.0.attention.q.weight         its shape     of the objective by a trained weight
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError
from glasslm.model.parameters import ParameterSpec
from glasslm.text import suggest_name

GRADIENT_PREFIX = "gradient/"
REPLACED_ATTENTION = (
    "attention is replaced by --ops, and its scores and weights stay inside that function: inspect "
    "other names"
)


class Edit(NamedTuple):
    """An activation overwritten where it is computed: `activation[index] = value`, as in NumPy.

    What is computed from it changes. `index` begins with the axis B, so each row of a batch may
    have its own edits; `value` has the shape that `index` selects, or is broadcast to it.

    Edit("blocks.0.attention.heads", np.s_[:, :, 2], 0.0) switches head 2 off, in every row.
    """

    name: str
    index: Any
    value: NDArray[Any] | float


def forward_names(c: ModelConfig) -> list[str]:
    """The names of activations, in the order in which they are computed."""
    names = ["embedding"]
    for i in range(c.n_layers):
        block = f"blocks.{i}"
        parts = ("scores", "weights", "heads")
        names += [*(f"{block}.attention.{part}" for part in parts), f"{block}.attention"]
        for mlp in feedforward_names(c, i):
            names += [f"{mlp}.preactivation", f"{mlp}.activation"]
        names += [f"{block}.feedforward", block]
    return [*names, *(["norm"] if c.has_final_norm else []), "logits"]


def feedforward_names(c: ModelConfig, layer: int) -> list[str]:
    """The name of the feed-forward of a block, or the names of its experts."""
    prefix = f"blocks.{layer}.feedforward"
    if not c.n_experts:
        return [prefix]
    experts = [f"{prefix}.experts.{e}" for e in range(c.n_experts)]
    return experts + ([f"{prefix}.shared"] if c.shared_expert else [])


def backward_names(c: ModelConfig, table: dict[str, ParameterSpec]) -> list[str]:
    """The names of gradients, roughly in the order in which they are computed: from the head down.

    `table` is the parameter table of the model.
    """
    names = [
        name
        for name in reversed(table)
        if not name.startswith(("blocks.", "embedding", "position"))
    ]
    for i in reversed(range(c.n_layers)):
        block = f"blocks.{i}"
        names += [block, *(name for name in reversed(table) if name.startswith(f"{block}."))]
    names += ["embedding", *(name for name in table if name.startswith(("embedding", "position")))]
    return [GRADIENT_PREFIX + name for name in names if name not in table or table[name].trained]


def require_known_names(
    names: Iterable[str], c: ModelConfig, table: dict[str, ParameterSpec]
) -> None:
    """Raise InputError for a name that this model does not have."""
    known_names = [*forward_names(c), *backward_names(c, table)]
    for name in names:
        if name not in known_names:
            suggestion = suggest_name(name, known_names, quote="")
            raise InputError(f"there is nothing called '{name}' in this model{suggestion}")


def require_edits(edits: Sequence[Edit], names: Iterable[str], c: ModelConfig) -> None:
    """Raise InputError for an edit of what cannot be edited, or beside names of gradients."""
    if edits and any(name.startswith(GRADIENT_PREFIX) for name in names):
        raise InputError("a pass with edits has no gradients: ask for activations alone")
    fixed = (".scores", ".weights", ".preactivation")
    editable_names = [
        name
        for name in forward_names(c)
        if not name.endswith(fixed) and ".experts." not in name and name not in ("norm", "logits")
    ]
    for edit in edits:
        if edit.name not in editable_names:
            suggestion = suggest_name(edit.name, editable_names, quote="")
            raise InputError(f"'{edit.name}' cannot be edited in this model{suggestion}")
