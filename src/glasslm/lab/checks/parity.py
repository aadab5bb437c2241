"""Engine against engine: what NumPy computes by hand, PyTorch computes by autograd, and the two must be equal.

For one model after the other: the gradient of every weight, some optimizer steps of the one against as many of the
other, and the logits with and without a cache. An error is relative to the largest entry of its tensor, or to 1e-3 of
the largest in the model where that is more.
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
    OptimizerConfig,
    OptimizerName,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch, Engine, State
from glasslm.lab.checks import gradient_check
from glasslm.lab.checks.finite_differences import FLOOR
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.text import tell

if TYPE_CHECKING:
    from glasslm.engines.torch.engine import TorchEngine

Array = NDArray[Any]
Pair = tuple[NumpyEngine, "TorchEngine"]
Exactness = Literal["fp64", "fp32"]
Column = Literal["gradients", "steps", "logits"]

NAMES = ("NumPy", "PyTorch")
COLUMNS: tuple[Column, ...] = get_args(Column)
TOLERANCE: dict[Exactness, float] = {"fp64": 1e-10, "fp32": 1e-4}
STEPS = 10
# AdamW makes a share of a whole step out of the rounding of a gradient next to zero, and what differs is carried into
# the next step: for float32, steps are small beside the weights, which are of size 1.
LR: dict[Exactness, float] = {"fp64": 1e-3, "fp32": 3e-5}
# Wider heads than in check.py: qk-norm divides by the length of a head's vector, and of two numbers both can be small.
D, F = 32, 24  # width, inner width
B, T, V = (
    4,
    11,
    13,
)  # rows, positions, vocabulary: T is not the whole context, nor a multiple of anything


class Worst(NamedTuple):
    """The largest error of a comparison, and what has it."""

    error: float
    where: str


@dataclass(frozen=True)
class Parity:
    """How far apart the two engines are for one model."""

    case: str
    precision: Exactness
    gradients: Worst
    steps: Worst
    logits: Worst

    @property
    def wrong(self) -> list[Column]:
        """The columns that are out of tolerance; a NaN is."""
        return [
            column
            for column in COLUMNS
            if not getattr(self, column).error <= TOLERANCE[self.precision]
        ]


def check_models(
    precision: Exactness, random_combinations: int = 0, seed: int = 0
) -> Iterator[Parity]:
    """Each switch by itself, as in check.py, and random combinations of all."""
    for case, config in [
        *gradient_check.single_switches(),
        *gradient_check.combinations(random_combinations, seed),
    ]:
        sized = dataclasses.replace(config, d_model=D, d_ff=F, block_size=T + 1)
        yield check_model(case, sized, precision, seed)


def check_model(case: str, config: ModelConfig, precision: Exactness, seed: int = 0) -> Parity:
    """A model far from its start, with every optimizer, in two micro-batches, one target masked, dropout as it says."""
    rng = np.random.default_rng([seed, *case.encode()])
    rows = parameter_table(config.resolved(), V)
    weights = [
        (name, w + 0.3 * rng.standard_normal(w.shape)) for name, w in initial_weights(rows, seed)
    ]
    batches = []
    for step in range(STEPS):
        tokens, targets = rng.integers(0, V, (2, B, T))
        targets[0, 2] = -1
        batches.append(
            Batch(tokens, targets, step, rows=np.arange(B) + 1)
        )  # not the first of their step
    train = TrainConfig(batch_size=B, micro_batch_size=B // 2, seed=seed)
    pairs = {
        name: make_pair(
            RunConfig(config, optimizer=with_terms(name), train=train), V, precision, weights
        )
        for name in get_args(OptimizerName)
    }
    first = next(iter(pairs.values()))
    gradients, logits = (
        compare_gradients(first, batches[0]),
        compare_logits(first, batches[1].tokens),
    )
    steps = [
        Worst(error, f"{name}, {where}")
        for name, pair in pairs.items()
        for error, where in [compare_steps(pair, batches, LR[precision])]
    ]
    return Parity(case, precision, gradients, largest(steps), logits)


def with_terms(name: OptimizerName) -> OptimizerConfig:
    """One of the optimizers has all that may be minimised, and kept, beside; the others do without."""
    terms: dict[str, Any] = {**gradient_check.SOFTMAX_TERMS, "ema": 0.9} if name == "muon" else {}
    return OptimizerConfig(name, **(gradient_check.ROUTER_TERMS | terms))


def check_run(run: str, seed: int = 0) -> Iterator[Parity]:
    """A trained model on passages of its validation text, in both precisions: as it is, and some steps further.

    The steps go on from its moments with its own optimizer, but for the rate.
    """
    from glasslm.data import shards
    from glasslm.runs import checkpoint, run_folder

    found = run_folder.Run(run_folder.find(run))
    dataset = shards.of_run(found.config.data, found.record["data"], found.tokenizer, tell)
    held = checkpoint.load(found.path, "best")
    config = dataclasses.replace(
        found.config,
        train=dataclasses.replace(found.config.train, batch_size=B, micro_batch_size=B // 2),
    )
    width = min(gradient_check.RUN_TOKENS, config.model.block_size)
    starts = np.random.default_rng(seed).integers(0, len(dataset.val.tokens) - width, (STEPS, B))
    texts = dataset.val.tokens[starts[..., None] + np.arange(width + 1)].astype(np.int64)
    batches = [
        Batch(text[:, :-1], text[:, 1:], held.step + i, np.arange(B))
        for i, text in enumerate(texts)
    ]
    for precision in get_args(Exactness):
        pair = make_pair(
            config, found.tokenizer.vocab_size, precision, held.state(), held.progress.updates
        )
        gradients, logits = (
            compare_gradients(pair, batches[0]),
            compare_logits(pair, batches[1].tokens),
        )
        steps = compare_steps(pair, batches, LR[precision])
        yield Parity("the trained model", precision, gradients, steps, logits)


def make_pair(
    config: RunConfig, vocab_size: int, precision: Exactness, state: State, updates: int = 0
) -> Pair:
    """Both engines, on the CPU, with the same weights and moments."""
    from glasslm.engines.torch.engine import TorchEngine

    config, state = config.resolved(), list(state)
    pair = (
        NumpyEngine(
            config, vocab_size, threads=1, dtype=np.float64 if precision == "fp64" else np.float32
        ),
        TorchEngine(config, vocab_size, device="cpu", precision=precision, threads=1),
    )
    for engine in pair:
        engine.load(state, updates)
    return pair


# -- what is compared -------------------------------------------------------------------------------------------------


def compare_gradients(pair: Pair, batch: Batch) -> Worst:
    """The gradient of every weight."""
    by_hand, by_autograd = (engine.gradients(batch, mean_weight(batch)) for engine in pair)
    return largest(differences(by_hand, by_autograd))


def compare_steps(pair: Pair, batches: Sequence[Batch], lr: float) -> Worst:
    """A step for each batch: its loss, its gradient's norm, and in the end weights and moments."""
    found: list[Worst] = []
    for number, batch in enumerate(batches, 1):
        told = []
        for engine in pair:
            losses = engine.accumulate(batch, mean_weight(batch))
            told.append(
                {
                    "loss": losses.cross_entropy,
                    **losses.auxiliary,
                    "gradient norm": engine.update(lr).norm,
                }
            )
        assert set(told[0]) == set(told[1]), "one engine has a term that the other lacks"
        for what, by_hand in told[0].items():
            by_autograd = told[1][what]
            scale = abs(by_hand)
            if what == "smoothing":  # a difference of two losses, which may pass through zero
                scale = max(scale, told[0]["loss"])
            found.append(Worst(relative(by_hand, by_autograd, scale), f"{what} of step {number}"))
    for of_kind in zip(*(by_kind(engine.state()) for engine in pair)):
        found += differences(*of_kind)
    return largest(found)


