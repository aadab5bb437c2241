"""Sizes and FLOPs of a model, from its parameter table."""

from __future__ import annotations

from glasslm.config.schema import ModelConfig
from glasslm.model.parameters import parameter_table


def flops_per_token(config: ModelConfig, vocab_size: int) -> float:
    """Training FLOPs a token: 6 for each weight that multiplies it (4 for a frozen one), and 12 L H Q T for attention.

    PaLM, arXiv:2204.02311, appendix B. A forward pass is a third of it. Attention is counted over the whole context,
    as most kernels compute it, though half of it is masked. Of a mixture of experts those count that compute a token.
    """
    c = config.resolved()
    rows = parameter_table(c, vocab_size)
    times = {
        name: (6.0 if row.trained else 4.0) * row.active
        for name, row in rows.items()
        if rows.is_multiplied(name)
    }
    products = sum(rows[name].size * each for name, each in times.items())
    return products + 12.0 * c.n_layers * c.n_heads * c.head_size * c.block_size


def course_parameters(config: ModelConfig, vocab_size: int) -> int:
    """N = 12 L d² + V d, as courses count: 4 d² in attention, 8 d² in a feed-forward of width 4 d, and the embedding.

    It knows no norms, biases and learned positions, and no other shapes: parameters.count has them all.
    """
    return 12 * config.n_layers * config.d_model**2 + vocab_size * config.d_model


def course_flops(parameters: int, tokens: int) -> float:
    """C = 6 N D, to train N parameters on D tokens, without the scores of attention. arXiv:2001.08361, section 2.1."""
    return 6.0 * parameters * tokens
