"""Approaches 1 and 2 of Hoffmann et al. 2022 (arXiv:2203.15556), and the law of size alone.

Each approach gives N_opt(C) = k C^a with an interval on a. A disagreement between approaches is a
result. C in FLOPs, N parameters, losses in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from operator import attrgetter

import numpy as np

from glasslm.errors import InputError, require
from glasslm.lab.scaling import power_terms
from glasslm.lab.scaling.law import SAME_LEVEL_RATIO, Interval, Observation
from glasslm.lab.scaling.parabolas import Parabola
from glasslm.lab.scaling.power_terms import Array
from glasslm.lab.scaling.uncertainty import Bootstrap

# The exponent of L(N) in Kaplan et al. 2020 (arXiv:2001.08361), N without embeddings.
KAPLAN_EXPONENT = 0.076
ENVELOPE_POINTS = 1500  # of compute, as in the paper
MAX_TOKEN_GAP = (
    5.0  # between two runs of a size; over a wider one, interpolated losses are too high
)


@dataclass(frozen=True)
class Frontier:
    """N_opt(C) = k C^a, and the points that it was fitted to (none for the fitted law)."""

    approach: str
    a: Interval
    k: float
    points: tuple[tuple[float, float], ...]  # (C, N_opt)
    warnings: tuple[str, ...] = ()

    def N_opt(self, C: float) -> float:
        return self.k * C**self.a.value


def _fit_frontier(
    approach: str,
    points: Sequence[tuple[float, float]],
    warnings: Sequence[str],
    errors: Sequence[float] = (),
) -> Frontier:
    """The frontier through (C, N_opt) points. Raises InputError if there are fewer than 3.

    Points with standard errors of ln N_opt, all finite and above 0, are weighted by their inverse
    squares.
    """
    if len(points) < 3:
        listed = "; ".join(warnings) or "no warnings"
        raise InputError(
            f"{approach} found {len(points)} optima ({listed}): expected at least 3 for an "
            "exponent with an interval; train more sizes, or more budgets"
        )
    is_weighted = len(errors) > 0 and all(0 < error < math.inf for error in errors)
    a, intercept, _ = _fit_line(
        [math.log(C) for C, _ in points],
        [math.log(N) for _, N in points],
        [1 / max(error, max(errors) / 10) for error in errors] if is_weighted else None,
    )
    return Frontier(approach, a, math.exp(intercept), tuple(points), tuple(warnings))


def _fit_line(
    x: Sequence[float], y: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[Interval, float, Array]:
    """Slope with its 95% t interval, intercept and residuals (n,) of a line by least squares.

    `weights` multiply the residuals before they are squared.
    """
    from scipy.stats import t

    w = np.ones(len(x)) if weights is None else np.asarray(weights)
    X = np.stack([np.asarray(x), np.ones(len(x))], 1)
    inverse = np.linalg.inv((X * w[:, None] ** 2).T @ X)
    slope, intercept = (float(c) for c in inverse @ ((X * w[:, None] ** 2).T @ np.asarray(y)))
    residuals = np.asarray(y) - intercept - slope * np.asarray(x)
    variance = float((w * residuals) @ (w * residuals)) / (len(x) - 2) * inverse[0, 0]
    half = float(t.ppf(0.975, len(x) - 2)) * math.sqrt(variance)
    return Interval(slope, slope - half, slope + half), intercept, residuals


# -- approach 1: the envelope of training curves ---------------------------------------------------


@dataclass(frozen=True)
class TrainingCurve:
    """Losses of one size over compute: smoothed, with the learning rate decayed at every point."""

    N: float
    C: Sequence[float]  # ascending, above 0
    loss: Sequence[float]

    def __post_init__(self) -> None:
        C, loss, what = np.asarray(self.C), np.asarray(self.loss), f"the curve of N = {self.N:g}"
        require(
            len(C) == len(loss) >= 2,
            what,
            f"{len(C)} computes and {len(loss)} losses",
            "equal numbers, 2 or more",
        )
        ascending = bool((C[:1] > 0).all() and (np.diff(C) > 0).all())
        require(
            ascending,
            what,
            "not ascending in compute",
            "each compute above the one before, and the first above 0",
        )
        require(
            bool((np.isfinite(loss) & (loss > 0)).all()),
            what,
            "not finite",
            "finite losses above 0",
        )

    def interpolate(self, C: Array) -> Array:
        """(n,) losses at the computes C (n,), by monotone cubics in logarithms; inf outside."""
        from scipy.interpolate import PchipInterpolator

        inner = PchipInterpolator(np.log(self.C), np.log(self.loss), extrapolate=False)
        return np.nan_to_num(np.exp(inner(np.log(C))), nan=math.inf)


def training_curves(observations: Sequence[Observation]) -> list[TrainingCurve]:
    """A curve of each size with two computes or more; its points are losses of finished runs."""
    curves = []
    for size, losses in sorted(_group_losses(observations, attrgetter("C")).items()):
        if len(losses) > 1:
            means = [float(np.mean(values)) for values in losses.values()]
            curves.append(TrainingCurve(size, list(losses), means))
    return curves


def _group_losses(
    observations: Sequence[Observation], key: Callable[[Observation], float]
) -> dict[float, dict[float, list[float]]]:
    """The losses of each size by ascending compute or tokens."""
    by_size: dict[float, dict[float, list[float]]] = {}
    for o in sorted(observations, key=key):
        by_size.setdefault(o.N, {}).setdefault(key(o), []).append(o.loss)
    return by_size


def envelope_frontier(curves: Sequence[TrainingCurve]) -> Frontier:
    """Approach 1: the size with the lowest loss at each compute.

    With few sizes that is a staircase, and a line through a staircase is too flat. So the optimum
    is read where the envelope passes from one size to the next: at their geometric mean.
    """
    require(len(curves) > 0, "the number of curves", len(curves), "at least 4 sizes")
    C, sizes = _compute_grid(curves), sorted({curve.N for curve in curves})
    losses = np.stack(
        [
            np.min([curve.interpolate(C) for curve in curves if size == curve.N], axis=0)
            for size in sizes
        ]
    )
    best = np.where(np.isfinite(losses.min(0)), losses.argmin(0), -1)  # (ENVELOPE_POINTS,)
    points, warnings = [], []
    optimal = [i for i in range(len(sizes)) if (best == i).any()]
    for i, j in pairwise(optimal):
        both = np.isfinite(losses[i]) & np.isfinite(losses[j])
        # With noise, two curves cross more than once; the count gives the middle of the crossings.
        crossing = int((both & (losses[i] <= losses[j])).sum())
        if 0 < crossing < both.sum():
            points.append((float(C[both][crossing]), math.sqrt(sizes[i] * sizes[j])))
        else:
            warnings.append(
                f"the curves of N = {sizes[i]:.3g} and {sizes[j]:.3g} do not cross where both exist"
            )
    return _fit_frontier("envelope", points, warnings)


def _compute_grid(curves: Sequence[TrainingCurve]) -> Array:
    """(ENVELOPE_POINTS,) computes from the start of the first curve to the end of the last one."""
    return np.geomspace(
        min(curve.C[0] for curve in curves), max(curve.C[-1] for curve in curves), ENVELOPE_POINTS
    )


def slices(curves: Sequence[TrainingCurve], count: int = 4) -> list[Observation]:
    """Losses at `count` equal computes from curves of at least 4 sizes: IsoFLOP data of a grid.

    Neighbouring computes share runs, so the errors of their optima are correlated and the intervals
    too narrow: at 5 computes, a nominal 95% interval contained the truth in 84% to 88% of simulated
    studies. True IsoFLOP designs do not have this problem.
    """
    require(len(curves) > 0, "the number of curves", len(curves), "at least 4 sizes")
    C = _compute_grid(curves)
    losses = np.stack([curve.interpolate(C) for curve in curves])
    is_covered = np.isfinite(losses)
    usable = np.flatnonzero(is_covered.sum(0) >= 4)
    if not len(usable):
        raise InputError(
            "no compute is reached by the curves of 4 sizes: expected sizes and token budgets that "
            "overlap in compute; train the smaller sizes longer"
        )
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, count).round().astype(int))]
    return [
        Observation(curve.N, float(C[i]) / (6 * curve.N), float(losses[row, i]), flops=float(C[i]))
        for i in chosen
        for row, curve in enumerate(curves)
        if is_covered[row, i]
    ]


# -- approach 2: IsoFLOP parabolas -----------------------------------------------------------------


def isoflop_frontier(fitted: Sequence[Parabola]) -> Frontier:
    """The frontier through the minima among the trained sizes. InputError if fewer than 3."""
    inside = [parabola for parabola in fitted if parabola.is_inside]
    warnings = []
    for parabola in fitted:
        prefix = f"C = {parabola.C:.3g}: "
        if parabola.verdict == "off-centre":
            warnings.append(
                f"{prefix}the minimum {parabola.N_opt:.3g} is off the centre of its sizes, so it "
                "is biased"
            )
        elif parabola.widened and parabola.is_inside:
            warnings.append(f"{prefix}{parabola.widened}, so more sizes were taken")
        elif not parabola.is_inside:
            problem = (
                "there is no minimum"
                if parabola.verdict == "no minimum"
                else "the minimum is outside the sizes trained"
            )
            low, high = parabola.sizes[0], parabola.sizes[-1]
            warnings.append(f"{prefix}{problem} ({low:.3g} to {high:.3g}); left out")
    points = [(parabola.C, parabola.N_opt) for parabola in inside]
    return _fit_frontier("IsoFLOP", points, warnings, [parabola.error for parabola in inside])


# -- approach 3, and the comparison of all three ---------------------------------------------------


def parametric_frontier(bootstrap: Bootstrap) -> Frontier:
    """Approach 3 in the form of the others."""
    fit = bootstrap.fit
    exponent = bootstrap.interval(lambda law: law.a)
    return Frontier("parametric", exponent, fit.N_opt(1.0), (), fit.warnings)


def disagreement(frontiers: Sequence[Frontier]) -> str:
    """A sentence on the range of the approaches' exponents, and whether their intervals meet."""
    if len(frontiers) < 2:
        return "Only one approach could be used: there is nothing to compare."
    values = [frontier.a.value for frontier in frontiers]
    disjoint = [
        f"{first.approach} and {second.approach}"
        for first, second in combinations(frontiers, 2)
        if first.a.ci_low > second.a.ci_high or second.a.ci_low > first.a.ci_high
    ]
    start = f"The exponent a is {min(values):.3f} to {max(values):.3f}, by approach"
    if disjoint:
        return (
            f"{start}; the intervals of {', '.join(disjoint)} do not meet: they disagree by more "
            "than their noise."
        )
    return f"{start}; all intervals meet."


