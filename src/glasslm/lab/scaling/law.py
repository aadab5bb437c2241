"""The scaling law of Hoffmann et al. 2022 (arXiv:2203.15556): its optimum and its fit.

L(N, D) = E + A / N^alpha + B / D^beta. N parameters, D training tokens, C = 6 N D training FLOPs,
losses in nats per token (any unit works). This module only computes: it does not train and reads no
file. The caller decides which parameters N counts, and exponents depend on it (Porian et al.,
arXiv:2406.19146; Pearce and Song, arXiv:2406.12907).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from glasslm.errors import InputError, require
from glasslm.lab.scaling import power_terms
from glasslm.lab.scaling.power_terms import Array

MIN_SIZES, MIN_BUDGETS, MIN_CELLS = 3, 3, 7  # for a fit; 5 sizes x 4 budgets are recommended
SAME_SIZE_RATIO = 1.005  # sizes within this factor are one size, read inexactly
SAME_LEVEL_RATIO = 1.1  # values within this factor are one size or one budget: steps are rounded
HUBER_DELTA = 1e-3  # as in Hoffmann et al.


@dataclass(frozen=True)
class Observation:
    """A finished run: N parameters trained on D tokens to a loss.

    `flops` is the counted compute, if it is not 6 N D.
    """

    N: float
    D: float
    loss: float
    flops: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("N", self.N), ("D", self.D), ("loss", self.loss), ("C", self.C)):
            what = f"{name} of the run with N = {self.N:g}, D = {self.D:g}"
            require(
                math.isfinite(value) and value > 0,
                what,
                value,
                "a finite number above 0; leave diverged runs out",
            )

    @property
    def C(self) -> float:
        return 6 * self.N * self.D if self.flops is None else self.flops

    @property
    def cell(self) -> tuple[float, float]:
        """(N, D): the same for runs that differ only in the seed."""
        return self.N, self.D


@dataclass(frozen=True)
class Interval:
    """A number with its 95% interval."""

    value: float
    ci_low: float
    ci_high: float

    def __contains__(self, number: float) -> bool:
        return self.ci_low <= number <= self.ci_high


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, and its optimum for a compute C = 6 N D.

    >>> Law(alpha=0.34, beta=0.28, A=406.4, B=410.7, E=1.69).loss(70e9, 1.4e12)  # Chinchilla
    1.936...
    """

    alpha: float
    beta: float
    A: float
    B: float
    E: float

    def loss(self, N: float, D: float) -> float:
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    @property
    def a(self) -> float:
        """The exponent of N_opt(C)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """The exponent of D_opt(C)."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:
        """The factor in N_opt(C) = G (C / 6)^a and D_opt(C) = (C / 6)^b / G (equation 4)."""
        log_ratio = math.log(self.alpha * self.A) - math.log(self.beta * self.B)
        return math.exp(min(max(log_ratio / (self.alpha + self.beta), -700.0), 700.0))

    def N_opt(self, C: float) -> float:
        return self.G * (C / 6) ** self.a

    def D_opt(self, C: float) -> float:
        return (C / 6) ** self.b / self.G

    def optimal_loss(self, C: float) -> float:
        """The lowest loss that C FLOPs can reach."""
        return self.loss(self.N_opt(C), self.D_opt(C))

    def tokens_per_parameter(self, C: float) -> float:
        """D / N at the optimum; it depends on C unless alpha = beta."""
        return self.D_opt(C) / self.N_opt(C)


