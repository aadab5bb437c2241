"""One check of one function: its cases, its calls, and how a mistake becomes a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from glasslm.course.learn.comparison import wrong_results
from glasslm.course.learn.example import find_changed_example, find_example
from glasslm.course.learn.exercise import Case, Exercise, VerdictName
from glasslm.course.learn.finite_differences import is_gradient_of_forward
from glasslm.course.learn.hypotheses import Finding
from glasslm.course.learn.observation import Observation, Stage, observe
from glasslm.course.learn.verdict import Mark, Verdict

Names = tuple[str, ...]


class Trial:
    """The cases of one check, and what the function did with those whose sizes all differ."""

    def __init__(self, function: Callable[..., Any], exercise: Exercise, seed: int) -> None:
        self.function, self.exercise, self.seed = function, exercise, seed
        sizes = exercise.sizes
        self.small = exercise.draw_cases(sizes.small, seed)
        self.distinct = exercise.draw_cases(sizes.distinct, seed, start=1)
        self.equal = exercise.draw_cases(sizes.equal, seed, start=2)
        self.observations = [self.observe(case) for case in self.distinct]

    @property
    def stages(self) -> tuple[tuple[Stage, Names], ...]:
        """The two stages, each with the names of its results."""
        return ("forward", self.exercise.outputs), ("backward", self.exercise.gradients)

    def stage_of(self, name: str) -> Stage:
        """The stage that gives a result."""
        return "forward" if name in self.exercise.outputs else "backward"

    def observe(self, case: Case) -> Observation:
        """What the function does with a case."""
        return observe(self.function, self.exercise, case)

    def wrong_names(
        self, cases: Sequence[Case], observations: Sequence[Observation], names: Names
    ) -> list[str]:
        """The results that are wrong in any of the cases."""
        return [
            name
            for name in names
            if any(
                wrong_results(self.exercise, case, observation, (name,))
                for case, observation in zip(cases, observations)
            )
        ]

    def verdict(
        self,
        verdict: VerdictName,
        sentence: str,
        stage: Stage,
        output: str = "",
        also: Sequence[VerdictName] = (),
        example: dict[str, Any] | None = None,
    ) -> Verdict:
        """A verdict with the marks that follow from the stage at which it was found."""
        forward: Mark = "right"
        backward: Mark = "missing"
        if stage == "forward":
            forward = "missing" if verdict == "not_implemented" else "wrong"
            backward = self._mark_backward() if self.exercise.has_backward else "missing"
        elif verdict != "not_implemented":
            backward = "wrong"
        section = self.exercise.derivation
        place = f"docs/backward.md, {section}, {stage}" if section else stage
        where = f"{place}: {output}" if output else place
        others = tuple(sorted(set(also) - {verdict}))
        return Verdict(
            self.exercise.name, forward, backward, verdict, sentence, where, others, example
        )

    def right_verdict(self) -> Verdict:
        """The verdict on a function without a mistake."""
        backward: Mark = "right" if self.exercise.has_backward else "missing"
        return Verdict(self.exercise.name, "right", backward, "right", "right up to rounding")

    def found_verdict(self, findings: Sequence[Finding], cases: Sequence[Case]) -> Verdict:
        """The verdict of the first finding; the others stand in `also`."""
        verdict, sentence, name = findings[0]
        example = self.example(name, cases)
        also = [finding.verdict for finding in findings if finding.output == name]
        return self.verdict(verdict, sentence, self.stage_of(name), name, also, example)

    def changed_verdict(self, changed: str) -> Verdict:
        """The verdict on an argument that is changed in place."""
        stage: Stage = "backward" if "by backward" in changed else "forward"
        cases = self.small + self.distinct
        example = find_changed_example(self.function, self.exercise, cases)
        sentence = f"{changed} is changed in place: work on a copy"
        return self.verdict("mutates_input", sentence, stage, example=example)

    def example(
        self, name: str, cases: Sequence[Case], tolerance: float = 0.0
    ) -> dict[str, Any] | None:
        """The smallest of `cases` in which a result is wrong."""
        return find_example(self.function, self.exercise, cases, name, tolerance)

    def _mark_backward(self) -> Mark:
        """The mark of a backward pass whose forward pass is wrong: is it the gradient of that?"""
        if not all(self.exercise.outputs[0] in o.results for o in self.observations):
            return "unknown"
        with suppress(Exception):  # the learner's code may raise anything
            is_right = is_gradient_of_forward(self.function, self.exercise, self.distinct[0])
            return "right" if is_right else "wrong"
        return "unknown"
