"""What training will take, before it starts: FLOPs and memory, from the parameter table and the shapes of a pass.

And how much memory there is, and with which flags it would do.
"""

from __future__ import annotations

import math

from glasslm.config.schema import ComputeConfig, DeviceName, ModelConfig, Precision, RunConfig
from glasslm.engines.choice import attends_by_tiles
from glasslm.engines.choice import ranks as group_size
from glasslm.model.parameters import ParameterTable, parameter_table

# PyTorch's tensors on a CPU come from the C library's heap, which keeps the holes between pieces of different sizes:
# 1.1 to 1.6 times what the tensors take was resident on Linux, 1.0 with each in a mapping of its own (docs/log.md).
WITH_HOLES = 1.3
ROUNDED_UP = 1.5  # memory of experts, which is taken in powers of two (engines/numpy/moe.py)
# Of attention written out in four tiles of queries (engines/torch/attention.py): keys after a tile's end are left out.
TILE, SEEN = 1 / 4, 5 / 8


def memory_bytes(
    config: RunConfig, vocab_size: int, rows: int, threads: int, bytes_per_number: int = 4
) -> int:
    """Peak memory of training with the NumPy engine: weights, gradients, moments, and a pass of `rows` for each thread.

    Python and the libraries themselves (about 100 MB) and the memory-mapped corpus come on top.
    """
    config = config.resolved()
    weights = parameter_table(config.model, vocab_size)
    total, trained = (weights.counts()[which] for which in ("total", "trained"))
    at_once = min(threads, -(-config.train.batch_size // rows))
    # Each pass makes gradients of its own, which wait to be added; one more may be under way in its place.
    passes = at_once * (rows * _row_numbers(config.model, vocab_size) + trained) + trained
    average = total if config.optimizer.ema else 0
    return (
        total + trained + average + _moment_numbers(weights, config) + passes
    ) * bytes_per_number


def _moment_numbers(weights: ParameterTable, config: RunConfig) -> int:
    """AdamW keeps two moments of each weight; Muon, where it moves it, and SGD keep one."""
    optimizer = config.optimizer.optimizer
    one_moment = {
        name
        for name, row in weights.items()
        if optimizer == "sgd" or (optimizer, row.group) == ("muon", "muon")
    }
    return sum(
        row.size * (1 if name in one_moment else 2)
        for name, row in weights.items()
        if row.trained
    )


def _row_numbers(c: ModelConfig, vocab_size: int) -> int:
    """Numbers kept by a forward pass over one sequence, and the largest temporaries of its backward pass."""
    D, F, HQ, KQ, T = (
        c.d_model,
        c.d_ff,
        c.n_heads * c.head_size,
        c.n_kv_heads * c.head_size,
        c.block_size,
    )
    into = 2 * F if c.gated else F
    scores = (
        1 if attends_by_tiles(c, T) else T
    )  # for each query and head: a logarithm, or its exponentials
    kept: float = (
        2 * D + (HQ + 2 * KQ) + c.n_heads * scores + HQ + D
    )  # norm, projections, scores, mixture, output
    inner = into + (3 * F if c.gated else F)  # products, activation
    kept += 2 * D + inner + D  # norm, feed-forward, output
    if c.n_experts:  # the token as it was sent, and each expert's output
        kept += ROUNDED_UP * c.experts_per_token * (inner + 3 * D) + (
            D - inner if not c.shared_expert else D
        )
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
    passing = 2 * c.n_heads * scores + 2 * (HQ + 2 * KQ) + 2 * into + 2 * F + 4 * D
    outside = 4 * D + 3 * vocab_size
    return round(T * (c.n_layers * kept + passing + outside))


def torch_memory_bytes(
    config: RunConfig,
    vocab_size: int,
    rows: int,
    precision: Precision,
    device: DeviceName = "cpu",
    *,
    ranks: int = 1,
    cut: bool = False,
) -> int:
    """Peak memory of training with the PyTorch engine on one device, in micro-batches of `rows` sequences.

    Of several `ranks`, each takes its part of the batch, and of the weights, too, where they are `cut` (fsdp).

    Weights and moments are always there. A forward pass keeps what the backward pass reads, which lets go of it from
    the end to the beginning while gradients take its place. So the peak is between the two passes, on top of the
    gradients of earlier micro-batches if there are any, or else in the update. PyTorch itself (350 MB) comes on top.
    """
    config = config.resolved()
    c, weights, (wide, _) = config.model, parameter_table(config.model, vocab_size), _widths(precision)
    total, trained = (weights.counts()[which] for which in ("total", "trained"))
    between = torch_kept_bytes(c, vocab_size, rows, precision, device)
    logits = (
        2 * vocab_size * wide
    )  # their gradient, and that of the log-probabilities, when the backward pass begins
    masks = (
        4 * c.n_heads * TILE * c.block_size * wide if c.attention_dropout else 0
    )  # while those of a tile are drawn
    between += round(rows * c.block_size * max(logits, masks))
    if rows * ranks < config.train.batch_size:
        between += trained * wide
    update = (trained + _update_numbers(weights, config)) * wide
    average = total if config.optimizer.ema else 0
    always: float = (total + average + _moment_numbers(weights, config)) * wide
    if cut:  # and a block is gathered while it is computed, with its gradients
        always, update = always / ranks + 2 * total * wide / c.n_layers, update // ranks
    return round((always + max(between, update)) * (WITH_HOLES if device == "cpu" else 1))


def torch_kept_bytes(
    c: ModelConfig, vocab_size: int, rows: int, precision: Precision, device: DeviceName
) -> int:
    """What autograd keeps of a forward pass over `rows` sequences until the backward pass. `c` must be resolved."""
    wide, narrow = _widths(precision)
    kept = c.n_layers * _block_bytes(c, wide, narrow, device)
    kept += c.d_model * narrow  # what the head reads, a norm's output
    if c.norm_position == "pre":
        kept += _norm_bytes(c.norm, c.d_model, wide, narrow, device)
    if c.dropout:
        kept += c.d_model * narrow  # the mask of the embedding
    kept += vocab_size * wide  # log-probabilities
    weights = parameter_table(c, vocab_size)
    matrices = sum(row.size for name, row in weights.items() if weights.is_multiplied(name))
    casts = matrices * narrow if narrow < wide else 0  # as activations are
    return round(rows * c.block_size * kept) + casts


def _widths(precision: Precision) -> tuple[int, int]:
    """Bytes of a number of the weights, norms, scores and loss, and of one of the other activations."""
    return {"fp64": (8, 8), "bf16": (4, 2), "fp16": (4, 2)}.get(precision, (4, 4))


def _update_numbers(weights: ParameterTable, config: RunConfig) -> int:
    """What Muon makes of all matrices of one shape together: four stacks of them and two of their small squares."""
    if config.optimizer.optimizer != "muon":
        return 0
    shapes = [row.shape for row in weights.values() if row.group == "muon" and row.trained]
    return max(
        (shapes.count(shape) * (4 * math.prod(shape) + 2 * min(shape) ** 2) for shape in shapes),
        default=0,
    )


def _block_bytes(c: ModelConfig, wide: int, narrow: int, device: DeviceName) -> float:
    """What autograd keeps of one block a token: what each operation needs to differentiate itself, shared or not."""
    D, F, HQ, KQ, HT = (
        c.d_model,
        c.d_ff,
        c.n_heads * c.head_size,
        c.n_kv_heads * c.head_size,
        c.n_heads * c.block_size,
    )
    kept: float = 2 * (
        _norm_bytes(c.norm, D, wide, narrow, device) + D * narrow
    )  # the norms, and what they give
    if c.qk_norm:
        kept += _norm_bytes("rmsnorm", HQ + KQ, wide, narrow, device)
    if c.attention_dropout or c.attention == "plain":  # attention written out
        scores = (
            2 * wide + narrow if c.attention_dropout else wide + narrow
        )  # softmax, mask, product
        kept += 3 * HQ * narrow + SEEN * HT * scores  # q, k, v of each head
    else:
        kept += (
            HQ + 2 * KQ
        ) * narrow + c.n_heads * wide  # q, k, v; the logarithm of each softmax's sum
        if c.position == "alibi" and device == "cpu":
            kept += HT * wide  # this kernel takes no bias, so that PyTorch keeps the softmax
    kept += HQ * narrow  # the mixture
    inner = (
        4 if c.gated else 1 if c.feedforward == "relu" else 2
    )  # gate, activation, up, product; or two, one of them
    feedforward = inner * F * narrow
    if c.n_experts:  # the token as it was sent, and each expert's output
        feedforward = (c.experts_per_token + c.shared_expert) * (feedforward + 2 * D * narrow)
    kept += feedforward
    if c.dropout:
        kept += 2 * D * narrow  # masks
    return kept


def _norm_bytes(kind: str, width: int, wide: int, narrow: int, device: DeviceName) -> int:
    """The input, and on a CPU, where RMSNorm is several operations in `wide`, also the input at unit size."""
    if kind == "none":
        return 0
    return 2 * width * wide if kind == "rmsnorm" and device == "cpu" else width * narrow


def training_bytes(config: RunConfig, vocab_size: int, compute: ComputeConfig, rows: int) -> int:
    """Peak memory of this process in training, in micro-batches of `rows`. `compute` has nothing left to choose."""
    if compute.engine == "torch":
        cut = compute.parallel == "fsdp"
        return torch_memory_bytes(
            config, vocab_size, rows, compute.precision, compute.device, ranks=group_size(), cut=cut
        )
    return memory_bytes(
        config, vocab_size, rows, compute.threads, 8 if compute.precision == "fp64" else 4
    )


PRECISION_BYTES = {
    "fp64": 8,
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
}  # of an activation, and so of a cached number


def cache_numbers(config: ModelConfig, rows: int, capacity: int) -> dict[str, int]:
    """The factors of how many numbers the cache of keys and values holds, for texts of up to `capacity` tokens.

    A model that rolls keeps the newest of its window.
    """
    c = config.resolved()
    kept = c.cache_length(capacity)
    sizes = {
        "layers": c.n_layers,
        "heads": c.n_kv_heads,
        "head size": c.head_size,
        "tokens": kept,
        "texts": rows,
    }
    return {"keys, values": 2} | sizes


def cache_bytes(config: ModelConfig, rows: int, capacity: int, bytes_per_number: int) -> int:
    """Memory of the cache of keys and values: 2 L K Q min(capacity, window if it rolls) rows numbers."""
    return math.prod(cache_numbers(config, rows, capacity).values()) * bytes_per_number
