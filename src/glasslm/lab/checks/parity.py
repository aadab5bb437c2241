"""Compares the two engines: NumPy with gradients by hand, PyTorch with gradients by autograd.

For each model it compares the gradient of every weight, some optimizer steps, and the logits with
and without a cache. An error is relative to the largest entry of its tensor, or to 1e-3 of the
largest entry of the model if that is larger.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import (
    ModelConfig,
    OperationsConfig,
    OptimizerConfig,
    OptimizerName,
    RunConfig,
    TrainConfig,
)
from glasslm.data.token_file import read_windows
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.operations import OperationsFile, admit
from glasslm.engines.protocol import Batch, Engine, State
from glasslm.lab.checks import file_cases, gradient_check
from glasslm.lab.checks.finite_differences import SCALE_FLOOR
from glasslm.lab.short_training import mean_weight, train_steps
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.text import ignore_message, notify

if TYPE_CHECKING:
    from glasslm.engines.torch.engine import TorchEngine

Array = NDArray[Any]
Pair = tuple[NumpyEngine, "TorchEngine"]
ParityPrecision = Literal["fp64", "fp32"]
Column = Literal["gradients", "steps", "logits"]

ENGINE_NAMES = ("NumPy", "PyTorch")
COLUMNS: tuple[Column, ...] = get_args(Column)
TOLERANCE: dict[ParityPrecision, float] = {"fp64": 1e-10, "fp32": 1e-4}
STEPS = 10
# AdamW turns the rounding error of a gradient near zero into a part of a full step, and the next
# steps keep the difference. In float32 the steps are therefore small beside the weights, which are
# of size 1.
LR: dict[ParityPrecision, float] = {"fp64": 1e-3, "fp32": 3e-5}
# Wider heads than in gradient_check.py: qk-norm divides by the length of a head's vector, and the
# length of a vector with two elements can be near zero.
D, F = 32, 24  # width, inner width
B, T, V = 4, 11, 13  # rows, positions, vocabulary: T is prime and less than the context


class LocatedError(NamedTuple):
    """An error of a comparison, and the tensor or step that has it."""

    error: float
    where: str


@dataclass(frozen=True)
class Parity:
    """The largest errors between the two engines for one model."""

    case: str
    precision: ParityPrecision
    gradients: LocatedError
    steps: LocatedError
    logits: LocatedError

    @property
    def failed_columns(self) -> list[Column]:
        """The columns with an error above the tolerance, or NaN."""
        return [
            column
            for column in COLUMNS
            if not getattr(self, column).error <= TOLERANCE[self.precision]
        ]


def check_models(
    precision: ParityPrecision, random_combinations: int = 0, seed: int = 0
) -> Iterator[Parity]:
    """Compare the engines for each switch by itself and for random combinations of all switches."""
    for case, config in [
        *gradient_check.single_switches(),
        *gradient_check.combinations(random_combinations, seed),
    ]:
        sized = dataclasses.replace(config, d_model=D, d_ff=F, block_size=T + 1)
        yield check_model(case, sized, precision, seed)
    base = dataclasses.replace(gradient_check.small_model(), d_model=D, d_ff=F)
    yield check_model("weighted targets", base, precision, seed, has_weights=True)


def check_file_models(
    operations: OperationsFile, precision: ParityPrecision, seed: int = 0
) -> Iterator[Parity]:
    """Compare the engines for models that use the operations of a file."""
    named = admit(operations)
    for case, config, optimizer in file_cases.models_of(operations, gradient_check.small_model()):
        sized = dataclasses.replace(config, d_model=D, d_ff=F, block_size=T + 1)
        yield check_model(case, sized, precision, seed, (optimizer,), named)


def check_model(
    case: str,
    config: ModelConfig,
    precision: ParityPrecision,
    seed: int = 0,
    optimizers: tuple[OptimizerName, ...] = get_args(OptimizerName),
    operations: OperationsConfig | None = None,
    has_weights: bool = False,
) -> Parity:
    """Compare the engines for one model with random weights and every one of the optimizers.

    The batches have two micro-batches, one masked target, and dropout if the config has it. With
    `has_weights`, each target has a weight of either sign, as in preference tuning.
    """
    rng = np.random.default_rng([seed, *case.encode()])
    table = parameter_table(config.resolve(), V)
    weights = [
        (name, w + 0.3 * rng.standard_normal(w.shape)) for name, w in initial_weights(table, seed)
    ]
    batches = []
    for step in range(STEPS):
        tokens, targets = rng.integers(0, V, (2, B, T))
        targets[0, 2] = -1
        factors = rng.standard_normal((B, T)) if has_weights else None
        # Row 0 is elsewhere.
        batches.append(Batch(tokens, targets, step, np.arange(B) + 1, factors))
    train = TrainConfig(batch_size=B, micro_batch_size=B // 2, seed=seed)
    pairs = {
        name: make_pair(
            RunConfig(
                config,
                optimizer=optimizer_with_terms(name),
                train=train,
                operations=operations or OperationsConfig(),
            ),
            V,
            precision,
            weights,
        )
        for name in optimizers
    }
    first = next(iter(pairs.values()))
    gradients, logits = (
        compare_gradients(first, batches[0]),
        compare_logits(first, batches[1].tokens),
    )
    steps = [
        LocatedError(error, f"{name}, {where}")
        for name, pair in pairs.items()
        for error, where in [compare_steps(pair, batches, LR[precision])]
    ]
    return Parity(case, precision, gradients, largest_error(steps), logits)


def optimizer_with_terms(name: OptimizerName) -> OptimizerConfig:
    """The config of an optimizer; muon's also has all auxiliary losses and the weight average."""
    terms: dict[str, Any] = {**gradient_check.SOFTMAX_TERMS, "ema": 0.9} if name == "muon" else {}
    return OptimizerConfig(name, **(gradient_check.ROUTER_TERMS | terms))


