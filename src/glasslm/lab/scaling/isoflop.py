"""Approaches 1 and 2 of Hoffmann et al. 2022 (arXiv:2203.15556) beside the fitted law, and the law of size alone.

Each approach ends in N_opt(C) = k C^a with an interval on a. Where they disagree, the disagreement is a result.
C in FLOPs, N parameters, losses in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from glasslm.errors import InputError, require
from glasslm.lab.scaling import power_terms
from glasslm.lab.scaling.checks import Bootstrap
from glasslm.lab.scaling.law import ALIKE, Interval, Observation, levels
from glasslm.lab.scaling.power_terms import Array

KAPLAN = (
    0.076  # the exponent of L(N) in Kaplan et al. 2020 (arXiv:2001.08361), N without embeddings
)
POINTS = 1500  # of compute, at which the envelope is read, as in the paper


@dataclass(frozen=True)
class Frontier:
    """N_opt(C) = k C^a, and the points that it was drawn through (none for the fitted law)."""

    approach: str
    a: Interval
    k: float
    points: tuple[tuple[float, float], ...]  # (C, N_opt)
    warnings: tuple[str, ...] = ()

    def N_opt(self, C: float) -> float:
        return self.k * C**self.a.value


def _frontier(
    approach: str, points: Sequence[tuple[float, float]], warnings: Sequence[str]
) -> Frontier:
    if len(points) < 3:
        said = "; ".join(warnings) or "no warnings"
        raise InputError(f"{approach} found {len(points)} optima ({said}): expected at least 3, as an exponent without "
                         "an interval says nothing; train more sizes, or more budgets")  # fmt: skip
    a, intercept, _ = _line([math.log(C) for C, _ in points], [math.log(N) for _, N in points])
    return Frontier(approach, a, math.exp(intercept), tuple(points), tuple(warnings))


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[Interval, float, Array]:
    """Slope with its 95% t interval, intercept and residuals (n,) of a straight line by least squares."""
    from scipy.stats import linregress, t

    found = linregress(x, y)
    half = float(t.ppf(0.975, len(x) - 2)) * float(found.stderr)
    slope, intercept = float(found.slope), float(found.intercept)
    return (
        Interval(slope, slope - half, slope + half),
        intercept,
        np.asarray(y) - intercept - slope * np.asarray(x),
    )


# -- approach 1: the envelope of training curves ----------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingCurve:
    """Losses of one size along compute. Smoothed, and with the learning rate decayed (or constant) at every point."""

    N: float
    C: Sequence[float]  # rising, from above 0
    loss: Sequence[float]

    def __post_init__(self) -> None:
        C, loss, what = np.asarray(self.C), np.asarray(self.loss), f"the curve of N = {self.N:g}"
        require(
            len(C) == len(loss) >= 2,
            what,
            f"{len(C)} computes and {len(loss)} losses",
            "as many, and 2 or more",
        )
        rising = bool((C[:1] > 0).all() and (np.diff(C) > 0).all())
        require(
            rising,
            what,
            "not rising in compute",
            "each compute above the one before, and the first above 0",
        )
        require(
            bool((np.isfinite(loss) & (loss > 0)).all()),
            what,
            "not finite",
            "finite losses above 0",
        )

    def at(self, C: Array) -> Array:
        """Losses between the curve's points, by monotone cubics in logarithms; inf where the curve does not reach."""
        from scipy.interpolate import PchipInterpolator

        inner = PchipInterpolator(np.log(self.C), np.log(self.loss), extrapolate=False)
        return np.nan_to_num(np.exp(inner(np.log(C))), nan=math.inf)


def curves_of(observations: Sequence[Observation]) -> list[TrainingCurve]:
    """For each size the losses of its finished runs, as a curve along compute: every point of it is fully decayed."""
    found = []
    for size in sorted({o.N for o in observations}):
        runs = [o for o in observations if size == o.N]
        compute = sorted({o.C for o in runs})
        if len(compute) > 1:
            means = [float(np.mean([o.loss for o in runs if o.C == C])) for C in compute]
            found.append(TrainingCurve(size, compute, means))
    return found


def envelope(curves: Sequence[TrainingCurve]) -> Frontier:
    """Approach 1: which size has the lowest loss at each compute.

    With few sizes that is a staircase, and a line through a staircase is too flat. So the optimum is read where the
    envelope passes from one size to the next: it lies between the two, at their geometric mean.
    """
    require(len(curves) > 0, "the number of curves", len(curves), "at least 4 sizes")
    C, sizes = _computes(curves), sorted({curve.N for curve in curves})
    losses = np.stack(
        [np.min([curve.at(C) for curve in curves if size == curve.N], axis=0) for size in sizes]
    )
    best = np.where(np.isfinite(losses.min(0)), losses.argmin(0), -1)  # (POINTS,)
    points, warnings = [], []
    on_it = [i for i in range(len(sizes)) if (best == i).any()]
    for i, j in pairwise(on_it):
        both = np.isfinite(losses[i]) & np.isfinite(losses[j])
        # noise makes the two change places more than once; the middle of that is where as many points are on each side
        turn = int((both & (losses[i] <= losses[j])).sum())
        if 0 < turn < both.sum():
            points.append((float(C[both][turn]), math.sqrt(sizes[i] * sizes[j])))
        else:
            warnings.append(
                f"the curves of N = {sizes[i]:.3g} and {sizes[j]:.3g} do not cross where both were trained"
            )
    return _frontier("envelope", points, warnings)


