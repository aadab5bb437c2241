"""All mistakes that predict what a learner's function returned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from glasslm.course.learn.comparison import is_numeric
from glasslm.course.learn.exercise import Case, Exercise, Mistake
from glasslm.course.learn.hypotheses import (
    Finding,
    Results,
    factor_hypotheses,
    factor_pair_hypotheses,
    part_hypotheses,
    row_findings,
    scaled_terms,
    shape_hypotheses,
    zero_findings,
)
from glasslm.course.learn.observation import Observation
from glasslm.course.learn.term_weights import weigh_terms

ROUNDED = "is only as exact as float32"


def explain(
    exercise: Exercise,
    wrong: Sequence[str],
    cases: Sequence[Case],
    observations: Sequence[Observation],
    with_general: bool = True,
) -> list[Finding]:
    """The mistakes that predict every number, those first that explain the most outputs.

    `with_general` also tries the mistakes that all exercises share.
    """
    references = [exercise.compute(case) for case in cases]
    results = {
        name: Results(
            name, references, [o.results[name] for o in observations], name in exercise.outputs
        )
        for name in wrong
        if all(name in o.results for o in observations)
    }
    for order in list(itertools.permutations(results))[1:]:
        if all(results[name].fits(results[other].totals) for name, other in zip(results, order)):
            sentence = f"the order of the results: expected {', '.join(results)}, got "
            return [Finding("other", sentence + ", ".join(order), next(iter(results)))]
    findings: list[Finding] = []
    for result in results.values():
        findings += _known_mistakes(exercise, result, cases)
        if with_general:
            findings += _general_mistakes(exercise, result, cases, bool(findings))
    outputs = {
        verdict: {finding.output for finding in findings if finding.verdict == verdict}
        for verdict, _, _ in findings
    }
    return sorted(findings, key=lambda finding: -len(outputs[finding.verdict]))


def _list_mistakes(exercise: Exercise, name: str) -> Iterator[Mistake]:
    """The exercise's mistakes that change an output or gradient."""
    for mistake in exercise.mistakes:
        is_gradient = mistake.output == "gradients" and name in exercise.gradients
        if mistake.output == name or is_gradient:
            yield mistake


def _known_mistakes(
    exercise: Exercise, results: Results, cases: Sequence[Case]
) -> Iterator[Finding]:
    """The exercise's own mistakes that predict the results."""
    for mistake in _list_mistakes(exercise, results.name):
        with suppress(ValueError, IndexError):  # a mistake may need other sizes
            predictions = [
                exercise.compute(case, **mistake.changes).total(results.name) for case in cases
            ]
            if results.fits(predictions):
                yield Finding(mistake.verdict, mistake.sentence, results.name)


def _general_mistakes(
    exercise: Exercise, results: Results, cases: Sequence[Case], is_explained: bool
) -> list[Finding]:
    """The mistakes that all exercises share."""
    name = results.name
    if not all(isinstance(a, np.ndarray) and is_numeric(a) for a in results.actual):
        return []
    if not all(isinstance(total, np.ndarray) for total in results.totals):
        return []
    findings = list(weigh_terms(results, cases))
    for hypotheses in (part_hypotheses, factor_hypotheses, shape_hypotheses):
        findings += [
            Finding(hypothesis.verdict, hypothesis.sentence, name)
            for hypothesis in hypotheses(results)
            if results.fits(hypothesis.predictions)
        ]
    findings += _missing_dy(exercise, results, cases)
    if not findings and not is_explained:
        findings += _rounded_or_undefined(results)
    if not findings and not is_explained:
        findings += zero_findings(results)
    return findings


def explain_combined(
    exercise: Exercise, results: Results, cases: Sequence[Case]
) -> Iterator[Finding]:
    """Two mistakes at once: a known one with other weights, two factors, one factor a row.

    They are less certain than those of `explain`: take them where it finds nothing.
    """
    name = results.name
    if not all(isinstance(a, np.ndarray) and is_numeric(a) for a in results.actual):
        return
    if any(a.shape != total.shape for a, total in zip(results.actual, results.totals)):
        return
    for mistake in _list_mistakes(exercise, name):
        with suppress(ValueError, IndexError):
            changed = [exercise.compute(case, **mistake.changes) for case in cases]
            for finding in weigh_terms(results._replace(references=changed), cases):
                yield Finding(mistake.verdict, f"{mistake.sentence}; {finding.sentence}", name)
                yield finding
    for hypothesis in factor_pair_hypotheses(results):
        if results.fits(hypothesis.predictions):
            yield Finding(hypothesis.verdict, hypothesis.sentence, name)
    for sentence, changed in scaled_terms(results):
        for finding in weigh_terms(results._replace(references=changed), cases):
            yield Finding("factor", f"{sentence}; {finding.sentence}", name)
    if name in exercise.gradients:
        yield from row_findings(results)


def _missing_dy(exercise: Exercise, results: Results, cases: Sequence[Case]) -> Iterator[Finding]:
    """The gradient of the sum of the output: dy is not used."""
    name = results.name
    if name not in exercise.gradients or not isinstance(cases[0].dy, np.ndarray):
        return
    ones = [exercise.compute(Case(c.sizes, c.inputs, c.options, np.ones_like(c.dy))) for c in cases]
    if results.fits([reference.total(name) for reference in ones]):
        yield Finding("factor", f"dy is left out of {name}", name)
    if results.fits([case.dy for case in cases]):
        yield Finding("missing_term", f"{name} is dy itself: the derivative is left out", name)


def _rounded_or_undefined(results: Results) -> Iterator[Finding]:
    """Results that are only as exact as float32, or not finite."""
    name, pairs = results.name, list(zip(results.actual, results.totals))
    is_rounded = all(
        actual.shape == total.shape and np.allclose(actual, total, 1e-5, 1e-6)
        for actual, total in pairs
    )
    if is_rounded:
        yield Finding("dtype", f"{name} {ROUNDED}", name)
    if any(np.isfinite(total).all() and not np.isfinite(actual).all() for actual, total in pairs):
        yield Finding("unstable", f"{name} is not finite for ordinary values", name)
