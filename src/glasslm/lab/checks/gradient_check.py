"""Checks every hand-written gradient: of each op, and of whole models with each switch.

The switches are the `Literal` and `bool` fields of ModelConfig, so a new value of one is checked
without an edit here. The cases of single ops are in op_cases.py.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import (
    ModelConfig,
    OperationsConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.data.token_file import read_windows
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.numpy.operations import array_operations
from glasslm.engines.objective import objective
from glasslm.engines.operation_call import ArrayOperation, gradient_inputs, output_shape
from glasslm.engines.operations import SIGNATURES, OperationsFile, admit
from glasslm.engines.protocol import Batch
from glasslm.errors import InputError
from glasslm.lab.checks import file_cases
from glasslm.lab.checks.finite_differences import CheckResult, check_gradients
from glasslm.lab.checks.op_cases import OPS, B, T, V
from glasslm.model.parameters import initial_weights
from glasslm.text import notify

Array = NDArray[Any]

# Activations and feed-forwards without a kink. Any other may have one, so its points at a kink are
# moved; for a smooth function that changes nothing.
SMOOTH = {"gelu", "gelu_exact", "silu", "geglu", "geglu_exact", "swiglu"}
# Coefficients of the auxiliary losses, large enough to reveal a wrong gradient of one of them.
ROUTER_TERMS: dict[str, Any] = {"balance_loss": 0.3, "router_z_loss": 0.2}
SOFTMAX_TERMS: dict[str, Any] = {"label_smoothing": 0.3, "z_loss": 0.1}
RUN_TOKENS = 16  # of each passage that a trained model is checked on
RUN_ELEMENTS = 4  # of each weight of a trained model


def check_ops(seed: int = 0) -> Iterator[CheckResult]:
    """Check every element of every input of each op, with a random upstream gradient."""
    activations = {function.__name__ for function in ops.ACTIVATIONS.values()}
    for name, make_case in OPS.items():
        rng = _generator(seed, name)
        inputs, apply = make_case(rng)
        upstream = rng.standard_normal(apply()[0].shape)

        def gradients(
            inputs: dict[str, Array] = inputs,
            apply: Callable[[], Any] = apply,
            upstream: Array = upstream,
        ) -> dict[str, Array]:
            result = apply()[1](upstream.copy())
            parts = result if isinstance(result, tuple) else (result,)
            return dict(zip(inputs, parts))

        def value(apply: Callable[[], Any] = apply, upstream: Array = upstream) -> float:
            return float(np.sum(apply()[0] * upstream))

        kinks = name in activations - SMOOTH
        yield check_gradients(name, inputs, value, gradients, rng, kinks)


def check_file_operations(operations: OperationsFile, seed: int = 0) -> Iterator[CheckResult]:
    """Check every element of every input of each operation of a file, as check_ops does."""
    for name, op in array_operations(operations).items():
        signature = SIGNATURES[name]
        if not signature.gradients:  # an optimizer
            continue
        rng = _generator(seed, name)
        arrays = file_cases.make_inputs(name, rng)
        places = gradient_inputs(name)
        settings = {"eps": file_cases.NORM_EPS} if "eps" in signature.settings else {}
        upstream = rng.standard_normal(output_shape(name, arrays))
        if name == "cross_entropy":  # whose backward gets one weight of all rows
            upstream[...] = upstream[0]

        def value(
            op: ArrayOperation = op,
            arrays: tuple[Array, ...] = arrays,
            settings: dict[str, float] = settings,
            upstream: Array = upstream,
        ) -> float:
            return float(np.sum(op(*arrays, **settings)[0] * upstream))

        def gradients(
            op: ArrayOperation = op,
            arrays: tuple[Array, ...] = arrays,
            settings: dict[str, float] = settings,
            upstream: Array = upstream,
            names: tuple[str, ...] = signature.gradients,
            is_loss: bool = name == "cross_entropy",
        ) -> dict[str, Array]:
            backward = op(*arrays, **settings)[1]
            return dict(zip(names, backward(float(upstream[0]) if is_loss else upstream)))

        inputs = {gradient: arrays[place] for gradient, place in zip(signature.gradients, places)}
        yield check_gradients(name, inputs, value, gradients, rng, name not in SMOOTH)


def check_file_models(operations: OperationsFile, seed: int = 0) -> Iterator[CheckResult]:
    """Check the loss of whole models that use the operations of a file."""
    named = admit(operations)
    for case, config, _ in file_cases.models_of(operations, small_model()):
        if case not in file_cases.OPTIMIZERS:
            yield check_model(case, config, seed, operations=named)


def check_models(random_combinations: int = 50, seed: int = 0) -> Iterator[CheckResult]:
    """Check the loss of whole models, for each switch and for random combinations."""
    for name, config in [*single_switches(), *combinations(random_combinations, seed)]:
        yield check_model(name, config, seed)
    for term, coefficient in SOFTMAX_TERMS.items():
        yield check_model(f"{term} {coefficient}", small_model(), seed, **{term: coefficient})
    yield check_weighted_targets(seed)


def check_model(
    name: str,
    config: ModelConfig,
    seed: int = 0,
    operations: OperationsConfig | None = None,
    **terms: Any,
) -> CheckResult:
    """Check every element of every trained weight of a model with random weights.

    The batch has two sequences in two micro-batches, one masked target, and dropout if the config
    has it. `operations` are those of a file. `terms` are coefficients of auxiliary losses, by their
    names in OptimizerConfig.
    """
    rng = _generator(seed, name)
    engine, batch = _random_engine(config, rng, seed, operations, **terms)
    return check_engine(name, engine, batch, rng, kinks=has_kinks(config))


def check_weighted_targets(seed: int = 0) -> CheckResult:
    """Check a batch with weights of both signs: those of preference tuning."""
    name = "weighted targets"
    rng = _generator(seed, name)
    engine, batch = _random_engine(small_model(), rng, seed)
    weights = rng.standard_normal(batch.targets.shape)
    weighted, weight = batch._replace(weights=weights), 1 / batch.targets.size
    return check_gradients(
        name,
        engine.weights.arrays,
        lambda: weight * float(np.sum(weights * engine.losses(batch.tokens, batch.targets))),
        lambda: engine.gradients(weighted, weight),
        rng,
        kinks=False,
    )


def _random_engine(
    config: ModelConfig,
    rng: np.random.Generator,
    seed: int,
    operations: OperationsConfig | None = None,
    **terms: Any,
) -> tuple[NumpyEngine, Batch]:
    """A float64 engine with random weights, and the batch that check_model describes."""
    train = TrainConfig(batch_size=B, micro_batch_size=1, seed=seed)
    run = RunConfig(
        config,
        optimizer=OptimizerConfig(**(ROUTER_TERMS | terms)),
        train=train,
        operations=operations or OperationsConfig(),
    ).resolve()
    engine = NumpyEngine(run, V, threads=1, dtype=np.float64)
    # Larger weights than initial ones, so that attention and gates are far from their linear range.
    engine.load(
        (key, array + 0.3 * rng.standard_normal(array.shape))
        for key, array in initial_weights(engine.table, seed)
    )
    tokens, targets = rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T))
    targets[0, 2] = -1
    return engine, Batch(tokens, targets, step=3, rows=np.arange(B))


def has_kinks(config: ModelConfig) -> bool:
    """Whether the loss may have kinks: at zero of a ReLU, and at a tie of a router."""
    return config.feedforward not in SMOOTH or config.experts_per_token < config.n_experts


def check_engine(
    name: str,
    engine: NumpyEngine,
    batch: Batch,
    rng: np.random.Generator,
    kinks: bool,
    sample: int | None = None,
    only: str | None = None,
) -> CheckResult:
    """Check the trained weights of a float64 engine on a batch, or only the weight `only`."""
    weight = 1 / np.count_nonzero(batch.targets >= 0)
    return check_gradients(
        name,
        {
            name: engine.weights[name]
            for name, row in engine.table.items()
            if row.trained and only in (None, name)
        },
        lambda: objective(engine.forward(batch, weight)[0], engine.config),
        lambda: engine.gradients(batch, weight),
        rng,
        kinks,
        sample,
    )


def check_run(run: str, seed: int = 0, ops: str = "") -> Iterator[CheckResult]:
    """Check some elements of each weight of a trained model on two passages of its validation text.

    `run` is a folder or a name under ./runs, `ops` the file of its operations, or "recorded".
    """
    from glasslm.runs import checkpoint
    from glasslm.runs.protection import open_run
    from glasslm.runs.recorded_operations import admit_run_operations

    trained = open_run(run)
    config = admit_run_operations(trained, ops)
    dataset = trained.dataset(notify)
    width = min(RUN_TOKENS, trained.config.model.block_size)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(dataset.val.tokens) - width, B)
    text = read_windows(dataset.val.tokens, starts, width + 1)
    engine = NumpyEngine(
        config.resolve(), trained.tokenizer.vocab_size, threads=1, dtype=np.float64
    )
    best = checkpoint.load(trained.path, "best")
    engine.load(best.weights().items())
    batch = Batch(text[:, :-1], text[:, 1:], step=best.step, rows=np.arange(B))
    kinks = has_kinks(trained.config.model)
    for name in (name for name, row in engine.table.items() if row.trained):
        yield check_engine(name, engine, batch, rng, kinks, sample=RUN_ELEMENTS, only=name)


def _generator(seed: int, case: str) -> np.random.Generator:
    """A generator for each case, so that a new case does not change the numbers of the others."""
    return np.random.default_rng([seed, zlib.crc32(case.encode())])


def single_switches() -> Iterator[tuple[str, ModelConfig]]:
    """The names and configs of a small model and of its variants.

    There is a variant for each other value of each switch.
    """
    base = small_model()
    yield "the default switches", base
    for field, values in (SWITCHES | EXTRA_VALUES).items():
        for value in values:
            if getattr(base, field) != value:
                changes = REQUIRED_SETTINGS.get(field, {}) | {field: value}
                if changes.get("attention_pattern") == "nf":
                    changes["window"] = 0
                yield f"{field} {value}", dataclasses.replace(base, **changes)


def combinations(count: int, seed: int) -> Iterator[tuple[str, ModelConfig]]:
    """The names and configs of `count` different models, every switch drawn at random."""
    rng = np.random.default_rng(seed)
    drawn: set[ModelConfig] = set()
    while len(drawn) < count:
        choice = {field: values[rng.integers(len(values))] for field, values in SWITCHES.items()}
        # Without norms rounding grows from step to step. It is tested as a single switch only.
        if choice["norm"] == "none":
            continue
        factor = 1.0 if choice["rope_scaling"] == "none" else 2.0
        try:
            config = dataclasses.replace(small_model(), rope_factor=factor, **choice)
        except InputError:  # an invalid combination, such as scaled rope without rope
            continue
        if config not in drawn:
            drawn.add(config)
            yield describe_switches(choice), config


def describe_switches(choice: dict[str, Any]) -> str:
    """The switches as text: "layernorm post relu alibi, bias, n_kv_heads 2, n_layers 1"."""
    words = " ".join(value for value in choice.values() if isinstance(value, str))
    on = [field for field, value in choice.items() if value is True]
    numbers = [
        f"{field} {value}"
        for field, value in choice.items()
        if not isinstance(value, (str, bool)) and value
    ]
    return ", ".join([words, *on, *numbers])


def small_model() -> ModelConfig:
    """The config that all cases vary: two blocks of width 8, for T tokens."""
    return ModelConfig(
        d_model=8, n_layers=2, n_heads=4, d_ff=6, block_size=T + 1, lora_alpha=2.0,
        document_end_id=1,
    )  # fmt: skip


def _switches() -> dict[str, tuple[Any, ...]]:
    """The Literal and bool fields of ModelConfig with all their values, and some sizes."""
    switches: dict[str, tuple[Any, ...]] = {}
    for field, hint in get_type_hints(ModelConfig).items():
        if get_origin(hint) is Literal:
            switches[field] = get_args(hint)
        elif hint is bool and field not in EXTRA_VALUES:
            switches[field] = (False, True)
    return switches | {
        "n_kv_heads": (1, 2, 4),
        "head_dim": (0, 4),
        "partial_rotary_factor": (1.0, 1.0, 0.5),
        "attention_pattern": ("", "", "wf", "nf"),
        "attention_softcap": (0.0, 0.0, 2.0),
        "dropout": (0.0, 0.3),
        "attention_dropout": (0.0, 0.3),
        "n_layers": (1, 2),
        "window": (0, 2, 3),  # not 1: the gradients of queries and keys would be rounding alone
        "n_experts": (0, 0, 0, 4),  # a quarter of the combinations: experts have many weights
        "experts_per_token": (1, 2, 4),
        # A quarter of the combinations: beside an adapter other weights have no gradient.
        "lora_rank": (0, 0, 0, 2),
        "lora_targets": ("q,v", "k,o,up,down"),
    }


# Values that are tested by themselves, not in random combinations
EXTRA_VALUES: dict[str, tuple[Any, ...]] = {
    "norm_eps": (1e-2,),
    "rope_base": (10.0,),
    "bias_targets": ("q,k,v", "norm,o,mlp", "norm,q,k,v,o,mlp,head"),
    "attention_scale": (0.3,),
    "logit_softcap": (1.5,),
    "window_rope_base": (10.0,),
    "rope_original_context": (2,),
    "rope_low_rotations": (0.1,),
    "rope_high_rotations": (2.0,),
    "rope_attention_factor": (1.3,),
    "document_attention": (True,),
}
SWITCHES = _switches()
# Settings without which a switch has no effect
REQUIRED_SETTINGS: dict[str, dict[str, Any]] = {
    # With a head size of 2 there is one frequency, which most scalings keep.
    "rope_scaling": {"rope_factor": 2.0, "head_dim": 4},
    "partial_rotary_factor": {"head_dim": 4},
    "attention_pattern": {"window": 2},
    "bias_targets": {"norm": "layernorm", "tie_embeddings": False},
    "window_rope_base": {"attention_pattern": "wf", "window": 2},
    "rope_original_context": {"rope_scaling": "dynamic", "rope_factor": 2.0, "head_dim": 4},
    "rope_low_rotations": {"rope_scaling": "llama3", "rope_factor": 2.0, "head_dim": 4},
    "rope_high_rotations": {"rope_scaling": "llama3", "rope_factor": 2.0, "head_dim": 4},
    "rope_attention_factor": {"rope_scaling": "yarn", "rope_factor": 2.0, "head_dim": 4},
    "shared_expert": {"n_experts": 4},
    "experts_per_token": {"n_experts": 4},
    "lora_targets": {"lora_rank": 2},
}