def _computes(curves: Sequence[TrainingCurve]) -> Array:
    """(POINTS,) from where the first curve begins to where the last one ends."""
    return np.geomspace(
        min(curve.C[0] for curve in curves), max(curve.C[-1] for curve in curves), POINTS
    )


def slices(curves: Sequence[TrainingCurve], count: int = 4) -> list[Observation]:
    """Losses at `count` equal computes, read off the curves of at least 4 sizes each: IsoFLOP data of a grid design.

    Neighbouring computes share runs, so their optima err together and intervals are too narrow: at 5 computes, a
    nominal 95% held the truth in 84% to 88% of simulated studies. True IsoFLOP designs do not have this.
    """
    require(len(curves) > 0, "the number of curves", len(curves), "at least 4 sizes")
    C = _computes(curves)
    losses = np.stack([curve.at(C) for curve in curves])
    reach = np.isfinite(losses)
    enough = np.flatnonzero(reach.sum(0) >= 4)
    if not len(enough):
        raise InputError("no compute is reached by the curves of 4 sizes: expected sizes and token budgets that "
                         "overlap in compute; train the smaller sizes longer")  # fmt: skip
    chosen = enough[np.unique(np.linspace(0, len(enough) - 1, count).round().astype(int))]
    return [
        Observation(curve.N, float(C[i]) / (6 * curve.N), float(losses[row, i]), flops=float(C[i]))
        for i in chosen
        for row, curve in enumerate(curves)
        if reach[row, i]
    ]


# -- approach 2: IsoFLOP parabolas ------------------------------------------------------------------------------------


Verdict = Literal["centred", "off-centre", "outside the grid", "no minimum"]


@dataclass(frozen=True)
class Parabola:
    """loss = lowest + curvature / 2 (ln N - ln N_opt)^2 at one compute."""

    C: float
    N_opt: float
    lowest: float
    curvature: float
    sizes: tuple[float, ...]
    verdict: Verdict


def parabolas(observations: Sequence[Observation]) -> list[Parabola]:
    """Approach 2, for each compute with at least 3 sizes, by least squares in ln N.

    A loss is no parabola: off the centre of its sizes the minimum is biased even without noise, so that is said.
    """
    found = []
    groups = levels([o.C for o in observations])
    for group in range(max(groups, default=-1) + 1):
        runs = [o for o, g in zip(observations, groups, strict=True) if g == group]
        sizes = sorted({o.N for o in runs})
        if len(sizes) < 3:
            continue
        x = np.log([o.N for o in runs])
        middle, reach = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
        c2, c1, c0 = (float(c) for c in np.polyfit((x - middle) / reach, [o.loss for o in runs], 2))
        at = -c1 / (2 * c2) if c2 > 0 else math.nan  # -1 and 1 are the ends of the grid
        verdict: Verdict = (
            "no minimum" if c2 <= 0
            else "outside the grid" if abs(at) > 1 else "off-centre" if abs(at) > 0.5 else "centred"
        )  # fmt: skip
        C = math.exp(float(np.mean(np.log([o.C for o in runs]))))
        N = math.exp(float(np.clip(middle + at * reach, -700, 700))) if c2 > 0 else math.nan
        lowest = c0 - c1 * c1 / (4 * c2) if c2 > 0 else math.nan
        found.append(Parabola(C, N, lowest, 2 * c2 / float(reach) ** 2, tuple(sizes), verdict))
    return found


def isoflop(found: Sequence[Parabola]) -> Frontier:
    """The frontier through the minima that lie among the sizes trained; InputError if these are fewer than 3."""
    inside = [p for p in found if p.verdict in ("centred", "off-centre")]
    warnings = []
    for p in found:
        if p.verdict == "off-centre":
            warnings.append(
                f"C = {p.C:.3g}: the minimum {p.N_opt:.3g} is off the centre of its sizes, so it is biased"
            )
        elif p not in inside:
            seen = (
                "there is no minimum"
                if p.verdict == "no minimum"
                else "the minimum is outside the sizes trained"
            )
            warnings.append(
                f"C = {p.C:.3g}: {seen} ({p.sizes[0]:.3g} to {p.sizes[-1]:.3g}); left out"
            )
    return _frontier("IsoFLOP", [(p.C, p.N_opt) for p in inside], warnings)


# -- approach 3, and the three side by side ---------------------------------------------------------------------------


