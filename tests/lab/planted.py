"""Small subjects for a diagnosis, and engines with a fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, DataConfig, RunConfig
from glasslm.data.dataset import Dataset, prepare_dataset
from glasslm.data.sources import corpora
from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.engines.protocol import Batch, Engine, Update
from glasslm.lab.diagnosis.diagnosis_input import DiagnosisInput
from glasslm.lab.diagnosis.trials import TrialSetup
from glasslm.model.parameters import initial_weights, parameter_table
from small_runs import ignore_message, write_text

Array = NDArray[Any]
SIZES: dict[str, Any] = {
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 3,
    "block_size": 32,
    "batch_size": 8,
}
# The presets' shapes and recipes, cut down; their warmup in proportion to fewer steps.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny", SIZES | {"warmup_steps": 20}),
    "tiny by adamw": ("tiny", SIZES | {"warmup_steps": 20, "optimizer": "adamw", "lr": 3e-3}),
    "nanogpt": ("nanogpt", SIZES | {"n_layers": 3, "warmup_steps": 10}),
    "capstone": ("capstone", SIZES | {"n_layers": 4, "d_ff": 192, "warmup_steps": 20}),
}


def compute(engine: str = "numpy") -> ComputeConfig:
    return ComputeConfig(engine=engine, threads=1)  # type: ignore[arg-type]


def config_of(shape: str = "tiny", **flags: Any) -> RunConfig:
    preset, sizes = SHAPES[shape]
    return with_flags(PRESETS[preset](), {"max_steps": 80} | sizes | flags).resolve()


@cache
def dataset_in(folder: Path) -> Dataset:
    """60 kB of a grammar with 20 letters."""
    data = DataConfig(text_file=(str(write_text(folder / "text.txt", 3000)),))
    return prepare_dataset(data, corpora.find_source(data, ignore_message), ignore_message)


@dataclasses.dataclass(frozen=True)
class Planted(DiagnosisInput):
    """A diagnosis input whose engines or batches have a planted fault."""

    engines: Callable[[Engine], Any] = lambda engine: engine
    batches: Callable[[Batch], Batch] = lambda batch: batch

    @property
    def trial_setup(self) -> TrialSetup:
        plain = super().trial_setup
        return dataclasses.replace(
            plain,
            make_engine=lambda config: self.engines(plain.make_engine(config)),
            batch=self.batch,
        )

    def batch(self, step: int, rows: int) -> Batch:
        return self.batches(super().batch(step, rows))


def planted_input(
    folder: Path,
    config: RunConfig,
    weights: Callable[[str, Array], Array] = lambda name, array: array,
    engine: str = "numpy",
    **faults: Any,
) -> Planted:
    """A configuration on the small text whose first weights went through `weights`."""
    dataset = dataset_in(folder)
    table = parameter_table(config.model, dataset.tokenizer.vocab_size)

    def first_weights() -> list[tuple[str, Array]]:
        return [
            (name, weights(name, array))
            for name, array in initial_weights(table, config.train.seed)
        ]

    return Planted(config, dataset, compute(engine), first_weights, fine_tuned=False, **faults)


class FaultyEngine:
    """An engine that behaves like another one, except for the fault that a subclass adds."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Frozen(FaultyEngine):
    """The optimizer forgets the up matrix of the first block: it gets a gradient, but no update."""

    NAME = "blocks.0.feedforward.up.weight"

    def update(self, lr: float, skip_above: float = float("inf")) -> Update:
        frozen = dict(self.engine.state())[self.NAME].copy()
        update = self.engine.update(lr, skip_above)
        state = {name: array.copy() for name, array in self.engine.state()}
        state[self.NAME] = frozen
        self.engine.load(state.items(), self.engine.updates)
        return update


class Detached(FaultyEngine):
    """The up matrix of the first block gets no gradient."""

    def inspect(self, batch: Batch, names: Iterable[str]) -> dict[str, Array]:
        arrays = self.engine.inspect(batch, names)
        return {
            name: 0 * array if name == GRADIENT_PREFIX + Frozen.NAME else array
            for name, array in arrays.items()
        }


class Leaky(FaultyEngine):
    """Each position's logits know a little of the next token."""

    def inspect(self, batch: Batch, names: Iterable[str]) -> dict[str, Array]:
        arrays = self.engine.inspect(batch, names)
        if "logits" in arrays:
            following = np.roll(batch.tokens, -1, 1)[..., None]
            logits = arrays["logits"]
            np.put_along_axis(
                logits,
                following,
                np.take_along_axis(logits, following, -1) + 0.1 * logits.std(),
                -1,
            )
        return arrays


class Untrainable(FaultyEngine):
    """No rate moves a weight."""

    def update(self, lr: float, skip_above: float = float("inf")) -> Update:
        return self.engine.update(0.0, skip_above)
