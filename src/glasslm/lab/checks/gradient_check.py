"""Every hand-written gradient against finite differences: each op, each switch of the model, random combinations.

The cases follow from the code: every op of the NumPy engine has a row in OPS, and the switches are read off the
`Literal`s of ModelConfig, so that a new one is checked without an edit here.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from glasslm.engines import positions
from glasslm.engines.dropout import row_keys
from glasslm.engines.numpy import attention, flash, moe, ops
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.objective import objective
from glasslm.engines.protocol import Batch
from glasslm.errors import InputError
from glasslm.lab.checks.finite_differences import Finding, compare
from glasslm.model.parameters import initial_weights
from glasslm.text import tell

Array = NDArray[Any]
Case = tuple[
    dict[str, Array], Callable[[], tuple[Array, Callable[[Array], Any]]]
]  # inputs, and the op over them

B, T, V = 2, 5, 7  # rows, positions, vocabulary of all cases
KINKED = {"relu", "relu2"}
# Coefficients large enough for a wrong gradient of what is minimised beside the cross-entropy to be seen.
ROUTER_TERMS: dict[str, Any] = {"balance_loss": 0.3, "router_z_loss": 0.2}
SOFTMAX_TERMS: dict[str, Any] = {"label_smoothing": 0.3, "z_loss": 0.1}
RUN_TOKENS, RUN_ELEMENTS = (
    16,
    4,
)  # of a trained model: tokens of each passage, elements of each weight


def check_ops(seed: int = 0) -> Iterator[Finding]:
    """Each op with random inputs and a random upstream gradient, every element of every input."""
    for name, make in OPS.items():
        rng = _generator(seed, name)
        inputs, run = make(rng)
        upstream = rng.standard_normal(run()[0].shape)

        def gradients(
            inputs: dict[str, Array] = inputs,
            run: Callable[[], Any] = run,
            upstream: Array = upstream,
        ) -> dict[str, Array]:
            result = run()[1](upstream.copy())
            parts = result if isinstance(result, tuple) else (result,)
            return dict(zip(inputs, parts))

        def value(run: Callable[[], Any] = run, upstream: Array = upstream) -> float:
            return float(np.sum(run()[0] * upstream))

        yield compare(name, inputs, value, gradients, rng, kinks=name in KINKED)


def check_models(random_combinations: int = 50, seed: int = 0) -> Iterator[Finding]:
    """The loss of the whole model, for each switch by itself and for random combinations of all."""
    for name, config in [*single_switches(), *combinations(random_combinations, seed)]:
        yield check_model(name, config, seed)
    for term, coefficient in SOFTMAX_TERMS.items():
        yield check_model(f"{term} {coefficient}", small_model(), seed, **{term: coefficient})


def check_model(name: str, config: ModelConfig, seed: int = 0, **terms: Any) -> Finding:
    """Every element of every trained weight, two sequences in two micro-batches, one target masked, with dropout.

    `terms`: coefficients of what is minimised beside the cross-entropy.
    """
    rng = _generator(seed, name)
    train = TrainConfig(batch_size=B, micro_batch_size=1, seed=seed)
    run = RunConfig(
        config, optimizer=OptimizerConfig(**(ROUTER_TERMS | terms)), train=train
    ).resolved()
    engine = NumpyEngine(run, V, threads=1, dtype=np.float64)
    # Larger than a real start, so that attention and gates are far from their linear range.
    engine.load(
        (key, array + 0.3 * rng.standard_normal(array.shape))
        for key, array in initial_weights(engine.rows, seed)
    )
    tokens, targets = rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T))
    targets[0, 2] = -1
    batch = Batch(tokens, targets, step=3, rows=np.arange(B))
    return check_engine(name, engine, batch, rng, kinks=has_kinks(config))


def has_kinks(config: ModelConfig) -> bool:
    """Whether the loss is not smooth everywhere: at zero of a ReLU, and where a router's last choice is a tie."""
    return config.feedforward in KINKED or config.experts_per_token < config.n_experts


