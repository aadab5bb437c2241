"""What training will take, before it starts: FLOPs and memory, from the parameter table and the shapes of a pass."""

from __future__ import annotations

from glasslm.config import ModelConfig, Precision, RunConfig
from glasslm.parameters import count, table


def flops_per_token(config: ModelConfig, vocab_size: int) -> float:
    """Training FLOPs a token: 6 for each weight that multiplies, and 12 L H Q T for attention.

    PaLM, arXiv:2204.02311, appendix B. A forward pass is a third of it. Attention is counted over the whole context,
    as it is computed, though half of it is masked.
    """
    c = config.resolved()
    matmul = count(table(c, vocab_size))["matmul"]
    return 6.0 * matmul + 12.0 * c.n_layers * c.n_heads * c.head_size * c.block_size


def memory_bytes(config: RunConfig, vocab_size: int, rows: int, threads: int, bytes_per_number: int = 4) -> int:
    """Peak memory of training with the NumPy engine: weights, gradients, moments, and a pass of `rows` for each thread.

    Python and the libraries themselves (about 100 MB) and the memory-mapped corpus come on top.
    """
    config = config.resolved()
    weights = table(config.model, vocab_size)
    total = sum(row.size for row in weights.values())
    moments = {"adamw": 2, "sgd": 1}.get(config.optimizer.optimizer)
    moment_numbers = (
        sum(row.size * (1 if row.group == "muon" else 2) for row in weights.values())
        if moments is None
        else moments * total
    )
    at_once = min(threads, -(-config.train.batch_size // rows))
    # Each pass makes gradients of its own, which wait to be added; one more may be under way in its place.
    numbers = 2 * total + moment_numbers + at_once * (rows * _row_numbers(config.model, vocab_size) + total) + total
    return numbers * bytes_per_number


def _row_numbers(c: ModelConfig, vocab_size: int) -> int:
    """Numbers kept by a forward pass over one sequence, and the largest temporaries of its backward pass."""
    D, F, HQ, KQ, T = c.d_model, c.d_ff, c.n_heads * c.head_size, c.n_kv_heads * c.head_size, c.block_size
    into = 2 * F if c.gated else F
    kept = 2 * D + (HQ + 2 * KQ) + c.n_heads * T + HQ + D  # norm, projections, exponentials, mixture, output
    kept += 2 * D + into + (3 * F if c.gated else F) + D  # norm, inner products, activation, output
    if c.norm_position == "post":
        kept += 2 * D
    if c.norm == "layernorm" or c.qk_norm:
        kept += D
    if c.qk_norm:
        kept += HQ + KQ
    if c.dropout:
        kept += 4 * D
    if c.attention_dropout:
        kept += 2 * c.n_heads * T
    passing = 2 * c.n_heads * T + 2 * (HQ + 2 * KQ) + 2 * into + 2 * F + 4 * D
    outside = 4 * D + 3 * vocab_size
    return T * (c.n_layers * kept + passing + outside)


def torch_memory_bytes(config: RunConfig, vocab_size: int, rows: int, precision: Precision) -> int:
    """Peak memory of training with the PyTorch engine, micro-batches of `rows`, on one device."""
    config = config.resolved()
    total = count(table(config.model, vocab_size))["total"]
    exact, narrow = (8, 8) if precision == "fp64" else (4, 4 if precision == "fp32" else 2)
    return 4 * total * exact + rows * _row_numbers(config.model, vocab_size) * narrow
