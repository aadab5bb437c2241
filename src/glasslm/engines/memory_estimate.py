"""Memory that training takes, estimated before it starts from the parameter table and the shapes.

Activations are counted in numbers or bytes per token: those that live from the forward to the
backward pass.
Letters: D width, F inner width, H heads, K key-value heads, Q head size, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from glasslm.config.schema import (
    ComputeConfig,
    DeviceName,
    EngineName,
    ModelConfig,
    Precision,
    RunConfig,
)
from glasslm.engines.choice import COMPILED_FUSED_MIN_LENGTH, can_compile
from glasslm.engines.numpy.attention import TILE_QUERIES
from glasslm.engines.numpy.flash import uses_flash
from glasslm.engines.numpy.key_blocks import KEY_BLOCK, rounded_size
from glasslm.engines.numpy.positions import POSITIONS
from glasslm.engines.resources import count_ranks
from glasslm.model.parameters import ParameterTable, parameter_table

# PyTorch's tensors on a CPU come from the heap of the C library, which keeps the holes between
# pieces of different sizes: on Linux 1.1 to 1.6 times the size of the tensors was resident, 1.0
# times with each tensor in a mapping of its own (docs/log.md).
HEAP_OVERHEAD = 1.3
# Memory of experts is taken in powers of two (engines/numpy/moe.py).
EXPERT_OVERHEAD = 1.5
# Explicit attention has four tiles of queries (engines/torch/attention.py): the share of the
# queries in a tile, and the share of the scores that is computed, because keys after the end of a
# tile are left out.
TILE_SHARE, VISIBLE_SHARE = 1 / 4, 5 / 8
# Arrays of F numbers that autograd keeps of a feed-forward's activation and product. ReLU shares
# its output with the next product.
ACTIVATION_ARRAYS = {"relu": 1}
UNGATED_ARRAYS, GATED_ARRAYS = 2, 4

PRECISION_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}  # of one number of an activation


def numpy_memory_bytes(
    config: RunConfig, vocab_size: int, rows: int, threads: int, bytes_per_number: int = 4
) -> int:
    """Peak memory of training with the NumPy engine, in bytes.

    It is the memory of weights, gradients and moments, and of one pass over `rows` sequences for
    each thread. Python and the libraries (about 100 MB) come on top.
    """
    config = config.resolve()
    table = parameter_table(config.model, vocab_size)
    threads_used = min(threads, -(-config.train.batch_size // rows))
    # Each pass makes gradients of its own, which wait to be added; one more may be computed
    # meanwhile in its place.
    pass_numbers = rows * _row_numbers(config.model, vocab_size) + table.trained
    passes = threads_used * pass_numbers + table.trained
    average = table.total if config.optimizer.ema else 0
    moments = _moment_numbers(table, config)
    return (table.total + table.trained + average + moments + passes) * bytes_per_number


def _moment_numbers(table: ParameterTable, config: RunConfig) -> int:
    """Numbers in the moments: two per weight of AdamW, one per weight of Muon or SGD."""
    optimizer = config.optimizer.optimizer
    one_moment = {
        name
        for name, spec in table.items()
        if optimizer == "sgd" or (optimizer, spec.group) == ("muon", "muon")
    }
    return sum(
        spec.size * (1 if name in one_moment else 2) for name, spec in table.items() if spec.trained
    )


def _row_numbers(c: ModelConfig, vocab_size: int) -> int:
    """Numbers that a forward pass over one sequence keeps, plus the temporaries of backward."""
    D, F, H, T = c.d_model, c.d_ff, c.n_heads, c.block_size
    HQ, KQ = c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    projection_width = 2 * F if c.is_gated else F
    scores_of_layers = [_scores_of_a_query(c, layer) for layer in range(c.n_layers)]
    scores = sum(scores_of_layers) / c.n_layers
    # Norm, projections, scores, mixture and output of attention.
    saved_numbers: float = 2 * D + (HQ + 2 * KQ) + H * scores + HQ + D
    inner_numbers = projection_width + (3 * F if c.is_gated else F)  # products, activation
    saved_numbers += 2 * D + inner_numbers + D  # norm, feed-forward, output
    if c.n_experts:  # the dispatched tokens and the output of each expert
        saved_numbers += EXPERT_OVERHEAD * c.experts_per_token * (inner_numbers + 3 * D)
        saved_numbers += D if c.shared_expert else D - inner_numbers
    if not c.has_final_norm:
        saved_numbers += 2 * D
    if c.norm not in ("none", "rmsnorm") or c.qk_norm:
        saved_numbers += D
    if c.qk_norm:
        saved_numbers += HQ + KQ
    if c.dropout:
        saved_numbers += 4 * D
    if c.attention_dropout:
        saved_numbers += H * (T + scores)
    if c.attention_softcap:
        saved_numbers += H * scores  # the tanh of each score
    temporary_scores = 3 if c.attention_softcap else 2
    temporary_numbers = (
        temporary_scores * H * max(scores_of_layers)
        + 2 * (HQ + 2 * KQ)
        + 2 * projection_width
        + 2 * F
        + 4 * D
    )
    non_block_numbers = 4 * D + 3 * vocab_size  # embedding, last norm, logits and loss
    return round(T * (c.n_layers * saved_numbers + temporary_numbers + non_block_numbers))


def _scores_of_a_query(c: ModelConfig, layer: int) -> float:
    """Numbers that attention keeps of a query and head: a logarithm, or the scores of its tile."""
    T, window = c.block_size, c.kind_window(c.layer_kind(layer))
    if uses_flash(c, T):
        return 1
    tile = min(TILE_QUERIES, T)
    keys = (T + tile) / 2
    return min(keys, window + tile - 1) if window else keys


def torch_memory_bytes(
    config: RunConfig,
    vocab_size: int,
    rows: int,
    precision: Precision,
    device: DeviceName = "cpu",
    *,
    ranks: int = 1,
    sharded: bool = False,
    compiled: bool = False,
) -> int:
    """Peak memory of training with the PyTorch engine on one device, in bytes.

    Micro-batches have `rows` sequences. Each of `ranks` processes takes its part of the batch, and
    with `sharded` (fsdp) its part of the weights. `compiled`: whether torch.compile is used.

    Weights and moments are always in memory. The backward pass frees what the forward pass kept,
    from the end to the beginning, while gradients take its place. So the peak is between the two
    passes, on top of the gradients of earlier micro-batches if there are any, or it is in the
    update. PyTorch itself (350 MB) comes on top.
    """
    config = config.resolve()
    c, table = config.model, parameter_table(config.model, vocab_size)
    master_bytes, _ = _widths(precision)
    peak_between_passes = torch_activation_bytes(c, vocab_size, rows, precision, device, compiled)
    # When the backward pass begins: the gradients of the logits and of the log-probabilities.
    logits = 2 * vocab_size * master_bytes
    # When the masks of a tile are drawn.
    score = c.n_heads * c.block_size * master_bytes  # one number for each score of a query
    tile_share = 1 if c.attention_softcap else TILE_SHARE
    masks = 4 * tile_share * score if c.attention_dropout else 0
    # When the gradients of the softmax and of its input are there.
    gradients = 2 * score if c.attention_softcap else 0
    peak_between_passes += round(rows * c.block_size * max(logits, masks, gradients))
    if rows * ranks < config.train.batch_size:
        peak_between_passes += table.trained * master_bytes
    update = (table.trained + _update_numbers(table, config)) * master_bytes
    average = table.total if config.optimizer.ema else 0
    persistent_bytes: float = (
        table.total + average + _moment_numbers(table, config)
    ) * master_bytes
    if sharded:  # a block is gathered while it is computed, with its gradients
        persistent_bytes = persistent_bytes / ranks + 2 * table.total * master_bytes / c.n_layers
        update = update // ranks
    return round(
        (persistent_bytes + max(peak_between_passes, update))
        * (HEAP_OVERHEAD if device == "cpu" else 1)
    )


def torch_activation_bytes(
    c: ModelConfig,
    vocab_size: int,
    rows: int,
    precision: Precision,
    device: DeviceName,
    compiled: bool = False,
) -> int:
    """Bytes that autograd keeps of a forward pass over `rows` sequences. `c` must be resolved."""
    master_bytes, activation_bytes = _widths(precision)
    saved_bytes = c.n_layers * _block_bytes(c, master_bytes, activation_bytes, device, compiled)
    saved_bytes += c.d_model * activation_bytes  # the input of the head
    if c.has_final_norm:
        saved_bytes += _norm_bytes(c.norm, c.d_model, master_bytes, activation_bytes, device)
    if c.dropout:
        saved_bytes += c.d_model * activation_bytes  # the mask of the embedding
    saved_bytes += vocab_size * master_bytes  # log-probabilities
    table = parameter_table(c, vocab_size)
    matrices = sum(spec.size for name, spec in table.items() if table.is_multiplied(name))
    # Weights in the type of the activations.
    casts = matrices * activation_bytes if activation_bytes < master_bytes else 0
    return round(rows * c.block_size * saved_bytes) + casts


def _widths(precision: Precision) -> tuple[int, int]:
    """Bytes of one number of weights, norms, scores and loss, and of one of other activations."""
    return {"fp64": (8, 8), "bf16": (4, 2), "fp16": (4, 2)}.get(precision, (4, 4))


def _update_numbers(table: ParameterTable, config: RunConfig) -> int:
    """Numbers that Muon needs for all matrices of one shape, which it updates together.

    They are four stacks of the matrices and two of their small squares.
    """
    if config.optimizer.optimizer != "muon":
        return 0
    shapes = [spec.shape for spec in table.values() if spec.group == "muon" and spec.trained]
    return max(
        (shapes.count(shape) * (4 * math.prod(shape) + 2 * min(shape) ** 2) for shape in shapes),
        default=0,
    )


def _block_bytes(
    c: ModelConfig, master_bytes: int, activation_bytes: int, device: DeviceName, compiled: bool
) -> float:
    """Bytes per token that autograd keeps of one block, tensors that two operations share once."""
    D, F, HQ, KQ = c.d_model, c.d_ff, c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    # The norms and their outputs.
    saved_bytes: float = 2 * (
        _norm_bytes(c.norm, D, master_bytes, activation_bytes, device) + D * activation_bytes
    )
    if c.qk_norm:
        head_norm = "rmsnorm1p" if c.norm == "rmsnorm1p" else "rmsnorm"
        saved_bytes += _norm_bytes(head_norm, HQ + KQ, master_bytes, activation_bytes, device)
    saved_bytes += _attention_bytes(c, master_bytes, activation_bytes, device, compiled)
    saved_bytes += HQ * activation_bytes  # the mixture
    arrays = GATED_ARRAYS  # gate, activation, up, product
    if not c.is_gated:
        arrays = ACTIVATION_ARRAYS.get(c.feedforward, UNGATED_ARRAYS)
    feedforward = arrays * F * activation_bytes
    if c.n_experts:  # the dispatched tokens and the output of each expert
        feedforward = (c.experts_per_token + c.shared_expert) * (
            feedforward + 2 * D * activation_bytes
        )
    saved_bytes += feedforward
    if c.dropout:
        saved_bytes += 2 * D * activation_bytes  # masks
    return saved_bytes


def _attention_bytes(
    c: ModelConfig, master_bytes: int, activation_bytes: int, device: DeviceName, compiled: bool
) -> float:
    """Bytes per token that autograd keeps of attention between its projections and the mixture."""
    H, T = c.n_heads, c.block_size
    HQ, KQ = H * c.head_size, c.n_kv_heads * c.head_size
    # The fused kernel of a CPU takes no mask that all rows share, so PyTorch keeps the softmax.
    has_mask = POSITIONS[c.position].bias is not None or 0 < c.window < T
    needs_weights = has_mask and not c.document_attention
    # torch/attention.py chooses in the same way.
    is_compiled = c.attention == "auto" and compiled and device == "cpu"
    is_explicit = is_compiled and (needs_weights or T < COMPILED_FUSED_MIN_LENGTH)
    is_explicit = is_explicit or c.attention == "plain"
    if c.attention_softcap or c.attention_dropout or is_explicit:
        weights = master_bytes  # the softmax, in another type for the product
        if c.attention_dropout:
            weights += master_bytes + activation_bytes  # the mask, and the product with it
        elif activation_bytes < master_bytes:
            weights += activation_bytes
        if c.attention_softcap:  # over the whole text, with its tanh
            scores: float = H * T * (weights + master_bytes)
        else:
            scores = VISIBLE_SHARE * H * T * weights
        return scores + 3 * HQ * activation_bytes  # q, k, v of each head
    saved_bytes = (HQ + 2 * KQ) * activation_bytes  # q, k, v
    saved_bytes += H * master_bytes  # the logarithm of softmax's sum
    if c.document_attention:
        saved_bytes += T * activation_bytes  # each layer keeps the mask as numbers
    elif needs_weights and device == "cpu":
        saved_bytes += H * T * master_bytes
    return saved_bytes


def _norm_bytes(
    norm: str, width: int, master_bytes: int, activation_bytes: int, device: DeviceName
) -> int:
    """Bytes per token that autograd keeps of a norm over `width` numbers."""
    if norm == "none":
        return 0
    if norm == "layernorm" or device != "cpu":
        # One fused kernel, which keeps its input; rmsnorm1p computes in the type of the weights.
        return width * (master_bytes if norm == "rmsnorm1p" else activation_bytes)
    # Several operations in the type of the weights, as RMSNorm is on a CPU, keep the input and the
    # normalized input. A norm that has no case here is estimated like that, too.
    return 2 * width * master_bytes


def training_bytes(config: RunConfig, vocab_size: int, compute: ComputeConfig, rows: int) -> int:
    """Peak memory of this process in training, in micro-batches of `rows`, in bytes.

    `compute` comes from choose_engine: nothing in it is `auto`, apart from `compile`, which may
    then be used.
    """
    first_weights = 0  # of preference tuning, in a second engine
    if config.preference.is_active:
        master_bytes, _ = _widths(compute.precision)
        first_weights = parameter_table(config.model, vocab_size).total * master_bytes
    if compute.engine == "torch":
        sharded = compute.parallel == "fsdp"
        compiled = compute.compile == "on" or (compute.compile == "auto" and can_compile(compute))
        return first_weights + torch_memory_bytes(
            config, vocab_size, rows, compute.precision, compute.device,
            ranks=count_ranks(), sharded=sharded, compiled=compiled,
        )  # fmt: skip
    bytes_per_number = PRECISION_BYTES[compute.precision]
    return first_weights + numpy_memory_bytes(
        config, vocab_size, rows, compute.threads, bytes_per_number
    )


def memory_saving_flags(engine: EngineName) -> list[str]:
    """The flags besides --micro-batch-size whose lower values make a training step take less."""
    return ["--block-size", "--threads"] if engine == "numpy" else ["--block-size"]


def smaller_settings(
    config: RunConfig, compute: ComputeConfig, rows: int
) -> Iterator[dict[str, int]]:
    """Settings in descending size: micro-batches, then NumPy threads, then the context.

    `rows` is the present micro-batch.
    """
    for smaller_rows in _halve_repeatedly(rows):
        yield {"micro_batch_size": smaller_rows}
    least = {"micro_batch_size": 1}
    if compute.threads > 1 and "--threads" in memory_saving_flags(compute.engine):
        least["threads"] = 1
        yield least
    for block_size in _halve_repeatedly(config.model.block_size):
        yield least | {"block_size": block_size}


def _halve_repeatedly(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def cache_numbers(
    config: ModelConfig, rows: int, capacity: int, engine: EngineName = "torch"
) -> dict[str, int]:
    """The factors of the size of a KV cache for `rows` texts of up to `capacity` tokens.

    A model with a rolling cache keeps the newest tokens of its window only. The NumPy engine has
    memory for whole blocks of keys.
    """
    c = config.resolve()
    tokens = c.cache_length(capacity)
    stored = rounded_size(tokens) if engine == "numpy" else tokens
    return {
        "keys, values": 2,
        "layers": c.n_layers,
        "heads": c.n_kv_heads,
        "head size": c.head_size,
        "tokens" if stored == tokens else f"tokens, in blocks of {KEY_BLOCK}": stored,
        "texts": rows,
    }


def cache_bytes(
    config: ModelConfig,
    rows: int,
    capacity: int,
    bytes_per_number: int,
    engine: EngineName = "torch",
) -> int:
    """Bytes of a KV cache: the product of cache_numbers, times `bytes_per_number`."""
    return math.prod(cache_numbers(config, rows, capacity, engine).values()) * bytes_per_number
