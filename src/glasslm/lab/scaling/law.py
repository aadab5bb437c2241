"""The law of Hoffmann et al. 2022 (arXiv:2203.15556), L(N, D) = E + A / N^alpha + B / D^beta: its optimum and its fit.

N parameters, D training tokens, C = 6 N D training FLOPs, losses in nats per token (any unit will do). Numbers in,
numbers out: nothing here trains or reads a file. Which parameters N counts is the caller's to say: exponents depend
on it (Porian et al., arXiv:2406.19146; Pearce and Song, arXiv:2406.12907).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glasslm.errors import InputError, require
from glasslm.lab.scaling import power_terms
from glasslm.lab.scaling.power_terms import Array

SIZES, BUDGETS, CELLS = 3, 3, 7  # the fewest that a fit takes; 5 sizes x 4 budgets is a design
ALIKE = 1.1  # values within this factor are one size or one budget: steps round what was planned
DELTA = 1e-3  # Hoffmann's


@dataclass(frozen=True)
class Observation:
    """A finished run: N parameters trained on D tokens to a loss. `flops` where they were counted, else 6 N D."""

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
        """What runs that differ in nothing but the seed have in common."""
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
    """L(N, D) = E + A / N^alpha + B / D^beta, and what it says is best for a compute C = 6 N D.

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
        """N_opt(C) = G (C / 6)^a and D_opt(C) = (C / 6)^b / G (equation 4 of the paper)."""
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
        """At the optimum; constant in C only where alpha = beta."""
        return self.D_opt(C) / self.N_opt(C)


@dataclass(frozen=True)
class Fit(Law):
    """A law as it was fitted, and how well."""

    objective: float  # the sum of the Huber losses of the log losses
    delta: float
    n: int  # runs
    cells: int  # different (N, D)
    residual_sd: float  # of the log loss about the fit, with 5 degrees of freedom spent: noise of seeds and misfit
    largest_C: float
    warnings: tuple[str, ...]  # parameters that the runs leave undetermined

    @property
    def freedom(self) -> int:
        """Degrees of freedom left; seeds of one cell share what the law cannot follow, and count once."""
        return self.cells - 5


def fit(observations: Sequence[Observation], delta: float = DELTA) -> Fit:
    """Approach 3 of the paper. The same runs give the same fit, in whatever order and units they come.

    Raises InputError where the design cannot tell the two exponents apart.
    """
    require(delta > 0, "delta", delta, "a number above 0 (inf is least squares)")
    require_design(observations)
    problem = Problem.of(observations)
    first = power_terms.starts(problem.x, problem.y, delta)
    theta, objective = power_terms.minimise(
        first, problem.x, problem.y, np.ones((len(first), problem.n)), delta
    )
    best = int(objective.argmin())
    law, cells = problem.law(theta[best]), len({o.cell for o in observations})
    squares = math.fsum(math.log(o.loss / law.loss(o.N, o.D)) ** 2 for o in observations)
    return Fit(
        alpha=law.alpha, beta=law.beta, A=law.A, B=law.B, E=law.E, objective=float(objective[best]), delta=delta,
        n=len(observations), cells=cells, residual_sd=math.sqrt(squares / (len(observations) - 5)),
        largest_C=float(max(o.C for o in observations)), warnings=_undetermined(theta[best], problem.y),
    )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Observations as power_terms takes them: x (2, n), the centred logs of N and D, and y (n,), the logs of the loss.

    Centred, because the height of a power law is known at the sizes that were trained, not at one parameter.
    """

    x: Array
    y: Array
    centre: Array  # (2, 1)

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> Problem:
        # sorted, so that the order of the runs does not decide how sums are rounded
        rows = sorted((math.log(o.N), math.log(o.D), math.log(o.loss)) for o in observations)
        logs = np.array(rows).T
        centre = logs[:2].mean(1, keepdims=True)
        return cls(logs[:2] - centre, logs[2], centre)

    @property
    def n(self) -> int:
        return len(self.y)

    def law(self, theta: Array) -> Law:
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
        N0, D0 = (float(value) for value in self.centre[:, 0])
        a, b = math.log(law.A) - law.alpha * N0, math.log(law.B) - law.beta * D0
        return np.array([math.log(law.E), a, law.alpha, b, law.beta])


def _undetermined(theta: Array, y: Array) -> tuple[str, ...]:
    low, high = power_terms.bounds(y, 2)
    found = []
    if theta[0] <= low[0] + 1:
        found.append(
            "E is 0 as far as these runs can tell: the losses are too far above their floor to show it"
        )
    for name, i in (("alpha", 2), ("beta", 4)):
        if not low[i] < theta[i] < high[i]:
            found.append(
                f"{name} = {theta[i]:g} is the edge of what was searched: the runs do not determine it"
            )
        if theta[i - 1] <= low[i - 1] + 1:
            what = "size" if name == "alpha" else "number of tokens"
            found.append(f"the loss does not depend on the {what}, so {name} means nothing")
    return tuple(found)


# -- the design -------------------------------------------------------------------------------------------------------


def levels(values: Sequence[float]) -> list[int]:
    """For each value the number of its group, from the smallest up; a group reaches up to ALIKE times its smallest."""
    group, starts = {}, [0.0]
    for value in sorted(set(values)):
        if value > ALIKE * starts[-1]:
            starts.append(value)
        group[value] = len(starts) - 2
    return [group[value] for value in values]


def budgets(observations: Sequence[Observation]) -> tuple[Literal["C", "D"], list[int]]:
    """What the design holds fixed across sizes, compute (IsoFLOP) or tokens (a grid), and each run's level of it."""
    by_compute, by_tokens = levels([o.C for o in observations]), levels([o.D for o in observations])
    return ("C", by_compute) if max(by_compute) < max(by_tokens) else ("D", by_tokens)


def require_design(observations: Sequence[Observation]) -> None:
    """Raise InputError unless five parameters can be fitted to these runs."""
    cells = {o.cell for o in observations}
    sizes = max(levels([N for N, _ in cells]), default=-1) + 1
    tokens = max(levels([D for _, D in cells]), default=-1) + 1
    cure = f"expected at least {SIZES} sizes x {BUDGETS} token budgets (and {CELLS} different cells); 5 x 4 is a design"
    if sizes < SIZES or tokens < BUDGETS or len(cells) < CELLS:
        seen = f"{len(cells)} cells of {sizes} sizes and {tokens} token budgets"
        raise InputError(f"{seen} are too few to fit a law of five parameters: {cure}")
    x, y = (np.array([math.log(cell[i]) for cell in cells]) for i in (0, 1))
    left = float(
        (y - np.polyval(np.polyfit(x, y, 1), x)).std()
    )  # of log D, once it is known which size it is
    if left < math.log(ALIKE):
        seen = "tokens follow from the size in every run (as in D = 20 N everywhere)"
        raise InputError(f"{seen}, so alpha and beta cannot be told apart: {cure}")