def check_run(run: str, seed: int = 0, ops: str = "") -> Iterator[Parity]:
    """Compare the engines for a trained model, in both precisions.

    The batches are passages of its validation text. The optimizer steps start from the run's
    moments and use its optimizer, with the rates of LR. `run` is a folder or a name under ./runs.
    """
    from glasslm.runs import checkpoint
    from glasslm.runs.protection import open_run
    from glasslm.runs.recorded_operations import admit_run_operations

    trained = open_run(run)
    config = admit_run_operations(trained, ops, ignore_message)
    dataset = trained.dataset(notify)
    best = checkpoint.load(trained.path, "best")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(trained.config.train, batch_size=B, micro_batch_size=B // 2),
    )
    width = min(gradient_check.RUN_TOKENS, config.model.block_size)
    starts = np.random.default_rng(seed).integers(0, len(dataset.val.tokens) - width, (STEPS, B))
    texts = [read_windows(dataset.val.tokens, row, width + 1) for row in starts]
    batches = [
        Batch(text[:, :-1], text[:, 1:], best.step + i, np.arange(B))
        for i, text in enumerate(texts)
    ]
    for precision in get_args(ParityPrecision):
        pair = make_pair(
            config, trained.tokenizer.vocab_size, precision, best.state(), best.position.updates
        )
        gradients, logits = (
            compare_gradients(pair, batches[0]),
            compare_logits(pair, batches[1].tokens),
        )
        steps = compare_steps(pair, batches, LR[precision])
        yield Parity("the trained model", precision, gradients, steps, logits)


def make_pair(
    config: RunConfig, vocab_size: int, precision: ParityPrecision, state: State, updates: int = 0
) -> Pair:
    """Both engines on the CPU, with the same weights and moments."""
    from glasslm.engines.torch.engine import TorchEngine

    config, state = config.resolve(), list(state)
    pair = (
        NumpyEngine(
            config, vocab_size, threads=1, dtype=np.float64 if precision == "fp64" else np.float32
        ),
        TorchEngine(config, vocab_size, device="cpu", precision=precision, threads=1),
    )
    for engine in pair:
        engine.load(state, updates)
    return pair


# -- comparisons -----------------------------------------------------------------------------------


def compare_gradients(pair: Pair, batch: Batch) -> LocatedError:
    """The largest error of the gradient of any weight."""
    by_hand, by_autograd = (engine.gradients(batch, mean_weight(batch)) for engine in pair)
    return largest_error(tensor_errors(by_hand, by_autograd))


def compare_steps(pair: Pair, batches: Sequence[Batch], lr: float) -> LocatedError:
    """The largest error after one step on each batch.

    The errors are of losses, gradient norms, weights and moments.
    """
    errors: list[LocatedError] = []
    loops = [
        train_steps(engine, batches.__getitem__, lambda step: lr, len(batches)) for engine in pair
    ]
    for number, steps in enumerate(zip(*loops), 1):
        by_hand, by_autograd = (
            {"loss": losses.cross_entropy, **losses.auxiliary, "gradient norm": update.norm}
            for losses, update in steps
        )
        assert set(by_hand) == set(by_autograd), "one engine has a term that the other lacks"
        for name, value in by_hand.items():
            scale = abs(value)
            if name == "smoothing":  # a difference of two losses, which may pass through zero
                scale = max(scale, by_hand["loss"])
            error = max_relative_error(value, by_autograd[name], scale)
            errors.append(LocatedError(error, f"{name} of step {number}"))
    for tensors in zip(*(group_by_kind(engine.state()) for engine in pair)):
        errors += tensor_errors(*tensors)
    return largest_error(errors)


def group_by_kind(state: State) -> list[dict[str, Array]]:
    """Weights, first moments, second moments and so on, each by name.

    Entries of one kind have one size.
    """
    kinds: dict[str, dict[str, Array]] = {}
    for name, array in state:
        kinds.setdefault(name.rpartition("/")[0], {})[name] = array
    return [kinds[kind] for kind in sorted(kinds)]


