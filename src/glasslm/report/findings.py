"""A finding: the verdict on one signal, with what was measured, what it means and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "watch", "bad"]
SEVERITY: dict[Verdict, int] = {"ok": 0, "watch": 1, "bad": 2}
HEADER = ("verdict", "signal", "measured", "meaning", "what to do")


@dataclass(frozen=True)
class Finding:
    """The verdict on one signal.

    The texts are for a person; `evidence` holds the measured numbers and their steps.
    """

    signal: str
    verdict: Verdict
    evidence: str
    meaning: str
    advice: str = ""

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of a table under HEADER."""
        return self.verdict, self.signal, self.evidence, self.meaning, self.advice

    @property
    def facts(self) -> dict[str, str]:
        """The same for JSON; the keys `seen` and `means` are older than the fields."""
        return {
            "signal": self.signal,
            "verdict": self.verdict,
            "seen": self.evidence,
            "means": self.meaning,
            "advice": self.advice,
        }


def worst_verdict(findings: Sequence[Finding]) -> Verdict:
    """The most severe verdict; ok if there are no findings."""
    return max((finding.verdict for finding in findings), key=SEVERITY.__getitem__, default="ok")
