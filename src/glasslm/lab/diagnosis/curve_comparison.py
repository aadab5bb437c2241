"""Compare curves of two kinds at equal steps, and tell a difference from seed noise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from glasslm.errors import InputError
from glasslm.lab.diagnosis.curve_files import Curve
from glasslm.lab.diagnosis.curve_table import Series
from glasslm.lab.statistics import ALPHA, Estimate, independent_difference
from glasslm.report import figures
from glasslm.report.figures import Palette
from glasslm.runs.history import loss_range
from glasslm.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

END_SHARE = 0.1  # of the common steps: the end, over which losses are averaged
MIN_EQUAL_LOSSES = 10  # of two logs of one run, of which one may be cut


@dataclass(frozen=True)
class CurveComparison:
    """Two groups of curves at the last step that all of them have."""

    first: Sequence[Curve]
    second: Sequence[Curve]
    column: str  # "validation loss" or "training loss"
    step: float  # the last common one
    ends: tuple[list[float], list[float]]  # the mean loss of each curve near that step
    estimate: Estimate | None  # second - first; None with one curve on a side, or copies on both
    step_unit: str = "step"

    @property
    def delta(self) -> float:
        """The mean of the second group minus that of the first."""
        return float(np.mean(self.ends[1]) - np.mean(self.ends[0]))

    @property
    def is_distinguishable(self) -> bool | None:
        """Whether the difference is more than seed noise; None where the curves cannot tell."""
        if self.estimate is None:
            return None
        return self.estimate.p_value() < ALPHA

    def sentences(self) -> list[str]:
        """What was compared, the difference, and what it is worth."""
        names = [", ".join(curve.name for curve in side) for side in (self.first, self.second)]
        means = [float(np.mean(ends)) for ends in self.ends]
        where = f"up to {self.step_unit} {self.step:,g}, the last that all curves have"
        result = [
            f"{self.column.capitalize()} {where}, as the mean at equal steps of the last "
            f"{END_SHARE:.0%}: {means[0]:.4f} ({names[0]}) and {means[1]:.4f} ({names[1]}), "
            f"a difference of {self.delta:+.4f}."
        ]
        if self.estimate is None:
            reason = "a side has one run. Give several"
            if min(map(len, self.ends)) > 1:
                reason = (
                    "the runs of each side are equal, as copies of one run are. Give other seeds"
                )
            result.append(
                f"Whether that is more than seed noise cannot be told: {reason}: --curve A1 A2 A3 "
                "--against B1 B2 B3."
            )
            return result
        low, high = self.estimate.confidence_interval()
        n = [len(ends) for ends in self.ends]
        interval = f"95% interval {low:+.4f} to {high:+.4f}, p = {self.estimate.p_value():.3g}"
        result.append(
            f"That is more than the noise between runs ({interval}; {n[0]} and {n[1]} runs, Welch)."
            if self.is_distinguishable
            else f"That cannot be told from the noise between runs ({interval}; {n[0]} and "
            f"{plural(n[1], 'run')}, Welch). A difference of "
            f"{self.estimate.detectable_difference():.4f} would be seen in 4 of 5 such comparisons."
        )
        return result

    @property
    def facts(self) -> dict[str, object]:
        """The comparison for JSON."""
        interval = self.estimate.confidence_interval() if self.estimate else (None, None)
        return {
            "column": self.column,
            "step": self.step,
            "step_unit": self.step_unit,
            "ends": self.ends,
            "delta": self.delta,
            "ci_low": interval[0],
            "ci_high": interval[1],
            "p": self.estimate.p_value() if self.estimate else None,
            "distinguishable": self.is_distinguishable,
        }


class CommonEnd(NamedTuple):
    """The losses of curves near the last step that all of them have."""

    column: str  # "validation loss" or "training loss"
    step: float
    step_unit: str
    losses: list[float]  # the mean at equal steps of the last END_SHARE


def common_end(curves: Sequence[Curve]) -> CommonEnd:
    """The losses at the last common step; the validation losses where all curves have them.

    Raises InputError where units differ, the curves have no steps in common, or one has only
    validation losses and another one has none.
    """
    _require_one_step_unit(curves)
    has_validation = all(len(curve.validation_losses.finite) for curve in curves)
    if not has_validation:
        _require_training_losses(curves)
    series = [_choose_losses(curve, has_validation) for curve in curves]
    for curve, values in zip(curves, series):
        _require_finite(curve, values)
    begin = max(float(values.steps[0]) for values in series)
    end = min(float(values.steps[-1]) for values in series)
    if begin > end:
        raise InputError(
            f"the curves have no steps in common: one begins at {begin:,g}, another ends at "
            f"{end:,g}. --columns step=tokens compares them at equal tokens"
        )
    ends = _mean_ends(series, end - (end - begin) * END_SHARE, end)
    _require_one_unit(curves, has_validation)
    column = "validation loss" if has_validation else "training loss"
    return CommonEnd(column, end, curves[0].step_unit, ends)


def compare_curves(first: Sequence[Curve], second: Sequence[Curve]) -> CurveComparison:
    """Compare two groups of curves at their last common step.

    Groups of equal ends are not tested, as they show no seed noise. Raises InputError as
    `common_end` does, and for copies of a log among several on each side: they are no seeds.
    """
    if min(len(first), len(second)) > 1:
        _require_different([*first, *second])
    end = common_end([*first, *second])
    sides = end.losses[: len(first)], end.losses[len(first) :]
    estimate = independent_difference(sides[1], sides[0]) if min(map(len, sides)) > 1 else None
    if estimate and estimate.se == 0 and estimate.value != 0:
        estimate = None
    return CurveComparison(first, second, end.column, end.step, sides, estimate, end.step_unit)


def _require_different(curves: Sequence[Curve]) -> None:
    for one, other in itertools.combinations(curves, 2):
        if _content(one) == _content(other) or _is_cut_copy(one, other):
            raise InputError(
                f"{one.name} and {other.name} are equal at every step that both have, as copies of "
                "one run are: expected logs of different seeds. Leave one of the two out"
            )


def _content(curve: Curve) -> list[bytes]:
    """All numbers of a curve."""
    series = (curve.train, curve.validation, curve.grad_norm, curve.rate)
    return [array.tobytes() for s in series for array in (s.steps, s.values)]


def _is_cut_copy(one: Curve, other: Curve) -> bool:
    """Whether all losses at common steps are equal, and there are too many for chance."""
    n_common = 0
    for a, b in ((one.train, other.train), (one.validation, other.validation)):
        _, in_a, in_b = np.intersect1d(a.steps, b.steps, return_indices=True)
        if not np.array_equal(a.values[in_a], b.values[in_b], equal_nan=True):
            return False
        n_common += len(in_a)
    return n_common >= MIN_EQUAL_LOSSES


def _choose_losses(curve: Curve, of_validation: bool) -> Series:
    """The finite validation or training losses of a curve."""
    return (curve.validation_losses if of_validation else curve.training_losses).finite


def _require_training_losses(curves: Sequence[Curve]) -> None:
    """Raise InputError for a curve that has only validation losses, beside one that has none."""
    without = [curve for curve in curves if not len(curve.validation_losses.finite)]
    for curve in without:
        _require_finite(curve, curve.train.finite)
    for curve in curves:
        if curve.train_is_validation:
            raise InputError(
                f"{curve.name} has only a validation loss, and {without[0].name} has none: "
                "expected the same kind of loss in all logs. Leave one out, or rename its column "
                "if its name is wrong"
            )


def _require_finite(curve: Curve, losses: Series) -> None:
    if not len(losses):
        raise InputError(f"{curve.name} has no finite loss: leave it out of the comparison")


def _require_one_step_unit(curves: Sequence[Curve]) -> None:
    units = {curve.step_unit: curve.name for curve in curves}
    if len(units) > 1:
        listed = ", ".join(f"{unit}s ({name})" for unit, name in units.items())
        raise InputError(
            f"the curves have different steps, {listed}: name columns of the same kind with "
            "--columns step=COLUMN"
        )


def _require_one_unit(curves: Sequence[Curve], of_validation: bool) -> None:
    units = {
        curve.validation_unit if of_validation else curve.train_unit: curve.name for curve in curves
    }
    if len(units) > 1:
        listed = ", ".join(f"{unit} ({name})" for unit, name in units.items())
        raise InputError(
            f"the losses have different units, {listed}: name columns of the same unit with "
            "--columns"
        )


def _mean_ends(series: Sequence[Series], begin: float, end: float) -> list[float]:
    """The mean of each curve from `begin` to `end`, over the steps there that all curves have.

    Without such steps, all are interpolated at those of the curve that has the fewest. Means over
    each curve's own steps would differ for equal curves, because losses fall.
    """
    inside = [one.steps[(one.steps >= begin) & (one.steps <= end)] for one in series]
    steps = reduce(np.intersect1d, inside)
    if not len(steps):
        steps = min(inside, key=len)
    if not len(steps):
        steps = np.array([end])
    return [fmean(np.interp(steps, one.steps, one.values).tolist()) for one in series]


def draw_comparison(comparison: CurveComparison, colours: Palette) -> Figure:
    """A figure of the curves of both groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    figures.style_axes(axes, comparison.column.capitalize(), "", colours)
    sides = ((comparison.first, colours.train, "-"), (comparison.second, colours.validation, "--"))
    points: list[tuple[float, float]] = []
    for letter, (side, colour, style) in zip("AB", sides):
        names = ", ".join(curve.name for curve in side[:3]) + ", ..." * (len(side) > 3)
        for i, curve in enumerate(side):
            values = _choose_losses(curve, comparison.column == "validation loss")
            label = f"{letter}: {names}" if i == 0 else None
            points += zip(values.steps.tolist(), values.values.tolist())
            axes.plot(values.steps, values.values, style, color=colour, linewidth=1.2, label=label)
    axes.set_ylim(*loss_range(points))  # the fall at the start would hide the difference
    axes.axvline(comparison.step, color=colours.ink, linewidth=0.6, linestyle=":")
    label = f"{comparison.step_unit}; the dotted line is the last that all curves have"
    axes.set_xlabel(label, color=colours.ink)
    figures.add_legend(axes, colours)
    return figure
