"""Plans for a compute: which model size on how many tokens; warnings about extrapolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glasslm.errors import require
from glasslm.lab.scaling.law import Interval, Observation
from glasslm.lab.scaling.uncertainty import Bootstrap

MAX_EXTRAPOLATION = 10.0  # times the largest compute that was trained
MAX_EPOCHS = (
    4.0  # with more, repeated tokens are worth less (Muennighoff et al. 2023, arXiv:2305.16264)
)
TOKENS_PER_PARAMETER = 20.0  # the rule of thumb of Hoffmann et al. 2022


@dataclass(frozen=True)
class Allocation:
    """N parameters on D tokens, and the loss that the fit predicts for such a run."""

    N: float
    D: float
    loss: Interval | None

    @property
    def tokens_per_parameter(self) -> float:
        return self.D / self.N


@dataclass(frozen=True)
class ComputePlan:
    """What to train with C FLOPs: by the rule of 20 tokens per parameter, and by a fit, if any."""

    C: float
    rule: Allocation
    fitted: Allocation | None
    N_opt: Interval | None  # the optimal size by the fit
    warning: str | None


def plan_compute(C: float, bootstrap: Bootstrap | None = None) -> ComputePlan:
    """N and D for C = 6 N D. The rule is N = sqrt(C / 120), D = 20 N."""
    require(math.isfinite(C) and C > 0, "compute", C, "FLOPs above 0")
    N = math.sqrt(C / (6 * TOKENS_PER_PARAMETER))
    D = TOKENS_PER_PARAMETER * N
    if bootstrap is None:
        return ComputePlan(C, Allocation(N, D, None), None, None, None)
    best = bootstrap.fit.N_opt(C), bootstrap.fit.D_opt(C)
    return ComputePlan(
        C=C,
        rule=Allocation(N, D, bootstrap.prediction(N, D)),
        fitted=Allocation(*best, bootstrap.prediction(*best)),
        N_opt=bootstrap.interval(lambda law: law.N_opt(C), log=True),
        warning=extrapolation_warning(C, bootstrap.fit.largest_C),
    )


def extrapolation_warning(C: float, largest_C: float) -> str | None:
    """A warning for a prediction far above the largest trained compute, or None."""
    factor = C / largest_C
    if factor <= MAX_EXTRAPOLATION * (1 + 1e-9):
        return None
    return (
        f"Extrapolation: {C:.3g} FLOPs are {factor:.3g} times the largest compute that was "
        f"trained ({largest_C:.3g}). Above {MAX_EXTRAPOLATION:g} times, the intervals are valid "
        "only if the law still holds."
    )


def repetition_warning(observations: Sequence[Observation], unique_tokens: float) -> str:
    """A warning if runs repeated their text more than MAX_EPOCHS times, or "".

    The law assumes fresh tokens.
    """
    require(unique_tokens > 0, "unique tokens", unique_tokens, "a number above 0")
    epochs = [D / unique_tokens for _, D in sorted({o.cell for o in observations})]
    excessive = [count for count in epochs if count > MAX_EPOCHS]
    if not excessive:
        return ""
    return (
        f"{len(excessive)} of {len(epochs)} cells went more than {MAX_EPOCHS:g} times over the "
        f"{unique_tokens:,.0f} tokens of the text, up to {max(excessive):.1f} times; repeated "
        "tokens are worth less than fresh ones (arXiv:2305.16264)."
    )