def compare_logits(pair: Pair, tokens: Array) -> LocatedError:
    """The largest error of the logits of tokens (B, T).

    It compares the engines, and each engine with a cache against itself without one. Without a
    cache an engine returns losses instead of logits. Each loss depends on all logits of its
    position.
    """
    engines: tuple[Engine, ...] = pair
    targets = np.roll(tokens, 1, axis=1)  # arbitrary targets
    cached = [cached_logits(engine, tokens) for engine in engines]
    scale = np.abs(cached[0]["equal lengths"]).max()
    errors = [
        LocatedError(
            max_relative_error(cached[0][use], cached[1][use], scale),
            f"{use}, {ENGINE_NAMES[0]} against {ENGINE_NAMES[1]}",
        )
        for use in cached[0]
    ]
    for name, engine, logits_by_use in zip(ENGINE_NAMES, engines, cached):
        uncached = engine.losses(tokens, targets)
        for use, logits in logits_by_use.items():
            rows, positions = logits.shape[:2]  # the first rows, the last positions
            nats = cross_entropies(logits, targets[:rows, -positions:])
            error = max_relative_error(nats, uncached[:rows, -positions:], scale)
            errors.append(LocatedError(error, f"{use}, {name} with cache against without"))
    return largest_error(errors)


def cached_logits(engine: Engine, tokens: Array) -> dict[str, Array]:
    """The logits (rows, positions, V) of tokens (B, T), read into a cache in each of its uses.

    Those of the first rows and the last positions are returned.
    """
    B, T = tokens.shape
    ones = np.ones(B, np.int64)
    lengths = np.arange(B) % T
    cache = engine.new_cache(B, T)
    logits = {
        "equal lengths": read_in_portions(
            engine, cache, tokens, [ones * (T // 2), *[ones] * (T - T // 2)]
        ),
        "different lengths": read_in_portions(
            engine, engine.new_cache(B, T), tokens, [lengths, ones, T - 1 - lengths]
        ),
        "a single row": read_in_portions(
            engine, engine.new_cache(1, T), tokens[:1], [ones[:1]] * T
        ),
    }
    cache.clear(0)
    reread_logits = engine.logits(tokens, cache, T * (np.arange(B) == 0))
    return logits | {"a cleared row": reread_logits[:1, None]}


def read_in_portions(engine: Engine, cache: Any, tokens: Array, portions: Iterable[Array]) -> Array:
    """The logits (B, T, V) after every one of the tokens (B, T).

    Each portion (B,) is the number of tokens that are read next in each row.
    """
    parts: list[list[Array]] = [[] for _ in tokens]
    for counts in portions:
        if not counts.any():
            continue
        token_indices = cache.lengths[:, None] + np.arange(counts.max())
        token_indices = np.minimum(token_indices, tokens.shape[1] - 1)
        portion = np.take_along_axis(tokens, token_indices, 1)
        logits = engine.logits(portion, cache, counts, every=True)
        for row, count in enumerate(counts):
            parts[row].append(logits[row, :count])
    return np.stack([np.concatenate(row) for row in parts])


def cross_entropies(logits: Array, targets: Array) -> Array:
    """logits (B, T, V), targets (B, T) -> nats (B, T), in float64."""
    logits64 = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        logits64 -= logits64.max(-1, keepdims=True)
    hit = np.take_along_axis(logits64, targets[..., None], -1)[..., 0]
    return np.log(np.exp(logits64).sum(-1)) - hit


# -- errors ----------------------------------------------------------------------------------------


def tensor_errors(a: Mapping[str, Array], b: Mapping[str, Array]) -> list[LocatedError]:
    """The error of each tensor of any shape, relative to its largest entry.

    The scale is at least SCALE_FLOOR x the largest entry of all tensors.
    """
    assert set(a) == set(b), "one engine has a tensor that the other lacks"
    scales = {name: np.maximum(np.abs(a[name]).max(), np.abs(b[name]).max()) for name in a}
    min_scale = SCALE_FLOOR * np.fmax.reduce(list(scales.values()))  # fmax ignores a NaN
    scales = {name: np.maximum(scale, min_scale) for name, scale in scales.items()}
    return [LocatedError(max_relative_error(a[name], b[name], scales[name]), name) for name in a]


def max_relative_error(a: Array | float, b: Array | float, scale: Any) -> float:
    """max |a - b| / scale of numbers or of arrays of one shape.

    The error is NaN if a value is not finite, and 0 if all are 0.
    """
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return float(
            np.abs(np.subtract(a, b, dtype=np.float64)).max()
            / np.maximum(scale, np.finfo(np.float64).tiny)
        )


def largest_error(errors: Iterable[LocatedError]) -> LocatedError:
    """The largest of the errors; NaN counts as the largest."""
    return max(errors, key=lambda item: math.inf if math.isnan(item.error) else item.error)