def check_engine(
    name: str,
    engine: NumpyEngine,
    batch: Batch,
    rng: np.random.Generator,
    kinks: bool,
    sample: int | None = None,
    only: str | None = None,
) -> Finding:
    """An engine's weights (or `only` one of them) as they are, in float64, on a batch."""
    weight = 1 / np.count_nonzero(batch.targets >= 0)
    return compare(
        name,
        {
            name: engine.weights[name]
            for name, row in engine.rows.items()
            if row.trained and only in (None, name)
        },
        lambda: objective(engine.forward(batch, weight)[0], engine.config),
        lambda: engine.gradients(batch, weight),
        rng,
        kinks,
        sample,
    )


def check_run(run: str, seed: int = 0) -> Iterator[Finding]:
    """A trained model on two passages of its validation text: some elements of each of its weights."""
    from glasslm.data import shards
    from glasslm.runs import checkpoint, run_folder

    found = run_folder.Run(run_folder.find(run))
    dataset = shards.of_run(found.config.data, found.record["data"], found.tokenizer, tell)
    width = min(RUN_TOKENS, found.config.model.block_size)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(dataset.val.tokens) - width, B)
    text = np.stack([dataset.val.tokens[start : start + width + 1] for start in starts]).astype(
        np.int64
    )
    engine = NumpyEngine(
        found.config.resolved(), found.tokenizer.vocab_size, threads=1, dtype=np.float64
    )
    held = checkpoint.load(found.path, "best")
    engine.load(held.weights().items())
    batch = Batch(text[:, :-1], text[:, 1:], step=held.step, rows=np.arange(B))
    kinks = has_kinks(found.config.model)
    for name in (name for name, row in engine.rows.items() if row.trained):
        yield check_engine(name, engine, batch, rng, kinks, sample=RUN_ELEMENTS, only=name)


def _generator(seed: int, case: str) -> np.random.Generator:
    """One for each case, so that a new case moves no other."""
    return np.random.default_rng([seed, zlib.crc32(case.encode())])


def single_switches() -> Iterator[tuple[str, ModelConfig]]:
    """A small model, and for each switch each value that differs from it, with what that value needs beside it."""
    base = small_model()
    yield "the default switches", base
    for field, values in (SWITCHES | NUMBERS).items():
        for value in values:
            if getattr(base, field) != value:
                changes = NEEDS.get(field, {}) | {field: value}
                yield f"{field} {value}", dataclasses.replace(base, **changes)


def combinations(count: int, seed: int) -> Iterator[tuple[str, ModelConfig]]:
    """`count` different models, every switch drawn at random."""
    rng = np.random.default_rng(seed)
    seen: set[ModelConfig] = set()
    while len(seen) < count:
        choice = {field: values[rng.integers(len(values))] for field, values in SWITCHES.items()}
        if (
            choice["norm"] == "none"
        ):  # is a single switch: with others, it amplifies rounding from step to step
            continue
        factor = 1.0 if choice["rope_scaling"] == "none" else 2.0
        try:
            config = dataclasses.replace(small_model(), rope_factor=factor, **choice)
        except InputError:  # parts that do not go together, such as scaled rope without rope
            continue
        if config not in seen:
            seen.add(config)
            yield describe(choice), config


def describe(choice: dict[str, Any]) -> str:
    """The switches in few words: "layernorm post relu alibi, bias, n_kv_heads 2, n_layers 1"."""
    words = " ".join(value for value in choice.values() if isinstance(value, str))
    on = [field for field, value in choice.items() if value is True]
    numbers = [
        f"{field} {value}"
        for field, value in choice.items()
        if not isinstance(value, (str, bool)) and value
    ]
    return ", ".join([words, *on, *numbers])


def small_model() -> ModelConfig:
    return ModelConfig(d_model=8, n_layers=2, n_heads=4, d_ff=6, block_size=T + 1, lora_alpha=2.0)


def _switches() -> dict[str, tuple[Any, ...]]:
    """The fields of ModelConfig that choose between variants, with all their values, and some sizes that matter."""
    found: dict[str, tuple[Any, ...]] = {}
    for field, hint in get_type_hints(ModelConfig).items():
        if get_origin(hint) is Literal:
            found[field] = get_args(hint)
        elif hint is bool:
            found[field] = (False, True)
    return found | {
        "n_kv_heads": (1, 2, 4),
        "dropout": (0.0, 0.3),
        "attention_dropout": (0.0, 0.3),
        "n_layers": (1, 2),
        "window": (0, 2, 3),  # not 1: queries and keys would have no gradient but rounding
        "n_experts": (0, 0, 0, 4),  # rarely, because of their many weights
        "experts_per_token": (1, 2, 4),
        "lora_rank": (
            0,
            0,
            0,
            2,
        ),  # of a random model rarely, because its other weights have no gradient
        "lora_targets": ("q,v", "k,o,up,down"),
    }


