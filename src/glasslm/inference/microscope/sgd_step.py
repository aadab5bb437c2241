"""One step of SGD on a single token of a text, really made on a copy of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import NO_TARGET, Engine
from glasslm.inference.microscope.recorded_pass import RecordedPass, make_batch
from glasslm.inference.trained_model import Model


def make_step_engine(model: Model) -> Engine:
    """An engine like the model's, whose update is plain SGD: weights - lr x gradient.

    It has no momentum, decay, clipping, average or dropout. Its weights are zero until `load`.
    """
    engine = model.engine
    architecture = dataclasses.replace(model.config.model, dropout=0.0, attention_dropout=0.0)
    optimizer = dataclasses.replace(
        model.config.optimizer,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        grad_clip=0.0,
        ema=0.0,
    )
    config = dataclasses.replace(model.config, model=architecture, optimizer=optimizer)
    compute = ComputeConfig(engine.name, engine.device, engine.precision)
    return make_engine(config, model.tokenizer.vocab_size, compute)


def targets_at(recorded: RecordedPass, t: int) -> NDArray[np.int64]:
    """(T,): the target after position t alone; NO_TARGET elsewhere."""
    return np.where(np.arange(recorded.length) == t, recorded.targets, NO_TARGET)


class StepEffect(NamedTuple):
    """The surprise of each token before and after a step; nan for the first token."""

    before: NDArray[np.float64]  # (T,) nats
    after: NDArray[np.float64]  # (T,) nats
    norm: float  # of the gradient of all weights


def take_step(
    recorded: RecordedPass,
    t: int,
    lr: float,
    engine: Engine,
    weights: Mapping[str, NDArray[Any]],
) -> StepEffect:
    """The effect of one step with the gradient of the loss of the token after position t.

    `engine` is one of make_step_engine; `weights` are those of the model, which does not change.
    """
    engine.load(weights.items())
    batch = make_batch(recorded.ids, targets_at(recorded, t))
    before = _nats(engine, recorded)
    engine.accumulate(batch, 1.0)
    update = engine.update(lr)
    return StepEffect(before, _nats(engine, recorded), update.norm)


def _nats(engine: Engine, recorded: RecordedPass) -> NDArray[np.float64]:
    """(T,): the surprise of each token; nan for the first."""
    nats = engine.losses(recorded.ids[None], recorded.targets[None])[0]
    return np.concatenate([[np.nan], np.asarray(nats, np.float64)[:-1]])
