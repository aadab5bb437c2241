"""For a given compute, which size on how many tokens; and when a scaling law should not be trusted with the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glasslm.errors import require
from glasslm.lab.scaling.checks import Bootstrap
from glasslm.lab.scaling.law import Interval, Observation

FAR = 10.0  # times the largest compute that was trained
EPOCHS = 4.0  # up to which repeated tokens are nearly worth fresh ones (Muennighoff et al. 2023, arXiv:2305.16264)
TOKENS_PER_PARAMETER = 20.0  # Hoffmann et al. 2022, as a rule of thumb


@dataclass(frozen=True)
class Choice:
    """N parameters on D tokens, and the loss that the fit predicts for a run of them."""

    N: float
    D: float
    loss: Interval | None

    @property
    def tokens_per_parameter(self) -> float:
        return self.D / self.N


@dataclass(frozen=True)
class Plan:
    """What to train with C FLOPs: by the rule of 20 tokens a parameter, and by a fit, where there is one."""

    C: float
    rule: Choice
    fitted: Choice | None
    N_opt: Interval | None  # the fit's doubt about the size
    banner: str | None


def plan(C: float, boot: Bootstrap | None = None) -> Plan:
    """N and D for C = 6 N D. The rule is N = sqrt(C / 120), D = 20 N."""
    require(math.isfinite(C) and C > 0, "compute", C, "FLOPs above 0")
    N = math.sqrt(C / (6 * TOKENS_PER_PARAMETER))
    D = TOKENS_PER_PARAMETER * N
    if boot is None:
        return Plan(C, Choice(N, D, None), None, None, None)
    best = boot.fit.N_opt(C), boot.fit.D_opt(C)
    return Plan(
        C=C,
        rule=Choice(N, D, boot.prediction(N, D)),
        fitted=Choice(*best, boot.prediction(*best)),
        N_opt=boot.interval(lambda law: law.N_opt(C), log=True),
        banner=extrapolation(C, boot.fit.largest_C),
    )


def extrapolation(C: float, largest_C: float) -> str | None:
    """The words to stand over a prediction that goes too far, or None."""
    factor = C / largest_C
    if factor <= FAR * (1 + 1e-9):
        return None
    return (
        f"Extrapolation: {C:.3g} FLOPs are {factor:.3g} times the largest compute that was trained "
        f"({largest_C:.3g}). Beyond {FAR:g} times, the intervals hold only if the law does."
    )


def repeated(observations: Sequence[Observation], unique_tokens: float) -> str:
    """A warning if runs went over their data more than four times: the law takes all tokens for fresh ones."""
    require(unique_tokens > 0, "unique tokens", unique_tokens, "a number above 0")
    epochs = [D / unique_tokens for _, D in sorted({o.cell for o in observations})]
    many = [each for each in epochs if each > EPOCHS]
    if not many:
        return ""
    return (
        f"{len(many)} of {len(epochs)} cells went more than {EPOCHS:g} times over the {unique_tokens:,.0f} tokens "
        f"there are, up to {max(many):.1f} times; repeated tokens are worth less than fresh ones (arXiv:2305.16264)."
    )