def by_kind(state: State) -> list[dict[str, Array]]:
    """Weights, first moments, second moments and so on, each by name: what is of one size."""
    kinds: dict[str, dict[str, Array]] = {}
    for name, array in state:
        kinds.setdefault(name.rpartition("/")[0], {})[name] = array
    return [kinds[kind] for kind in sorted(kinds)]


def compare_logits(pair: Pair, tokens: Array) -> Worst:
    """Logits through the cache of the one against those of the other, and of each against its passes without a cache.

    Without a cache an engine tells no logits but losses, and these depend on all logits of their position.
    """
    engines: tuple[Engine, ...] = pair
    targets = np.roll(tokens, 1, axis=1)  # any will do
    cached = [through_cache(engine, tokens) for engine in engines]
    scale = np.abs(cached[0]["rows alike"]).max()
    found = [
        Worst(
            relative(cached[0][how], cached[1][how], scale), f"{how}, {NAMES[0]} against {NAMES[1]}"
        )
        for how in cached[0]
    ]
    for name, engine, readings in zip(NAMES, engines, cached):
        uncached = engine.losses(tokens, targets)
        for how, logits in readings.items():
            rows, positions = logits.shape[:2]  # the first rows, the last positions
            nats = losses_of(logits, targets[:rows, -positions:])
            error = relative(nats, uncached[:rows, -positions:], scale)
            found.append(Worst(error, f"{how}, {name} with cache against without"))
    return largest(found)


