"""The coordinate check: compares the changes of models of several widths in a few steps."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from glasslm.config.schema import ModelConfig
from glasslm.lab.diagnosis.trials import TrialSetup, trial_config
from glasslm.lab.short_training import train_step
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.report.findings import Finding

COORDINATE_STEPS = 4
MAX_FLAT_SLOPE = 0.3


class CoordinateCheck(NamedTuple):
    """Mean absolute changes of activations after a few steps, by place and by width."""

    widths: list[int]
    places: dict[str, list[float]]  # for each width, the change from the first weights

    def slope(self, place: str) -> float:
        """d log(change) / d log(width); muP makes it 0."""
        x, y = np.log(self.widths), np.log(np.maximum(self.places[place], 1e-30))
        return float(np.polyfit(x, y, 1)[0])


def check_coordinates(setup: TrialSetup, rows: int) -> CoordinateCheck:
    """Train models of several widths for a few steps at the run's peak rate.

    microsoft/mup, README, "coord check"; arXiv:2203.03466.
    """
    c = setup.config.model
    models = scale_width(c)
    last = f"blocks.{c.n_layers - 1}"
    names = {
        "stream": last,
        "attention": f"{last}.attention",
        "feed-forward": f"{last}.feedforward",
        "logits": "logits",
    }
    places: dict[str, list[float]] = {place: [] for place in names}
    for model in models:
        config = trial_config(setup.config, rows, dataclasses.asdict(model), {"ema": 0.0})
        engine, batch = setup.make_engine(config), setup.batch(0, rows)
        table = parameter_table(config.model, setup.vocab_size)
        engine.load(initial_weights(table, config.train.seed))
        first = engine.inspect(batch, names.values())
        for step in range(COORDINATE_STEPS):
            train_step(engine, setup.batch(step, rows), config.optimizer.lr)
        after = engine.inspect(batch, names.values())
        for place, name in names.items():
            places[place].append(float(np.abs(after[name] - first[name]).mean()))
    return CoordinateCheck([model.d_model for model in models], places)


def scale_width(c: ModelConfig) -> list[ModelConfig]:
    """Three models of width 64 to 256, each twice as wide as the last, with the same head size."""
    c = c.resolve()
    group = c.n_heads // c.n_kv_heads
    fewest = max(1, round(64 / c.head_size / group)) * group
    models = []
    for heads in (fewest, 2 * fewest, 4 * fewest):
        d_model = heads * c.head_size
        d_ff = max(1, round(c.d_ff * d_model / c.d_model))
        models.append(
            dataclasses.replace(
                c, d_model=d_model, n_heads=heads, n_kv_heads=heads // group, d_ff=d_ff
            )
        )
    return models


def judge_coordinates(check: CoordinateCheck) -> Finding:
    """Report the slopes. The verdict is always ok: the standard parametrization is not muP."""
    slopes = {place: check.slope(place) for place in check.places}
    slope_text = ", ".join(f"{place} {slope:+.2f}" for place, slope in slopes.items())
    evidence = f"change after {COORDINATE_STEPS} steps grows with width to the power: {slope_text}"
    is_flat = max(map(abs, slopes.values())) < MAX_FLAT_SLOPE
    meaning = (
        "flat: the rate of one width suits the others"
        if is_flat
        else "not flat: each width needs its own rate"
    )
    return Finding(
        "widths",
        "ok",
        evidence,
        meaning,
        "" if is_flat else "Tune --lr again for another --d-model.",
    )