# -- size alone ------------------------------------------------------------------------------------


def interpolate_equal_tokens(observations: Sequence[Observation]) -> list[Observation]:
    """The loss of each size at one number of tokens: the largest number that the most sizes reach.

    For a grid that is its longest column. For other designs, losses are interpolated between the
    runs of a size, by monotone cubics in logarithms; a size with one run is used only if that run
    has this number of tokens.
    """
    means = {
        size: {D: float(np.mean(losses)) for D, losses in runs.items()}
        for size, runs in _group_losses(observations, attrgetter("D")).items()
    }
    tokens = np.array(sorted({o.D for o in observations}))
    covered = sum(_covers(np.array(list(runs)), tokens).astype(int) for runs in means.values())
    best = float(tokens[np.flatnonzero(covered == np.max(covered))[-1]])
    return [
        Observation(size, best, _loss_at(means[size], best))
        for size in sorted(means)
        if _covers(np.array(list(means[size])), np.array([best]))[0]
    ]


def _covers(D: Array, tokens: Array) -> Array:
    """(n,) whether runs with the ascending tokens D (m,) tell the loss at each of `tokens` (n,)."""
    above = np.searchsorted(D, tokens)
    low, high = D[np.maximum(above - 1, 0)], D[np.minimum(above, len(D) - 1)]
    is_inside = (low < tokens) & (tokens < high) & (high < MAX_TOKEN_GAP * low)
    result: Array = is_inside | _is_same_level(low, tokens) | _is_same_level(high, tokens)
    return result