def through_cache(engine: Engine, tokens: Array) -> dict[str, Array]:
    """The logits (rows, positions, V) of tokens (B, T), read into a cache in all the ways in which it is used.

    These are the logits of the first rows and the last positions.
    """
    B, T = tokens.shape
    one = np.ones(B, np.int64)
    apart = np.arange(B) % T
    cache = engine.new_cache(B, T)
    read = {
        "rows alike": read_portions(engine, cache, tokens, [one * (T // 2), *[one] * (T - T // 2)]),
        "rows apart": read_portions(
            engine, engine.new_cache(B, T), tokens, [apart, one, T - 1 - apart]
        ),
        "one row": read_portions(engine, engine.new_cache(1, T), tokens[:1], [one[:1]] * T),
    }
    cache.clear(0)
    again = engine.logits(tokens, cache, T * (np.arange(B) == 0))
    return read | {"a row read again": again[:1, None]}


def read_portions(engine: Engine, cache: Any, tokens: Array, portions: Iterable[Array]) -> Array:
    """(B, T, V) the logits after every token, of which each portion (B,) says how many are read next in each row."""
    parts: list[list[Array]] = [[] for _ in tokens]
    for counts in portions:
        if not counts.any():
            continue
        wanted = np.minimum(cache.lengths[:, None] + np.arange(counts.max()), tokens.shape[1] - 1)
        logits = engine.logits(np.take_along_axis(tokens, wanted, 1), cache, counts, every=True)
        for row, count in enumerate(counts):
            parts[row].append(logits[row, :count])
    return np.stack([np.concatenate(row) for row in parts])


def losses_of(logits: Array, targets: Array) -> Array:
    """logits (B, T, V), targets (B, T) -> nats (B, T)."""
    exact = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        exact -= exact.max(-1, keepdims=True)
    hit = np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    return np.log(np.exp(exact).sum(-1)) - hit


def mean_weight(batch: Batch) -> float:
    return 1 / int(np.count_nonzero(batch.targets >= 0))


# -- how far apart ----------------------------------------------------------------------------------------------------


def differences(a: Mapping[str, Array], b: Mapping[str, Array]) -> list[Worst]:
    """The error of each tensor, relative to its largest entry, but to no less than FLOOR x the largest of all."""
    assert set(a) == set(b), "one engine has what the other lacks"
    scales = {name: np.maximum(np.abs(a[name]).max(), np.abs(b[name]).max()) for name in a}
    least = FLOOR * np.fmax.reduce(list(scales.values()))  # which one NaN does not spoil
    return [Worst(relative(a[name], b[name], np.maximum(scales[name], least)), name) for name in a]


def relative(a: Array | float, b: Array | float, scale: Any) -> float:
    """max |a - b| / scale, and NaN where anything is not finite; 0 where all is 0."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return float(
            np.abs(np.subtract(a, b, dtype=np.float64)).max()
            / np.maximum(scale, np.finfo(np.float64).tiny)
        )


def largest(found: Iterable[Worst]) -> Worst:
    """The worst of them; a NaN is worse than any number."""
    return max(found, key=lambda one: math.inf if math.isnan(one.error) else one.error)
