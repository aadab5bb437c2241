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

    The texts are for a person; `seen` holds the measured numbers and their steps. The names of the
    fields are keys of `glasslm diagnose --json`.
    """

    signal: str
    verdict: Verdict
    seen: str
    means: str
    advice: str = ""

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of a table under HEADER."""
        return self.verdict, self.signal, self.seen, self.means, self.advice


def worst_verdict(findings: Sequence[Finding]) -> Verdict:
    """The most severe verdict; ok if there are no findings."""
    return max((finding.verdict for finding in findings), key=SEVERITY.__getitem__, default="ok")
