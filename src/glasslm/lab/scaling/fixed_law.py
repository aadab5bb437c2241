"""Test a law that was known before: do runs accept or reject it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glasslm.errors import InputError, require
from glasslm.lab.scaling.law import Law, Observation, fit

ORDER = ("A", "B", "E", "alpha", "beta")
SIGNIFICANCE = 0.05


class LawTest(NamedTuple):
    """The F test of a fixed law against the fitted one."""

    law: Law
    p: float
    mean_error: float  # of the loss, relative: positive where the runs are above the law
    spread: float  # standard deviation of the residuals around the law, relative

    @property
    def accepted(self) -> bool:
        """Whether the runs agree with the law, as far as they can tell."""
        return self.p >= SIGNIFICANCE

    @property
    def sentence(self) -> str:
        law = self.law
        verdict = "accept" if self.accepted else "reject"
        return (
            f"The runs {verdict} L = {law.E:g} + {law.A:g} / N^{law.alpha:g} + {law.B:g} / "
            f"D^{law.beta:g} (F test against the fit, p = {self.p:.3g}): their losses are "
            f"{self.mean_error:+.2%} from it in the mean, with a spread of {self.spread:.2%}."
        )


class TieTest(NamedTuple):
    """The F test of equal exponents against two of their own."""

    p: float

    @property
    def accepted(self) -> bool:
        """Whether the runs agree with equal exponents, as far as they can tell."""
        return self.p >= SIGNIFICANCE

    @property
    def sentence(self) -> str:
        verdict = "accept" if self.accepted else "reject"
        return f"The runs {verdict} alpha = beta (F test against two exponents, p = {self.p:.3g})."


def parse_law(text: str) -> Law:
    """The law of "A,B,E,alpha,beta". Raises InputError for anything else."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != len(ORDER) or not all(math.isfinite(value) for value in values):
        raise InputError(
            f"--law {text}: expected five numbers A,B,E,alpha,beta, as in 406.4,410.7,1.69,.34,.28"
        )
    named = dict(zip(ORDER, values))
    for name, value in named.items():
        require(value > 0 or (name == "E" and value == 0), f"--law: {name}", value, "above 0")
    return Law(**named)


def compare_law(law: Law, observations: Sequence[Observation]) -> LawTest:
    """The F test of `law` on runs: five parameters fixed against five fitted by least squares.

    Cells count, not runs, because the seeds of a cell share the misfit of the law.
    """
    from scipy.stats import f

    fitted = fit(observations, math.inf)
    fixed, free = (
        np.array([math.log(run.loss / model.loss(run.N, run.D)) for run in observations])
        for model in (law, fitted)
    )
    freedom = fitted.degrees_of_freedom
    unexplained = max(float((free**2).sum()), 1e-24 * len(free))
    ratio = max(float((fixed**2).sum()) - unexplained, 0.0) / 5 / (unexplained / freedom)
    return LawTest(
        law, float(f.sf(ratio, 5, freedom)), math.expm1(float(fixed.mean())), float(fixed.std())
    )


def compare_tie(observations: Sequence[Observation]) -> TieTest:
    """The F test of one exponent against two, both fitted by least squares. Cells count."""
    from scipy.stats import f

    free = fit(observations, math.inf)
    tied = fit(observations, math.inf, equal_exponents=True)
    freedom = free.degrees_of_freedom
    unexplained = max(free.objective, 1e-24 * len(observations))
    ratio = max(tied.objective - unexplained, 0.0) / (unexplained / freedom)
    return TieTest(float(f.sf(ratio, 1, freedom)))