SWITCHES = _switches()
NUMBERS: dict[str, tuple[Any, ...]] = {
    "norm_eps": (1e-2,),
    "rope_base": (10.0,),
}  # no part of random combinations
NEEDS: dict[str, dict[str, Any]] = {  # what makes a switch matter by itself
    "rope_scaling": {"rope_factor": 2.0},
    "shared_expert": {"n_experts": 4},
    "experts_per_token": {"n_experts": 4},
    "lora_targets": {"lora_rank": 2},
}

# -- the ops ----------------------------------------------------------------------------------------------------------

N, D, F = B * T, 6, 4  # tokens, width, inner width
H, K, Q = 4, 2, 4  # query heads, key-value heads, head size
R, E = 2, 4  # rank of an adapter, experts


def new(shape: tuple[int, ...]) -> Array:
    """What an arena would give, filled with rubbish that no op may rely on."""
    return np.full(shape, np.nan)


def _embedding(rng: np.random.Generator) -> Case:
    inputs = {"table": rng.standard_normal((V, D))}
    tokens = rng.integers(0, V - 1, N)  # the last symbol never occurs
    return inputs, lambda: ops.embedding(tokens, inputs["table"], new)


def _linear(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, D)), "w": rng.standard_normal((F, D))}
    return inputs, lambda: ops.linear(inputs["x"], inputs["w"], new)


def _frozen_linear(rng: np.random.Generator) -> Case:
    w, inputs = rng.standard_normal((F, D)), {"x": rng.standard_normal((N, D))}
    return inputs, lambda: ops.frozen_linear(inputs["x"], w, new)


def _adapter(rng: np.random.Generator) -> Case:
    inputs = {
        name: rng.standard_normal(shape)
        for name, shape in (("x", (N, D)), ("a", (R, D)), ("b", (F, R)))
    }
    return inputs, lambda: ops.adapter(inputs["x"], inputs["a"], inputs["b"], 0.7, new)


def _rms_norm(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, D)), "gain": rng.standard_normal(D)}
    return inputs, lambda: ops.rms_norm(inputs["x"], inputs["gain"], new)


def _rms_norm_heads(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((B, T, H, Q)), "gain": rng.standard_normal((H, Q))}
    return inputs, lambda: ops.rms_norm(inputs["x"], inputs["gain"], new)


def _layer_norm(rng: np.random.Generator) -> Case:
    inputs = {
        "x": rng.standard_normal((N, D)),
        "gain": rng.standard_normal(D),
        "bias": rng.standard_normal(D),
    }
    return inputs, lambda: ops.layer_norm(inputs["x"], inputs["gain"], inputs["bias"], new)


def _activation(name: str) -> Callable[[np.random.Generator], Case]:
    def make(rng: np.random.Generator) -> Case:
        inputs = {"x": rng.standard_normal((N, F))}
        return inputs, lambda: getattr(ops, name)(inputs["x"], new)

    return make


def _gate(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, 2 * F))}
    return inputs, lambda: ops.gate(inputs["x"], ops.silu, new)


def _dropout(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, D))}
    keys = row_keys(0, 1, np.arange(B), 2)
    return inputs, lambda: ops.dropout(inputs["x"], 0.3, keys, new)


def _loss(name: str) -> Callable[[np.random.Generator], Case]:
    def make(rng: np.random.Generator) -> Case:
        inputs = {"logits": rng.standard_normal((N, V))}
        targets = rng.integers(0, V, N)
        targets[3] = -1

        def run() -> tuple[Array, Callable[[Array], Array]]:
            values, backward = getattr(ops, name)(inputs["logits"], targets, new)
            return np.sum(values, keepdims=True), lambda upstream: backward(float(upstream[0]))

        return inputs, run

    return make


def _route(rng: np.random.Generator) -> Case:
    """The gates, and behind them the two losses of a router."""
    inputs = {"logits": rng.standard_normal((N, E))}

    def run() -> tuple[Array, Callable[[Array], Array]]:
        gates, _, routing, backward = moe.route(inputs["logits"], 2, B, new)
        y = np.concatenate([gates.reshape(-1), np.array([routing.balance, routing.z], gates.dtype)])
        return y, lambda upstream: backward(
            upstream[:-2].reshape(gates.shape), *upstream[-2:].tolist()
        )

    return inputs, run