@dataclass(frozen=True)
class Fit(Law):
    """A fitted law, with its data and its error."""

    objective: float  # the sum of the Huber losses of the log losses
    delta: float
    n: int  # runs
    cells: int  # different (N, D)
    residual_sd: float  # of the log loss, fitted parameters subtracted: noise of seeds and misfit
    largest_C: float
    warnings: tuple[str, ...]  # parameters that the runs do not determine
    equal_exponents: bool = False  # alpha and beta were fitted as one

    @property
    def method(self) -> str:
        """The objective in words."""
        kind = "least squares" if self.delta == math.inf else f"Huber loss, delta {self.delta:g},"
        tied = "; alpha and beta are equal" if self.equal_exponents else ""
        return f"{kind} on the log loss, summed over {self.n} runs: {self.objective:.4g}{tied}"

    @property
    def degrees_of_freedom(self) -> int:
        """Cells minus parameters.

        Seeds of one cell count once, because they share the misfit of the law.
        """
        return self.cells - self.n_parameters

    @property
    def n_parameters(self) -> int:
        """The fitted parameters: five, or four with equal exponents."""
        return 4 if self.equal_exponents else 5

    @property
    def eta(self) -> float:
        """The exponent of C in L = E + (a M^eta + b M^-eta) C^-eta, M = D / N.

        That is the form of Gadre et al. 2024 (arXiv:2403.08540) for equal exponents.
        """
        return self.alpha / 2


def fit(
    observations: Sequence[Observation],
    delta: float = HUBER_DELTA,
    equal_exponents: bool = False,
    start: Law | None = None,
) -> Fit:
    """Fit the law to runs by approach 3 of the paper.

    The result does not depend on the order of the runs. With `start`, the law of nearly the same
    runs, the search begins there alone, which is much faster.

    Raises InputError if the design cannot tell the two exponents apart.
    """
    require(delta > 0, "delta", delta, "a number above 0 (inf is least squares)")
    require_design(observations)
    problem = Problem.from_observations(observations)
    if start is None:
        starts = power_terms.starting_points(problem.x, problem.y, delta)
    else:
        starts = np.clip(problem.theta(start), *power_terms.bounds(problem.y, 2))[None]
    theta, objective = power_terms.minimize(
        starts,
        problem.x,
        problem.y,
        np.ones((len(starts), problem.n)),
        delta,
        equal_exponents,
    )
    best = int(objective.argmin())
    law, cells = problem.law(theta[best]), len({o.cell for o in observations})
    squares = math.fsum(math.log(o.loss / law.loss(o.N, o.D)) ** 2 for o in observations)
    return Fit(
        alpha=law.alpha,
        beta=law.beta,
        A=law.A,
        B=law.B,
        E=law.E,
        objective=float(objective[best]),
        delta=delta,
        n=len(observations),
        cells=cells,
        residual_sd=math.sqrt(squares / (len(observations) - (4 if equal_exponents else 5))),
        largest_C=float(max(o.C for o in observations)),
        warnings=_undetermined_warnings(theta[best], problem.y),
        equal_exponents=equal_exponents,
    )


@dataclass(frozen=True)
class Problem:
    """Observations in the form of power_terms.

    x (2, n) are the centred logs of N and D, y (n,) the logs of the loss. The logs are centred
    because the runs determine the height of a power law at their sizes, not at one parameter.
    """

    x: Array
    y: Array
    centre: Array  # (2, 1)

    @classmethod
    def from_observations(cls, observations: Sequence[Observation]) -> Problem:
        # Sorted, so that the order of the runs does not affect the rounding of sums.
        rows = sorted((math.log(o.N), math.log(o.D), math.log(o.loss)) for o in observations)
        logs = np.array(rows).T
        centre = logs[:2].mean(1, keepdims=True)
        return cls(logs[:2] - centre, logs[2], centre)

    @property
    def n(self) -> int:
        return len(self.y)

    def law(self, theta: Array) -> Law:
        """The law with the parameters theta (5,) of power_terms."""
        e, a, alpha, b, beta = (float(value) for value in theta)
        N0, D0 = (float(value) for value in self.centre[:, 0])
        return Law(
            alpha=alpha,
            beta=beta,
            A=math.exp(a + alpha * N0),
            B=math.exp(b + beta * D0),
            E=math.exp(e),
        )

    def theta(self, law: Law) -> Array:
        """The parameters (5,) of a law, as power_terms needs them."""
        N0, D0 = (float(value) for value in self.centre[:, 0])
        a, b = math.log(law.A) - law.alpha * N0, math.log(law.B) - law.beta * D0
        return np.array([math.log(law.E), a, law.alpha, b, law.beta])


