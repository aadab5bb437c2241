"""FLOPs of a model, from its parameter table, and the estimates that courses use."""

from __future__ import annotations

from glasslm.config.schema import ModelConfig
from glasslm.model.parameters import parameter_table


def flops_per_token(config: ModelConfig, vocab_size: int) -> float:
    """Training FLOPs per token: 6 per weight that multiplies it (4 if frozen), plus 12 L H Q T.

    The second term is attention in L layers with H heads of size Q over a context of T, with its
    masked half. In a mixture, only the experts that compute a token are counted. A forward pass is
    a third of the result. PaLM, arXiv:2204.02311, appendix B.
    """
    c = config.resolve()
    table = parameter_table(c, vocab_size)
    flops_per_parameter = {
        name: (6.0 if spec.trained else 4.0) * spec.active
        for name, spec in table.items()
        if table.is_multiplied(name)
    }
    products = sum(table[name].size * flops for name, flops in flops_per_parameter.items())
    return products + 12.0 * c.n_layers * c.n_heads * c.head_size * c.block_size


def course_parameters(config: ModelConfig, vocab_size: int) -> int:
    """N = 12 L d² + V d: 4 d² in attention, 8 d² in a feed-forward of width 4 d, and the embedding.

    It omits norms, biases, learned positions and other shapes; ParameterTable.total is exact.
    """
    return 12 * config.n_layers * config.d_model**2 + vocab_size * config.d_model


def course_flops(parameters: int, tokens: int) -> float:
    """C = 6 N D FLOPs to train N parameters on D tokens, without the products of attention scores.

    arXiv:2001.08361, section 2.1.
    """
    return 6.0 * parameters * tokens
