"""The recipes of the stability cookbook, and how one of them is tried: a small model, AdamW, a few steps, one seed.

Every recipe differs from the good one by what it names and by nothing else: same weights to begin with, same batches.
A run whose numbers are no longer finite ends there, and that is its outcome. L layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import (
    ComputeConfig,
    ModelConfig,
    Norm,
    NormPosition,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.data.batch_sampler import Order
from glasslm.data.shards import Dataset
from glasslm.engines.inspection import GRADIENT
from glasslm.engines.protocol import Batch, Engine
from glasslm.inference import evaluation
from glasslm.lab.diagnosis import trials
from glasslm.model.parameters import ParameterTable, initial_weights, parameter_table
from glasslm.training.learning_rate import lr_at

Array = NDArray[Any]
Start = Literal["scaled", "plain", "xavier", "he", "unit"]

STEPS, ROWS, WIDTH, BLOCK, LAYERS = 120, 8, 64, 64, 4
RATE = 3e-3  # AdamW's best for this model among 1e-3, 3e-3 and 1e-2
WARMUP = 0.1  # share of the steps
VAL_WINDOWS = 128  # always the same

# float16: 10 bits of fraction, exponents -14 to 15 (IEEE 754-2019, table 3.5); below SMALLEST / 2 all is rounded to 0
LARGEST, NORMAL, SMALLEST = 65504.0, 2.0**-14, 2.0**-24
LOSS_SCALE = 2.0**16
LARGE_BATCH = (
    2.0**19
)  # tokens: GPT-3's for its 125M model (arXiv:2005.14165, table 2.1), and nanoGPT's
EXPONENTS = np.arange(-48, 17)  # edges of the bins that magnitudes are counted in
UNSCALED = math.nextafter(
    1.0, 2.0
)  # the least loss scale that an engine takes for a given one, and never changes


@dataclass(frozen=True)
class Recipe:
    """All tricks of stability, unless it says otherwise."""

    norm: Norm = "rmsnorm"
    norm_position: NormPosition = "pre"
    n_layers: int = LAYERS
    start: Start = "scaled"
    rate: float = 1.0  # times RATE
    warmup: bool = True
    cosine: bool = True
    clip: bool = True

    def config(self, steps: int, seed: int) -> RunConfig:
        """The run that it describes."""
        return RunConfig(
            model=ModelConfig(
                d_model=WIDTH,
                n_layers=self.n_layers,
                block_size=BLOCK,
                norm=self.norm,
                norm_position=self.norm_position,
            ),
            optimizer=OptimizerConfig(
                optimizer="adamw",
                lr=self.rate * RATE,
                warmup_steps=max(1, round(WARMUP * steps)) if self.warmup else 0,
                schedule="cosine" if self.cosine else "constant",
                grad_clip=1.0 if self.clip else 0.0,
            ),
            train=TrainConfig(batch_size=ROWS, max_steps=steps, seed=seed),
        ).resolved()


class Look(NamedTuple):
    """The gradients of one batch, at one moment of a run."""

    step: int
    norms: Array  # (L,) L2 norm of the gradient of each block's weights
    magnitudes: Array  # (len(EXPONENTS) - 1,) how many elements of the stream's gradients lie in each power of two
    lost: float  # share of the stream's nonzero gradients that float16 makes 0
    lost_scaled: float  # likewise, of LOSS_SCALE times each
    lost_large: float  # likewise unscaled, in a batch of LARGE_BATCH tokens
    lost_large_scaled: float


class Trial(NamedTuple):
    """What came of a recipe with one seed."""

    losses: list[float]  # nats per token of each step's batch, before its update
    val_loss: float  # nats per token at the end; infinite if it diverged
    looks: list[Look]

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.val_loss)


def started(rows: ParameterTable, start: Start, seed: int) -> Iterator[tuple[str, Array]]:
    """First weights: those of `initial_weights`, each matrix (out, in) with the deviation that `start` asks for.

    scaled is the table's own: 0.02, and 0.02 / sqrt(2 L) for what writes into the residual stream (GPT-2, section 2.3);
    plain 0.02 throughout; xavier sqrt(2 / (in + out)) (Glorot and Bengio 2010, equation 12); he sqrt(2 / in)
    (arXiv:1502.01852, equation 10); unit 1.
    """
    for name, array in initial_weights(rows, seed):
        std = rows[name].std
        if start == "scaled" or std is None:
            yield name, array
        else:
            yield name, array * np.float32(deviation(start, *rows[name].shape) / std)


def deviation(start: Start, out: int, into: int) -> float:
    """The standard deviation of a matrix that does not depend on the model."""
    if start == "xavier":
        return math.sqrt(2 / (into + out))
    if start == "he":
        return math.sqrt(2 / into)
    return {"plain": 0.02, "unit": 1.0}[start]


def attempt(
    dataset: Dataset,
    compute: ComputeConfig,
    recipe: Recipe,
    steps: int,
    seed: int,
    tokens_in_batch: float = ROWS * BLOCK,
    loss_scale: float = 1.0,
) -> Trial:
    """Train by a recipe, on an engine of its own.

    With `tokens_in_batch` gradients are as small as in a mean over that many, which AdamW does not mind and float16
    does. A `loss_scale` above 1 is where float16's begins; 1 leaves it to the engine.
    """
    config, vocab_size = recipe.config(steps, seed), dataset.tokenizer.vocab_size
    rows = parameter_table(config.model, vocab_size)
    order = Order(len(dataset.train.tokens), BLOCK, ROWS, seed, epochs=False)
    share = ROWS * BLOCK / tokens_in_batch
    trial = Trial([], math.inf, [])

    def batch_at(step: int) -> Batch:
        return Batch(
            *order.batch(dataset.train.tokens, step, np.arange(ROWS)), step, np.arange(ROWS)
        )

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=RuntimeWarning, module=r"glasslm\.engines"
        )  # some will overflow
        engine = trials.maker(vocab_size, compute)(config)
        engine.load(started(rows, recipe.start, seed), loss_scale=loss_scale)
        for step in range(steps):
            batch = batch_at(step)
            if step in (0, steps // 10, steps // 2):
                trial.looks.append(look(engine, batch, config.model, rows))
            loss = engine.accumulate(batch, 1 / tokens_in_batch).cross_entropy / share
            trial.losses.append(loss)
            if not (
                engine.update(lr_at(step, config.optimizer, steps)).finite and math.isfinite(loss)
            ):
                return trial
        trial.looks.append(look(engine, batch_at(steps), config.model, rows))
        return trial._replace(val_loss=_validate(engine, dataset))


def _validate(engine: Engine, dataset: Dataset) -> float:
    lengths = dataset.tokenizer.byte_lengths
    score = evaluation.evaluate(
        engine, dataset.val.tokens, lengths, BLOCK, rows=ROWS, max_windows=VAL_WINDOWS
    )
    return score.loss if math.isfinite(score.loss) else math.inf


def unigram_loss(dataset: Dataset) -> float:
    """Nats per token of the validation text by the frequencies of the training text: what knows no context gets."""
    counts = np.bincount(dataset.train.tokens, minlength=dataset.tokenizer.vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[dataset.val.tokens].mean())


def look(engine: Engine, batch: Batch, c: ModelConfig, rows: ParameterTable) -> Look:
    """What the gradients of a batch are like: by block, and by magnitude."""
    weights = [
        [f"{GRADIENT}{name}" for name in rows if name.startswith(f"blocks.{i}.")]
        for i in range(c.n_layers)
    ]
    streams = [f"{GRADIENT}blocks.{i}" for i in range(c.n_layers)]
    seen = engine.inspect(batch, [name for block in (*weights, streams) for name in block])
    norms = np.array([norm(seen[name] for name in block) for block in weights])
    stream = np.concatenate([seen[name].ravel() for name in streams])
    larger = stream * np.float32(batch.tokens.size / LARGE_BATCH)
    shares = [
        lost(gradients, scale) for gradients in (stream, larger) for scale in (1.0, LOSS_SCALE)
    ]
    return Look(batch.step, norms, histogram(stream), *shares)


def norm(arrays: Iterable[Array]) -> float:
    """The L2 norm of all of them together, in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))


def lost(gradients: Array, scale: float) -> float:
    """The share of the nonzero `gradients` (n,) that become 0 as float16 after they were multiplied by `scale`."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = (gradients * np.float32(scale)).astype(np.float16)
    there = gradients != 0
    return float((narrow[there] == 0).mean()) if there.any() else 0.0


def histogram(values: Array) -> Array:
    """(len(EXPONENTS) - 1,) how many of the finite, nonzero `values` (n,) have a magnitude in each power of two."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)]).astype(np.float64)
    return np.histogram(np.log2(sizes), EXPONENTS)[0]


def ratio(trials_of_one: Sequence[Trial], at: int) -> float:
    """Gradient norm of the first block over that of the last, at a look of those that came so far; their median."""
    looks = [one.looks[at] for one in trials_of_one if one.looks and (at == 0 or not one.diverged)]
    ratios = [look.norms[0] / look.norms[-1] for look in looks if look.norms[-1] > 0]
    return float(np.median(ratios)) if ratios else math.nan