def _is_same_level(a: Array, b: Array) -> Array:
    return np.asarray(np.maximum(a / b, b / a) < SAME_LEVEL_RATIO)


def _loss_at(means: dict[float, float], tokens: float) -> float:
    """The mean loss of the runs with these tokens, or else interpolated between its neighbours."""
    from scipy.interpolate import PchipInterpolator

    close = [mean for D, mean in means.items() if max(D / tokens, tokens / D) < SAME_LEVEL_RATIO]
    if close:
        return close[-1]
    curve = PchipInterpolator(np.log(list(means)), np.log(list(means.values())))
    return math.exp(float(curve(math.log(tokens))))


@dataclass(frozen=True)
class SizeLaw:
    """L(N) = E + k N^-alpha at one number of tokens. Compare its exponent with KAPLAN_EXPONENT."""

    k: float
    alpha: Interval
    E: float
    r2: float  # the share of the variance of log loss that the law explains
    warnings: tuple[str, ...]

    def loss(self, N: float) -> float:
        return self.E + self.k * N**-self.alpha.value


def size_law(observations: Sequence[Observation], floor: bool = False) -> SizeLaw:
    """Least squares of log loss on log N; with `floor`, E is fitted too, which needs 4 sizes.

    Without E the exponent is too small if losses are near their floor. This is one reason to differ
    from Kaplan's exponent.
    """
    sizes, min_sizes = len({o.N for o in observations}), 4 if floor else 3
    require(sizes >= min_sizes, "sizes", sizes, f"at least {min_sizes} to fit L(N)")
    x, y = np.log([o.N for o in observations]), np.log([o.loss for o in observations])
    tokens = [o.D for o in observations]
    warnings = []
    if max(tokens) > SAME_LEVEL_RATIO * min(tokens):
        warnings.append(
            f"D runs from {min(tokens):.3g} to {max(tokens):.3g}, so alpha is not the effect of "
            "size alone"
        )
    if floor:
        k, alpha, E, residuals = _fit_with_floor(x, y)
    else:
        slope, intercept, residuals = _fit_line(list(x), list(y))
        k, E, alpha = (
            math.exp(intercept),
            0.0,
            Interval(-slope.value, -slope.ci_high, -slope.ci_low),
        )
    variation = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float((residuals**2).sum()) / variation if variation else math.nan
    return SizeLaw(k, alpha, E, r2, tuple(warnings))


def _fit_with_floor(x: Array, y: Array) -> tuple[float, Interval, float, Array]:
    """k, alpha with its t interval, E and the residuals (n,) for x (n,) and y (n,).

    The interval follows from the curvature at the minimum (delta method).
    """
    from scipy.stats import t

    centred = (x - x.mean())[None]
    starts = power_terms.starting_points(centred, y, math.inf)
    theta, objective = power_terms.minimize(
        starts, centred, y, np.ones((len(starts), len(y))), math.inf
    )
    best = theta[objective.argmin()][None]
    log_loss, shares = power_terms.predict_log_losses(best, centred)
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
