"""The verdict on one function: what is right, what is wrong, and the smallest example."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from glasslm.course.learn.exercise import Exercise, VerdictName

Mark = Literal["right", "wrong", "missing", "unknown"]

# The rows of an example that are not inputs.
EXAMPLE_FACTS = ("sizes", "output", "got", "wanted", "changed")


@dataclass(frozen=True)
class Verdict:
    """What the checker says about one function. The fields are those of `learn check --json`.

    Args:
        exercise: The exercise; "" where the file names none.
        forward: Mark of the forward pass.
        backward: Mark of the backward pass; "missing" where there is none to write.
        verdict: The kind of mistake, or "right".
        sentence: What is wrong.
        where: The place in the learner's file, or in the derivation.
        also: Other verdicts that predict the same numbers.
        example: The smallest case that fails: sizes, inputs, output, got and wanted.
    """

    exercise: str
    forward: Mark
    backward: Mark
    verdict: VerdictName
    sentence: str
    where: str = ""
    also: tuple[str, ...] = ()
    example: dict[str, Any] | None = field(default=None)

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return self.verdict == "right"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self) | {"also": list(self.also)}

    def __str__(self) -> str:
        marks = f"forward {self.forward}"
        if self.backward != "missing" or self.verdict == "not_implemented":
            marks += f", backward {self.backward}"
        lines = [f"{self.exercise}: {marks}"]
        if self.is_right:
            return f"{lines[0]}: {self.sentence}"
        lines.append(f"{self.verdict.replace('_', ' ')}: {self.sentence}")
        if self.also:
            lines.append(f"could also be: {', '.join(self.also).replace('_', ' ')}")
        if self.where:
            lines.append(f"look at: {self.where}")
        if self.example:
            lines += ["", *_format_example(self.example)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The verdict as Jupyter shows it."""
        head, *others = str(self).split("\n")
        color = "#1a7f37" if self.is_right else "#cf222e"
        text = html.escape("\n".join(others))
        return (
            f'<div><b style="color:{color}">{html.escape(head)}</b>'
            f'<pre style="margin:0.5em 0">{text}</pre></div>'
        )


def failed_verdict(exercise: Exercise, sentence: str, where: str = "") -> Verdict:
    """The verdict on code that gave no results."""
    backward: Mark = "unknown" if exercise.has_backward else "missing"
    return Verdict(exercise.name, "unknown", backward, "exception", sentence, where)


def _format_example(example: dict[str, Any]) -> list[str]:
    """The example as lines: inputs first, then what came out beside what was wanted."""
    sizes = ", ".join(f"{name} = {value:g}" for name, value in example.get("sizes", {}).items())
    lines = [f"smallest example ({sizes}):" if sizes else "smallest example:"]
    inputs = {name: value for name, value in example.items() if name not in EXAMPLE_FACTS}
    if "changed" in example:
        results = {"changed": example["changed"]}
    else:
        output = example["output"]
        results = {f"your {output}": example["got"], f"right {output}": example["wanted"]}
    width = max(map(len, (*inputs, *results)))
    for name, value in (inputs | results).items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"  {name:<{width}}  {text if len(text) <= 300 else text[:300] + ' ...'}")
    return lines
