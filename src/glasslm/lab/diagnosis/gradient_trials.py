"""The recipes of the stability cookbook, and the trial of a recipe with one seed.

A trial trains a small model with AdamW for a few steps. A recipe differs from the default one only
in the fields that it sets: the first weights and the batches are the same. A trial ends at the
first non-finite loss or gradient. L layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
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
from glasslm.data.dataset import Dataset
from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.engines.protocol import Batch, Engine
from glasslm.inference import evaluation
from glasslm.lab.diagnosis import trials
from glasslm.lab.diagnosis.measurements import l2_norm
from glasslm.lab.short_training import sampled_batches, train_steps
from glasslm.model.parameters import ParameterTable, initial_weights, parameter_table
from glasslm.training.learning_rate import lr_at

Array = NDArray[Any]
InitScheme = Literal["scaled", "plain", "xavier", "he", "unit"]

STEPS, ROWS, WIDTH, BLOCK, LAYERS = 120, 8, 64, 64, 4
BASE_LR = 3e-3  # the best of 1e-3, 3e-3 and 1e-2 for this model with AdamW
WARMUP_SHARE = 0.1  # of the steps
VAL_WINDOWS = 128

# float16 has 10 bits of fraction and exponents from -14 to 15 (IEEE 754-2019, table 3.5). It rounds
# to 0 what is below half of its smallest number.
FP16_MAX, FP16_MIN_NORMAL, FP16_MIN = 65504.0, 2.0**-14, 2.0**-24
LOSS_SCALE = 2.0**16
# Tokens in a batch of GPT-3's 125M model (arXiv:2005.14165, table 2.1), and of nanoGPT
LARGE_BATCH = 2.0**19
EXPONENT_EDGES = np.arange(-48, 17)  # of the histogram of magnitudes
# An engine chooses its own loss scale where 1 is given, and keeps any other: this is the smallest
# that it keeps.
NO_LOSS_SCALE = math.nextafter(1.0, 2.0)


@dataclass(frozen=True)
class Recipe:
    """A training recipe. The defaults use every trick of stability."""

    norm: Norm = "rmsnorm"
    norm_position: NormPosition = "pre"
    n_layers: int = LAYERS
    init: InitScheme = "scaled"
    rate: float = 1.0  # times BASE_LR
    warmup: bool = True
    cosine: bool = True
    clip: bool = True

    def config(self, steps: int, seed: int) -> RunConfig:
        """The config of a run with this recipe."""
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
                lr=self.rate * BASE_LR,
                warmup_steps=max(1, round(WARMUP_SHARE * steps)) if self.warmup else 0,
                schedule="cosine" if self.cosine else "constant",
                grad_clip=1.0 if self.clip else 0.0,
            ),
            train=TrainConfig(batch_size=ROWS, max_steps=steps, seed=seed),
        ).resolve()


class GradientSnapshot(NamedTuple):
    """The gradients of one batch at one step of a trial."""

    step: int
    norms: Array  # (L,) L2 norm of the gradient of each block's weights
    magnitudes: (
        Array  # (len(EXPONENT_EDGES) - 1,) elements of the stream's gradients in each power of two
    )
    # Shares of the stream's nonzero gradients that become 0 in float16:
    underflow: float
    underflow_scaled: float  # multiplied by LOSS_SCALE
    underflow_large: float  # in a batch of LARGE_BATCH tokens
    underflow_large_scaled: float


class Trial(NamedTuple):
    """The result of a recipe with one seed."""

    losses: list[float]  # nats per token of each step's batch, before its update
    val_loss: float  # nats per token at the end; infinite if training diverged
    snapshots: list[GradientSnapshot]

    @property
    def diverged(self) -> bool:
        """Whether training ended with a non-finite loss or gradient."""
        return not math.isfinite(self.val_loss)


def scaled_initial_weights(
    table: ParameterTable, init: InitScheme, seed: int
) -> Iterator[tuple[str, Array]]:
    """The weights of `initial_weights`, with matrices (out, in) scaled by the scheme.

    scaled: the table's own, 0.02, and 0.02 / sqrt(2 L) for matrices that write into the residual
    stream (GPT-2, section 2.3). plain: 0.02. xavier: sqrt(2 / (in + out)) (Glorot and Bengio 2010,
    equation 12). he: sqrt(2 / in) (arXiv:1502.01852, equation 10). unit: 1.
    """
    for name, array in initial_weights(table, seed):
        std = table[name].std
        if init == "scaled" or std is None:
            yield name, array
        else:
            yield name, array * np.float32(init_std(init, *table[name].shape) / std)


def init_std(init: InitScheme, out_features: int, in_features: int) -> float:
    """The standard deviation of a matrix in a scheme that does not depend on the model."""
    if init == "xavier":
        return math.sqrt(2 / (in_features + out_features))
    if init == "he":
        return math.sqrt(2 / in_features)
    return {"plain": 0.02, "unit": 1.0}[init]


def run_trial(
    dataset: Dataset,
    compute: ComputeConfig,
    recipe: Recipe,
    steps: int,
    seed: int,
    tokens_in_batch: float = ROWS * BLOCK,
    loss_scale: float = 1.0,
) -> Trial:
    """Train a small model by a recipe, on an engine of its own.

    The gradients are as small as in a mean over `tokens_in_batch` tokens. That hardly affects
    AdamW, but it makes float16 gradients underflow. A `loss_scale` above 1 is the first one of
    float16; with 1 the engine chooses.
    """
    config, vocab_size = recipe.config(steps, seed), dataset.tokenizer.vocab_size
    table = parameter_table(config.model, vocab_size)
    batch_of = sampled_batches(dataset, BLOCK, ROWS, seed)
    share = ROWS * BLOCK / tokens_in_batch
    trial = Trial([], math.inf, [])

    def rate_of(step: int) -> float:
        return lr_at(step, config.optimizer, steps)

    with warnings.catch_warnings():
        # Bad recipes overflow.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"glasslm\.engines")
        engine = trials.engine_maker(vocab_size, compute)(config)
        engine.load(scaled_initial_weights(table, recipe.init, seed), loss_scale=loss_scale)

        def add_snapshot(step: int) -> None:
            trial.snapshots.append(take_snapshot(engine, batch_of(step), config.model, table))

        add_snapshot(0)
        loop = train_steps(engine, batch_of, rate_of, steps, weight=1 / tokens_in_batch)
        for step, (losses, update) in enumerate(loop, 1):
            trial.losses.append(losses.cross_entropy / share)
            if not (update.finite and math.isfinite(trial.losses[-1])):
                return trial
            if step in (steps // 10, steps // 2) or step == steps:
                add_snapshot(step)
        return trial._replace(val_loss=_validation_loss(engine, dataset))


def _validation_loss(engine: Engine, dataset: Dataset) -> float:
    """Nats per token of the validation text; infinite if not finite."""
    lengths = dataset.tokenizer.scored_bytes
    score = evaluation.evaluate(
        engine, dataset.val.tokens, lengths, BLOCK, rows=ROWS, max_windows=VAL_WINDOWS
    )
    return score.loss if math.isfinite(score.loss) else math.inf


def unigram_loss(dataset: Dataset) -> float:
    """Nats per token of the validation text by the token frequencies of the training text."""
    counts = np.bincount(dataset.train.tokens[:], minlength=dataset.tokenizer.vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[dataset.val.tokens[:]].mean())


def take_snapshot(
    engine: Engine, batch: Batch, c: ModelConfig, table: ParameterTable
) -> GradientSnapshot:
    """The gradients of a batch by block and by magnitude, before any update."""
    weights = [
        [f"{GRADIENT_PREFIX}{name}" for name in table if name.startswith(f"blocks.{i}.")]
        for i in range(c.n_layers)
    ]
    streams = [f"{GRADIENT_PREFIX}blocks.{i}" for i in range(c.n_layers)]
    arrays = engine.inspect(batch, [name for block in (*weights, streams) for name in block])
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.array([l2_norm(*(arrays[name] for name in block)) for block in weights])
    stream = np.concatenate([arrays[name].ravel() for name in streams])
    of_large_batch = stream * np.float32(batch.tokens.size / LARGE_BATCH)
    shares = [
        underflow_share(gradients, scale)
        for gradients in (stream, of_large_batch)
        for scale in (1.0, LOSS_SCALE)
    ]
    return GradientSnapshot(batch.step, norms, magnitude_histogram(stream), *shares)


def underflow_share(gradients: Array, scale: float) -> float:
    """The share of the nonzero gradients (n,) that become 0 in float16, multiplied by `scale`."""
    with np.errstate(over="ignore", invalid="ignore"):
        float16 = (gradients * np.float32(scale)).astype(np.float16)
    nonzero = gradients != 0
    return float((float16[nonzero] == 0).mean()) if nonzero.any() else 0.0


def magnitude_histogram(values: Array) -> Array:
    """(len(EXPONENT_EDGES) - 1,) the number of values (n,) in each power of two.

    Zeros and non-finite values are not counted.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)]).astype(np.float64)
    return np.histogram(np.log2(sizes), EXPONENT_EDGES)[0]


def first_to_last_ratio(seeds: Sequence[Trial], snapshot: int) -> float:
    """The gradient norm of the first block over that of the last, the median over seeds.

    `snapshot` is the index of a snapshot. Diverged trials count only at the first one. NaN if no
    trial has a ratio.
    """
    snapshots = [
        trial.snapshots[snapshot]
        for trial in seeds
        if trial.snapshots and (snapshot == 0 or not trial.diverged)
    ]
    ratios = [item.norms[0] / item.norms[-1] for item in snapshots if item.norms[-1] > 0]
    return float(np.median(ratios)) if ratios else math.nan
