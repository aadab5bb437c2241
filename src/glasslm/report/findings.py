"""What a diagnosis says about one signal: what was seen, what it means, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "watch", "bad"]
SEVERITY: dict[Verdict, int] = {"ok": 0, "watch": 1, "bad": 2}
HEADER = ("verdict", "signal", "what was seen", "what it means", "what to do")


@dataclass(frozen=True)
class Finding:
    """One signal judged. All are sentences, or parts of one, for a person; `seen` has the numbers and the steps."""

    signal: str
    verdict: Verdict
    seen: str
    means: str
    advice: str = ""

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of a table under HEADER."""
        return self.verdict, self.signal, self.seen, self.means, self.advice


def worst(findings: Sequence[Finding]) -> Verdict:
    """The verdict on all of them; ok when there are none."""
    return max((finding.verdict for finding in findings), key=SEVERITY.__getitem__, default="ok")
