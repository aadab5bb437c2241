"""One block and a whole transformer as functions of a dictionary of weights.

The names and shapes of weights are those of a checkpoint: `initial_weights` returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import ModelConfig
from glasslm.data.batch_sampler import BatchSampler
from glasslm.engines.numpy.forward_context import ForwardContext
from glasslm.engines.numpy.model import Model
from glasslm.engines.numpy.ops import Array, New
from glasslm.engines.numpy.weights import Weights
from glasslm.errors import InputError, require
from glasslm.model import parameters
from glasslm.model.parameters import ParameterSpec, parameter_table
from glasslm.ops.arguments import (
    as_array,
    read_arrays,
    read_float_type,
    read_gradient,
    read_ids,
    read_new,
    require_count,
    require_seed,
    require_type,
)

BLOCK = "blocks.0."


def initial_weights(
    config: ModelConfig, vocab_size: int, seed: int = 42, dtype: DTypeLike = np.float32
) -> dict[str, Array]:
    """The weights of a model before training, by name; the same seed gives the same weights.

    Matrices are (out, in). Raises InputError unless vocab_size is at least 1, the seed is an
    integer from 0 to 2**64 - 1, and dtype is float32 or float64.

    >>> weights = initial_weights(ModelConfig(d_model=64, n_heads=4, n_layers=2), vocab_size=65)
    >>> weights["blocks.0.attention.q.weight"].shape
    (64, 64)
    """
    require_count("vocab_size", vocab_size)
    require_seed(seed)
    table = parameter_table(_require_config(config), vocab_size)
    return dict(parameters.initial_weights(table, seed, read_float_type(dtype)))


def block(
    x: Any,
    weights: Mapping[str, Any],
    config: ModelConfig,
    *,
    layer: int = 0,
    new: New | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, dict[str, Array]]]]:
    """One block of the transformer: attention and feed-forward, each with its norm and residual.

    It is computed without dropout, as in evaluation.

    Args:
        x: (..., T, D).
        weights: The weights of a block by name, without "blocks.0.": attention_norm.weight,
            attention.q.weight, ... Others are errors.
        config: The architecture, a glasslm.config.schema.ModelConfig; its block_size is at least T.
        layer: Which block of the model it is, from 0: its attention is that of this layer in the
            config's attention_pattern.
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        y (..., T, D), and backward(dy) -> dx (..., T, D) and the gradients of the weights by name.

    Raises:
        InputError: A weight is missing, unknown or has another shape, T is above the context, the
            config has no such layer or asks for document_attention, or an array is not float32 or
            float64.

    >>> config = ModelConfig(d_model=64, n_heads=4, n_layers=1)
    >>> weights = {
    ...     name.removeprefix("blocks.0."): array
    ...     for name, array in initial_weights(config, 65).items()
    ...     if name.startswith("blocks.0.")
    ... }
    >>> y, backward = block(np.ones((2, 10, 64), np.float32), weights, config)
    >>> dx, gradients = backward(y)
    """
    c = _select_layer(_require_config(config), layer).resolve()
    (x,) = read_arrays(x=(x, "... T D"))
    T = x.shape[-2]
    if x.shape[-1] != c.d_model or c.block_size < T:
        raise InputError(
            f"x has the shape {x.shape}: expected (..., T, D) with D = {c.d_model} and T up to "
            f"{c.block_size}, the d_model and the block_size of the config"
        )
    table = parameter_table(c, 1)
    specs = {name: spec for name, spec in table.items() if name.startswith(BLOCK)}
    prefixed_weights = {
        f"{BLOCK}{name}": array for name, array in _read_dictionary(weights).items()
    }
    model = Model(c, _read_weights(prefixed_weights, specs, table, x.dtype, len(BLOCK)))
    flat = x.reshape(-1, c.d_model)
    y, backs = flat, []
    for sublayer in model.sublayers(0, _make_context(model, len(flat) // T, T, new)):
        y, back = sublayer(y)
        backs.append(back)

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        gradients: dict[str, Array] = {}
        dx = read_gradient(dy, x).reshape(flat.shape)
        for back in reversed(backs):
            dx = back(dx, gradients)
        all_gradients = _name_gradients(gradients, specs, x.dtype)
        return dx.reshape(x.shape).copy(), {
            name.removeprefix(BLOCK): gradient for name, gradient in all_gradients.items()
        }

    return y.reshape(x.shape).copy(), backward


def _select_layer(c: ModelConfig, layer: int) -> ModelConfig:
    """The config of a model whose only block is computed as block `layer` of `c`."""
    require_count("layer", layer, 0)
    require(layer < c.n_layers, "layer", layer, f"below {c.n_layers}, the n_layers of the config")
    if c.document_attention:
        raise InputError(
            "config has document_attention, but a block gets no tokens to find the documents: "
            "give dataclasses.replace(config, document_attention=False), or call transformer"
        )
    first = layer % max(1, len(c.attention_pattern))
    pattern = c.attention_pattern[first:] + c.attention_pattern[:first]
    return replace(c, n_layers=1, attention_pattern=pattern)


def _make_context(model: Model, B: int, T: int, new: New | None) -> ForwardContext:
    """The context of a pass over B rows of T positions without dropout, losses and recorder."""
    bias = model.score_bias(T)
    rotations = {kind: rotation(slice(T)) for kind, rotation in model.rotations.items()}
    allocate = read_new(new, model.weights.flat.dtype)
    return ForwardContext(B, T, allocate, None, (0.0, 0.0), [], bias, rotations, None)


def transformer(
    tokens: Any, weights: Mapping[str, Any], config: ModelConfig, *, new: New | None = None
) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
    """The logits of the next token at each position, by a whole model.

    It is computed without dropout, as in evaluation.

    Args:
        tokens: (..., T), integers from 0 to V - 1.
        weights: All weights of the model by name, as `initial_weights` returns them.
        config: The architecture, a glasslm.config.schema.ModelConfig; its block_size is at least T.
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        logits (..., T, V), and backward(dlogits) -> the gradients of the trained weights by name.
        backward may be called once, because it frees what the forward pass kept.

    Raises:
        InputError: A weight is missing, unknown or has another shape, a token is outside the
            vocabulary, T is above the context, or document_attention has no end of a document.

    >>> config = ModelConfig(d_model=64, n_heads=4, n_layers=2)
    >>> weights = initial_weights(config, vocab_size=65)
    >>> logits, backward = transformer(np.array([[1, 2, 3]]), weights, config)
    >>> from glasslm.ops import cross_entropy
    >>> nats, nats_back = cross_entropy(logits, [[2, 3, 4]])
    >>> gradients = backward(nats_back(1 / nats.size))
    >>> gradients["blocks.1.attention.o.weight"].shape
    (64, 64)
    """
    c, names = _require_config(config).resolve(), _read_dictionary(weights)
    if "embedding.weight" not in names:
        raise InputError("weights lack 'embedding.weight', with the shape (V, D): add it")
    label = "weights['embedding.weight']"
    (embeddings,) = read_arrays(**{label: (names["embedding.weight"], "V D")})
    V, dtype = len(embeddings), embeddings.dtype
    if c.document_attention and not 0 <= c.document_end_id < V:
        raise InputError(
            f"config has document_attention and the document_end_id {c.document_end_id}: expected "
            f"a token from 0 to {V - 1} that ends a document; give "
            "dataclasses.replace(config, document_end_id=...)"
        )
    ids = read_ids("tokens", tokens, V)
    if not ids.ndim or ids.shape[-1] > c.block_size:
        raise InputError(
            f"tokens has the shape {ids.shape}: expected (..., T) with T up to {c.block_size}, the "
            "block_size of the config"
        )
    specs = parameter_table(c, V)
    model = Model(c, _read_weights(names, specs, specs, dtype))
    flat, _, model_back = model.forward(ids.reshape(-1, ids.shape[-1]), read_new(new, dtype))
    logits = flat.reshape(*ids.shape, V)
    is_freed = False

    def backward(dlogits: Array) -> dict[str, Array]:
        nonlocal is_freed
        gradient = read_gradient(dlogits, logits, "dlogits").reshape(flat.shape)
        if is_freed:
            raise InputError(
                "backward was called before, and freed what the forward pass kept: call "
                "transformer again"
            )
        is_freed = True
        return _name_gradients(model_back(gradient), specs, dtype)

    return logits.copy(), backward


def _require_config(config: Any) -> ModelConfig:
    if not isinstance(config, ModelConfig):
        raise InputError(
            f"config is {type(config).__name__}: expected a ModelConfig, which "
            "glasslm.config.schema has"
        )
    return config


def _read_dictionary(weights: Any) -> dict[str, Any]:
    if not isinstance(weights, Mapping):
        raise InputError(
            f"weights is {type(weights).__name__}: expected a dictionary of arrays by name, as "
            "initial_weights returns it"
        )
    return {str(name): array for name, array in weights.items()}


def _read_weights(
    weights: dict[str, Any],
    specs: Mapping[str, ParameterSpec],
    table: Mapping[str, ParameterSpec],
    dtype: np.dtype[Any],
    prefix: int = 0,
) -> Weights:
    """Copies of the weights in the arrays of `table`, of which `specs` must be given.

    Messages leave out the first `prefix` characters of a name.
    """
    missing = sorted(specs.keys() - weights.keys())
    unknown = sorted(weights.keys() - specs.keys())
    if missing or unknown:
        name = (missing or unknown)[0]
        problem = (
            f"weights lack '{name[prefix:]}', with the shape {specs[name].shape}"
            if missing
            else f"weights hold '{name[prefix:]}', which this config does not have"
        )
        names = ", ".join(name[prefix:] for name in specs)
        raise InputError(f"{problem}: expected {names}")
    arrays = Weights(table, dtype)
    for name, spec in specs.items():
        label = f"weights['{name[prefix:]}']"
        (array,) = read_arrays(**{label: (weights[name], "...")})
        require_type(label, array, "the input", dtype)
        if array.shape != spec.shape:
            raise InputError(
                f"{label} has the shape {array.shape}: expected {spec.shape}"
                f"{', (out, in); transpose it' if array.shape == spec.shape[::-1] else ''}"
            )
        arrays[name][...] = array
    return arrays


def _name_gradients(
    gradients: dict[str, Array], specs: Mapping[str, ParameterSpec], dtype: np.dtype[Any]
) -> dict[str, Array]:
    """The gradients of trained weights under the names of the table, whose stacks are split."""
    trained = {name: spec for name, spec in specs.items() if spec.trained}
    arrays = Weights(trained, dtype)
    has_frozen = len(trained) < len(specs)  # with adapters, whose gradients are not stacked
    for name, gradient in gradients.items():
        if name in trained or not has_frozen:
            arrays[name][...] = gradient
    return {name: arrays[name].copy() for name in trained}


def sample_batch(
    tokens: Any, batch_size: int, context: int, *, seed: int = 42, step: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A batch of random windows of a text, as `glasslm train` draws them.

    Args:
        tokens: (N,), integers; a memory map is read at the windows only.
        batch_size: The number B of windows.
        context: The number T of tokens of a window.
        seed: With `step`, determines the windows.
        step: The number of the update, from 0.

    Returns:
        Inputs and targets (B, T): the targets are the inputs moved by one token.

    Raises:
        InputError: tokens are not integers (N,) with N > T, or a number is out of its range.
    """
    ids = tokens if isinstance(tokens, np.ndarray) else as_array("tokens", tokens)
    require_count("batch_size", batch_size)
    require_count("context", context)
    require_seed(seed)
    require_count("step", step, 0)
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or len(ids) <= context:
        raise InputError(
            f"tokens is {ids.dtype} with the shape {ids.shape}: expected integers (N,) with N "
            f"above the context of {context}"
        )
    sampler = BatchSampler(len(ids), context, batch_size, seed, epochs=False)
    return sampler.batch(ids, step, np.arange(batch_size))
