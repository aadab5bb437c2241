"""Weights of a result's terms by least squares: 0 is a term left out, -1 a sign, else a factor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from glasslm.course.learn.comparison import is_equal, scale_of
from glasslm.course.learn.exercise import Array, Case, VerdictName
from glasslm.course.learn.hypotheses import Finding, Results

NUMBERS = {
    "1": 1.0,
    "0": 0.0,
    "-1": -1.0,
    "2": 2.0,
    "1/2": 0.5,
    "3": 3.0,
    "1/3": 1 / 3,
    "-2": -2.0,
    "-1/2": -0.5,
    "4": 4.0,
    "1/4": 0.25,
}
POWERS = {"{}": 1, "1/{}": -1, "sqrt({})": 0.5, "1/sqrt({})": -0.5, "{}²": 2, "1/{}²": -2}


def weigh_terms(results: Results, cases: Sequence[Case]) -> Iterator[Finding]:
    """The finding that other weights of the terms give, if they predict every number."""
    name, terms = results.name, results.terms
    weights = _fit_weights(results)
    if weights is None:
        return
    labels = [name_factor(column, cases) for column in weights.T]
    if np.allclose(np.nanmin(weights, axis=1), np.nanmax(weights, axis=1)):
        common = name_factor(np.nanmax(weights, axis=1), cases)  # of the whole output
        if common is None and all(actual.size == 1 for actual in results.actual):
            return  # any number is another number times a factor
        labels = [common or "a number that differs from case to case"] * len(terms)
    changed = [(term, label) for term, label in zip(terms, labels) if label != "1"]
    if not changed or (None in labels and len(terms) > 1):
        return
    yield Finding(*_explain_weights(name, terms, changed), name)


def _fit_weights(results: Results) -> Array | None:
    """One row of weights for each case; None where no weights predict the results.

    The weight of a term that is zero in a case is NaN there: it cannot be known.
    """
    rows = []
    for reference, actual in zip(results.references, results.actual):
        total = reference.total(results.name)
        columns = np.stack(
            [np.ravel(term) for term in reference.terms[results.name].values()], axis=1
        )
        if total.shape != actual.shape or not np.isfinite(actual).all():
            return None
        if not np.isfinite(columns).all() or not columns.any():
            return None
        known = np.any(columns != 0, axis=0)
        if np.linalg.matrix_rank(columns[:, known]) < known.sum():
            return None
        weights = np.full(columns.shape[1], np.nan)
        weights[known] = np.linalg.lstsq(columns[:, known], actual.ravel().astype(float))[0]
        predicted = (columns[:, known] @ weights[known]).reshape(actual.shape)
        if not is_equal(predicted, actual, scale_of(reference, results.name)):
            return None
        rows.append(weights)
    return np.array(rows)


def _explain_weights(
    name: str, terms: list[str], changed: list[tuple[str, str | None]]
) -> tuple[VerdictName, str]:
    """The verdict and the sentence for terms with other weights."""
    labels = {label for _, label in changed}
    is_whole = len(changed) == len(terms)
    if labels == {"0"} and is_whole:
        return "not_implemented", f"{name} is zero everywhere"
    if "0" in labels:
        missing = ", ".join(term for term, label in changed if label == "0")
        return "missing_term", f"{name} lacks the term {missing}"
    where = name if is_whole else "; ".join(f"the term {term} of {name}" for term, _ in changed)
    if labels == {"-1"}:
        return "sign", f"the sign of {where} is wrong"
    values = " and ".join(sorted(map(str, labels)))
    return "factor", f"{where} is multiplied by {values}"


def name_factor(values: Array, cases: Sequence[Case]) -> str | None:
    """Numbers, one a case, as a constant or a power of a size; None if nothing fits.

    With D = 7 in the first case and 4 in the second, [7, 4] is "D" and [1/7, 1/4] is "1/D". NaN is
    an unknown number.
    """
    known = ~np.isnan(values)
    values, cases = values[known], [case for case, is_known in zip(cases, known) if is_known]
    if not len(values):
        return "1"

    def fits(expected: Array | float) -> bool:
        return np.allclose(values, expected, rtol=1e-5, atol=1e-9)

    for label, number in NUMBERS.items():
        if fits(number):
            return label
    for names, bases in _list_bases(cases):
        for form, power in POWERS.items():
            for sign in (1, -1):
                if fits(sign * bases**power):
                    return ("-" if sign < 0 else "") + form.format(names)
    return f"{values[0]:.5g}" if fits(values[0]) else None


def _list_bases(cases: Sequence[Case]) -> Iterator[tuple[str, Array]]:
    """Sizes, products of two and quotients of two: their name, and their value in each case."""
    names = [name for name in cases[0].sizes if all(case.sizes[name] for case in cases)]
    for name in names:
        yield name, np.array([case.sizes[name] for case in cases], float)
    for a, b in itertools.combinations(names, 2):
        yield f"{a} {b}", np.array([math.prod((c.sizes[a], c.sizes[b])) for c in cases], float)
    for a, b in itertools.permutations(names, 2):
        yield f"({a} / {b})", np.array([case.sizes[a] / case.sizes[b] for case in cases], float)