def parametric(boot: Bootstrap) -> Frontier:
    """Approach 3 in the form of the others."""
    k = boot.fit.N_opt(1.0)
    return Frontier("parametric", boot.interval(lambda law: law.a), k, (), boot.fit.warnings)


def disagreement(frontiers: Sequence[Frontier]) -> str:
    """A sentence on how far the approaches' exponents lie apart, and whether their intervals meet."""
    if len(frontiers) < 2:
        return "Only one approach could be used: nothing to compare it with."
    values = [frontier.a.value for frontier in frontiers]
    apart = [
        f"{first.approach} and {second.approach}"
        for first, second in combinations(frontiers, 2)
        if first.a.ci_low > second.a.ci_high or second.a.ci_low > first.a.ci_high
    ]
    said = f"The exponent a is {min(values):.3f} to {max(values):.3f}, by approach"
    if apart:
        return f"{said}; the intervals of {', '.join(apart)} do not meet, so these disagree by more than their noise."
    return f"{said}; all intervals meet."


# -- size alone -------------------------------------------------------------------------------------------------------


def at_equal_tokens(observations: Sequence[Observation]) -> list[Observation]:
    """For each size its loss at one number of tokens: the largest that the most sizes reach.

    Of a grid that is its longest column. Of other designs losses are read off between a size's own runs, by monotone
    cubics in logarithms; a size with one run counts where that has as many tokens.
    """
    from scipy.interpolate import PchipInterpolator

    def losses(tokens: float) -> dict[float, float]:
        found = {}
        for size in {o.N for o in observations}:
            runs = [o for o in observations if size == o.N]
            D = sorted({o.D for o in runs})
            means = [float(np.mean([o.loss for o in runs if d == o.D])) for d in D]
            close = [mean for d, mean in zip(D, means) if max(d / tokens, tokens / d) < ALIKE]
            if close:
                found[size] = close[-1]
            elif D[0] < tokens < D[-1]:
                found[size] = math.exp(
                    float(PchipInterpolator(np.log(D), np.log(means))(math.log(tokens)))
                )
        return found

    most = max({o.D for o in observations}, key=lambda D: (len(losses(D)), D))
    return [Observation(N, most, loss) for N, loss in sorted(losses(most).items())]


@dataclass(frozen=True)
class SizeLaw:
    """L(N) = E + k N^-alpha at one number of tokens. Kaplan's exponent, to set beside it, is KAPLAN."""

    k: float
    alpha: Interval
    E: float
    r2: float  # of log loss: the share of its variance that the law explains
    warnings: tuple[str, ...]

    def loss(self, N: float) -> float:
        return self.E + self.k * N**-self.alpha.value


def size_law(observations: Sequence[Observation], floor: bool = False) -> SizeLaw:
    """Least squares of log loss on log N; with `floor`, E is fitted too, which takes 4 sizes instead of 3.

    Without it the exponent is too small wherever losses are near their floor: one reason to differ from Kaplan's.
    """
    sizes, least = len({o.N for o in observations}), 4 if floor else 3
    require(sizes >= least, "sizes", sizes, f"at least {least} to fit L(N)")
    x, y = np.log([o.N for o in observations]), np.log([o.loss for o in observations])
    tokens = [o.D for o in observations]
    warnings = []
    if max(tokens) > ALIKE * min(tokens):
        warnings.append(
            f"D runs from {min(tokens):.3g} to {max(tokens):.3g}, so alpha is not the effect of size alone"
        )
    if floor:
        k, alpha, E, residuals = _with_floor(x, y)
    else:
        slope, intercept, residuals = _line(list(x), list(y))
        k, E, alpha = (
            math.exp(intercept),
            0.0,
            Interval(-slope.value, -slope.ci_high, -slope.ci_low),
        )
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float((residuals**2).sum()) / spread if spread else math.nan
    return SizeLaw(k, alpha, E, r2, tuple(warnings))


def _with_floor(x: Array, y: Array) -> tuple[float, Interval, float, Array]:
    """k, alpha with its t interval from the curvature at the minimum (delta method), E and the residuals."""
    from scipy.stats import t

    centred = (x - x.mean())[None]
    first = power_terms.starts(centred, y, math.inf)
    theta, objective = power_terms.minimise(
        first, centred, y, np.ones((len(first), len(y))), math.inf
    )
    best = theta[objective.argmin()][None]
    log_loss, shares = power_terms.predicted(best, centred)
    J, residuals, freedom = power_terms.jacobian(shares, centred)[0], y - log_loss[0], len(y) - 3
    variance = float((residuals**2).sum()) / freedom * np.linalg.pinv(J.T @ J)[2, 2]
    e, c, alpha = (float(value) for value in best[0])
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return (
        math.exp(c + alpha * float(x.mean())),
        Interval(alpha, alpha - half, alpha + half),
        math.exp(e),
        residuals,
    )