def _undetermined_warnings(theta: Array, y: Array) -> tuple[str, ...]:
    """A warning for each parameter of theta (5,) that the log losses y (n,) do not determine."""
    low, high = power_terms.bounds(y, 2)
    warnings = []
    if theta[0] <= low[0] + 1:
        warnings.append(
            "E is 0 as far as these runs can tell: their losses are too far above the floor"
        )
    for name, i in (("alpha", 2), ("beta", 4)):
        if not low[i] < theta[i] < high[i]:
            warnings.append(
                f"{name} = {theta[i]:g} is at the edge of the search: the runs do not determine it"
            )
        if theta[i - 1] <= low[i - 1] + 1:
            variable = "size" if name == "alpha" else "number of tokens"
            warnings.append(f"the loss does not depend on the {variable}, so {name} has no meaning")
    return tuple(warnings)


def merge_sizes(observations: Sequence[Observation]) -> tuple[list[Observation], str]:
    """The runs with sizes that differ by less than SAME_SIZE_RATIO made equal, and a sentence.

    Sizes that were read off a plot are inexact: 2.78e8 and 2.781e8 are one size. Such a group gets
    its median. The sentence is "" where no size changes.
    """
    sizes = sorted({o.N for o in observations})
    groups: list[list[float]] = []
    for size in sizes:
        if groups and size < SAME_SIZE_RATIO * groups[-1][0]:
            groups[-1].append(size)
        else:
            groups.append([size])
    merged = {size: group[len(group) // 2] for group in groups for size in group}
    n_moved = sum(merged[o.N] != o.N for o in observations)
    if not n_moved:
        return list(observations), ""
    moved = [
        o if merged[o.N] == o.N else replace(o, N=merged[o.N], flops=o.C) for o in observations
    ]
    return moved, (
        f"{len(sizes)} sizes are taken as {len(groups)}, because some differ by less than "
        f"{SAME_SIZE_RATIO - 1:.1%}: N of {n_moved} runs was moved by that at most."
    )


# -- the design ------------------------------------------------------------------------------------


def levels(values: Sequence[float]) -> list[int]:
    """The group of each value, from the smallest up; a group spans a factor of SAME_LEVEL_RATIO."""
    group, starts = {}, [0.0]
    for value in sorted(set(values)):
        if value > SAME_LEVEL_RATIO * starts[-1]:
            starts.append(value)
        group[value] = len(starts) - 2
    return [group[value] for value in values]


def budgets(observations: Sequence[Observation]) -> tuple[Literal["C", "D"], list[int]]:
    """The quantity that the design fixes across sizes, and each run's level of it.

    An IsoFLOP design fixes compute ("C"), a grid fixes tokens ("D").
    """
    by_compute, by_tokens = levels([o.C for o in observations]), levels([o.D for o in observations])
    return ("C", by_compute) if max(by_compute) < max(by_tokens) else ("D", by_tokens)


def require_design(observations: Sequence[Observation]) -> None:
    """Raise InputError unless the five parameters can be fitted to these runs."""
    cells = {o.cell for o in observations}
    sizes = max(levels([N for N, _ in cells]), default=-1) + 1
    tokens = max(levels([D for _, D in cells]), default=-1) + 1
    cure = (
        f"expected at least {MIN_SIZES} sizes x {MIN_BUDGETS} token budgets and {MIN_CELLS} "
        "different cells (5 x 4 are recommended)"
    )
    if sizes < MIN_SIZES or tokens < MIN_BUDGETS or len(cells) < MIN_CELLS:
        design = f"{len(cells)} cells of {sizes} sizes and {tokens} token budgets"
        raise InputError(f"{design} are too few to fit a law of five parameters: {cure}")
    x, y = (np.array([math.log(cell[i]) for cell in cells]) for i in (0, 1))
    # The variation of log D that the size does not determine.
    residual_sd = float((y - np.polyval(np.polyfit(x, y, 1), x)).std())
    if residual_sd < math.log(SAME_LEVEL_RATIO):
        design = "tokens follow from the size in every run (as in D = 20 N everywhere)"
        raise InputError(f"{design}, so alpha and beta cannot be told apart: {cure}")