def _dispatch(rng: np.random.Generator) -> Case:
    """Experts that are one matrix each, and a last one that no token goes to."""
    matrices, chosen = (
        rng.standard_normal((E, D, D)),
        rng.permuted(np.tile(np.arange(E - 1), (N, 1)), axis=1)[:, :2],
    )
    inputs = {"x": rng.standard_normal((N, D))}

    def expert(w: Array) -> moe.Expert:
        def compute(x: Array) -> tuple[Array, Callable[[Array, dict[str, Array]], Array]]:
            y, backward = ops.frozen_linear(x, w, new)
            return y, lambda dy, gradients: backward(dy)

        return compute

    def run() -> tuple[Array, Callable[[Array], Array]]:
        y, backward = moe.dispatch(inputs["x"], chosen, [expert(w) for w in matrices], new)
        return y, lambda upstream: backward(upstream, {})

    return inputs, run


def _rope(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((B, T, H, Q))}
    cos, sin = positions.rope_tables(T, H, Q, np.float64)
    return inputs, lambda: attention.rope(inputs["x"].copy(), cos, sin, new)  # rope works in place


def _flash_attention(
    scale: float, biased: bool, window: int
) -> Callable[[np.random.Generator], Case]:
    def make(rng: np.random.Generator) -> Case:
        def attend(qk: Array, v: Array) -> tuple[Array, Callable[[Array], Array]]:
            slopes = positions.alibi_slopes(H, v.dtype) if biased else None
            return flash.flash_attention(qk, v, slopes, window, new, tile=2)

        return _attending(scale, rng, attend)

    return make


def _attention(scale: float, biased: bool, dropping: bool) -> Callable[[np.random.Generator], Case]:
    def make(rng: np.random.Generator) -> Case:
        bias = rng.standard_normal((H, T, T)) if biased else None
        drop = (0.3, row_keys(0, 1, np.arange(B), 2)) if dropping else None
        return _attending(scale, rng, lambda qk, v: attention.attention(qk, v, bias, drop, new))

    return make


def _attending(
    scale: float,
    rng: np.random.Generator,
    attend: Callable[[Array, Array], tuple[Array, Callable[[Array], Array]]],
) -> Case:
    """Attention over random queries and keys, which it may overwrite, and values."""
    inputs = {
        "qk": scale * rng.standard_normal((B, T, H + K, Q)),
        "v": rng.standard_normal((B, T, K, Q)),
    }

    def run() -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        y, backward = attend(inputs["qk"].copy(), inputs["v"])

        def split(upstream: Array) -> tuple[Array, Array]:
            dqkv = backward(upstream)
            return dqkv[:, :, : H + K], dqkv[:, :, H + K :]

        return y, split

    return inputs, run


OPS: dict[str, Callable[[np.random.Generator], Case]] = {
    "embedding": _embedding,
    "linear": _linear,
    "frozen_linear": _frozen_linear,
    "adapter": _adapter,
    "rms_norm": _rms_norm,
    "rms_norm of heads": _rms_norm_heads,
    "layer_norm": _layer_norm,
    "gelu": _activation("gelu"),
    "silu": _activation("silu"),
    "relu": _activation("relu"),
    "relu2": _activation("relu2"),
    "gate": _gate,
    "dropout": _dropout,
    "cross_entropy": _loss("cross_entropy"),
    "smoothing": _loss("smoothing"),
    "z_loss": _loss("z_loss"),
    "route": _route,
    "dispatch": _dispatch,
    "rope": _rope,
    "attention": _attention(1.0, biased=False, dropping=False),
    "attention with bias": _attention(1.0, biased=True, dropping=False),
    "attention with dropout": _attention(1.0, biased=False, dropping=True),
    "attention, large scores": _attention(
        12.0, biased=False, dropping=False
    ),  # the branch that subtracts the maximum
    "flash_attention": _flash_attention(1.0, biased=False, window=0),
    "flash_attention with slopes and a window": _flash_attention(1.0, biased=True, window=3),
    "flash_attention, large scores": _flash_attention(12.0, biased=False, window=0),
}
