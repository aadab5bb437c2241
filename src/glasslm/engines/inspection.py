"""What may be looked at inside a model while it computes: the names, the same in both engines.

B rows, T positions, D width, H heads, F inner width of the feed-forward, V vocabulary; n tokens that an expert got.

    embedding                                    (B, T, D)     the residual stream as it enters the first block
    blocks.0.attention.scores                    (B, H, T, T)  q . k / sqrt(head size), -inf where a key is hidden
    blocks.0.attention.weights                   (B, H, T, T)  softmax of the scores and what alibi adds to them
    blocks.0.attention                           (B, T, D)     what attention adds to the stream
    blocks.0.feedforward.preactivation           (B, T, F)     what the activation function reads
    blocks.0.feedforward.experts.0.preactivation (n, F)        likewise, of one expert; of the shared one (B, T, F)
    blocks.0.feedforward                         (B, T, D)     what the feed-forward adds
    blocks.0                                     (B, T, D)     the stream after the block
    norm                                         (B, T, D)     after the last norm, where it is before the head
    logits                                       (B, T, V)
    gradient/embedding, gradient/blocks.0        (B, T, D)     of what is minimised, at that place of the stream
    gradient/blocks.0.attention.q.weight         its shape     likewise, of a trained weight
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError
from glasslm.model.parameters import ParameterSpec

GRADIENT = "gradient/"


def forward_names(c: ModelConfig) -> list[str]:
    """The names of activations, in the order in which they are computed."""
    names = ["embedding"]
    for i in range(c.n_layers):
        block = f"blocks.{i}"
        names += [f"{block}.attention.scores", f"{block}.attention.weights", f"{block}.attention"]
        names += [f"{mlp}.preactivation" for mlp in feedforwards(c, i)]
        names += [f"{block}.feedforward", block]
    return [*names, *(["norm"] if c.norm_position == "pre" else []), "logits"]


def feedforwards(c: ModelConfig, layer: int) -> list[str]:
    """The feed-forward of a block, or its experts."""
    whole = f"blocks.{layer}.feedforward"
    if not c.n_experts:
        return [whole]
    return [f"{whole}.experts.{e}" for e in range(c.n_experts)] + (
        [f"{whole}.shared"] if c.shared_expert else []
    )


def backward_names(c: ModelConfig, rows: dict[str, ParameterSpec]) -> list[str]:
    """The names of gradients, roughly in the order in which they are computed: from the head down."""
    names = [
        name for name in reversed(rows) if not name.startswith(("blocks.", "embedding", "position"))
    ]
    for i in reversed(range(c.n_layers)):
        block = f"blocks.{i}"
        names += [block, *(name for name in reversed(rows) if name.startswith(f"{block}."))]
    names += ["embedding", *(name for name in rows if name.startswith(("embedding", "position")))]
    return [GRADIENT + name for name in names if name not in rows or rows[name].trained]


def require_known(names: Iterable[str], c: ModelConfig, rows: dict[str, ParameterSpec]) -> None:
    """Raises InputError for a name that this model has not."""
    known = [*forward_names(c), *backward_names(c, rows)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"there is nothing called '{name}' in this model{f': did you mean {close[0]}?' if close else ''}"
            )
