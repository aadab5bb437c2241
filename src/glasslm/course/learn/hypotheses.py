"""General mistakes, as predictions: what an output would be if the learner had made one.

Each function here takes the references and the results of some cases and yields hypotheses. One
that predicts every number of every case is an explanation. The mistakes of a single exercise are
in its file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from glasslm.course.learn.comparison import is_equal, scale_of
from glasslm.course.learn.exercise import Array, Reference, VerdictName


class Finding(NamedTuple):
    """A mistake that explains an output or gradient."""

    verdict: VerdictName
    sentence: str
    output: str


class Hypothesis(NamedTuple):
    """A mistake and the results that it predicts, one for each case."""

    verdict: VerdictName
    sentence: str
    predictions: list[Array]


class Results(NamedTuple):
    """One output of several cases: the references, and what the learner's function returned."""

    name: str
    references: Sequence[Reference]
    actual: Sequence[Array]
    is_output: bool  # of the function; otherwise a gradient, from backward

    @property
    def totals(self) -> list[Array]:
        """The right results."""
        return [reference.total(self.name) for reference in self.references]

    @property
    def terms(self) -> list[str]:
        """The names of the terms."""
        return list(self.references[0].terms[self.name])

    def fits(self, predictions: Sequence[Array]) -> bool:
        """Whether every prediction equals what was returned."""
        return all(
            is_equal(prediction, actual, scale_of(reference, self.name))
            for prediction, actual, reference in zip(
                predictions, self.actual, self.references, strict=True
            )
        )


def shape_hypotheses(results: Results) -> Iterator[Hypothesis]:
    """Axes exchanged, summed away, kept or spread again."""
    name, totals = results.name, results.totals
    dimensions = totals[0].ndim
    for axes in list(itertools.permutations(range(dimensions)))[1:]:  # the first changes nothing
        turned = [total.transpose(axes) for total in totals]
        yield Hypothesis("transposed", f"{name} is transposed: its axes are {axes}", turned)
        reshaped = [a.reshape(b.shape) for a, b in zip(turned, totals)]
        yield Hypothesis("transposed", f"{name} is transposed and reshaped back", reshaped)
    for axis in (None, *range(dimensions)):
        where = "everything" if axis is None else f"axis {axis}"
        for kind in ("sum", "mean"):
            verdict: VerdictName = "shape" if results.is_output else "axis"
            sentence = f"{name} is the {kind} over {where} of what it should be"
            yield Hypothesis(verdict, sentence, [getattr(a, kind)(axis) for a in totals])
            spread = [
                np.broadcast_to(getattr(a, kind)(axis, keepdims=True), a.shape) for a in totals
            ]
            yield Hypothesis("axis", f"{sentence}, repeated along it", spread)
    same_numbers = [
        total.reshape(actual.shape) if total.size == actual.size else total
        for total, actual in zip(totals, results.actual)
    ]
    yield Hypothesis("shape", f"{name} has the right numbers in another shape", same_numbers)


def part_hypotheses(results: Results) -> Iterator[Hypothesis]:
    """A sum left out, taken over other axes, or assigned instead of added."""
    name, references = results.name, results.references
    if name not in references[0].parts:
        return
    parts, count = [r.parts[name][0] for r in references], references[0].parts[name][1]
    for length in range(1, count + 1):
        for axes in itertools.combinations(range(count), length):
            yield from _without_sum(results, parts, count, axes)
    if count > 1:
        return
    yield Hypothesis(
        "missing_sum", f"the sum in {name} leaves out the first", [a[1:].sum(0) for a in parts]
    )
    yield Hypothesis(
        "missing_sum", f"the sum in {name} leaves out the last", [a[:-1].sum(0) for a in parts]
    )
    inner_axes = range(1, parts[0].ndim)
    for over in [tuple(inner_axes), *((axis,) for axis in inner_axes)]:
        is_dy = name == "dtable" and over == (1,)
        sentence = (
            "dtable is dy, not added up by token"
            if is_dy
            else f"{name} is summed over a wrong axis"
        )
        yield Hypothesis("missing_sum" if is_dy else "axis", sentence, [a.sum(over) for a in parts])
    yield from _factors_in_sum(results, parts)


def _without_sum(
    results: Results, parts: list[Array], count: int, axes: tuple[int, ...]
) -> Iterator[Hypothesis]:
    """The gradient when the sum over `axes` of its parts is left out."""
    name = results.name
    others = tuple(axis for axis in range(count) if axis not in axes)
    unsummed = [a.sum(others) for a in parts]  # the axes left out come first
    last, first = (-1,) * len(axes), (0,) * len(axes)
    yield Hypothesis(
        "overwritten",
        f"{name} keeps only the last of what must be added: = in place of +=",
        [a[last] for a in unsummed],
    )
    yield Hypothesis(
        "missing_sum",
        f"{name} is only the first of what must be summed",
        [a[first] for a in unsummed],
    )
    if len(axes) > 1:
        return
    for place in range(parts[0].ndim - count + 1):
        moved = [np.moveaxis(a, 0, place) for a in unsummed]
        reshaped = [
            a.reshape(actual.shape) if actual.size == a.size else a
            for a, actual in zip(moved, results.actual)
        ]
        yield Hypothesis("missing_sum", f"{name} is not summed", reshaped)
    length = [a.shape[0] for a in unsummed]
    means = [a.sum(0) / n for a, n in zip(unsummed, length)]
    yield Hypothesis("factor", f"{name} is the mean of what must be summed", means)


def _factors_in_sum(results: Results, parts: list[Array]) -> Iterator[Hypothesis]:
    """A named array left out of what is summed, or applied once too often."""
    name, references = results.name, results.references
    for factor, power in itertools.product(references[0].factors, (1, -1)):
        sentence = f"{factor} is {'a factor too many' if power == 1 else 'left out'} in the sum"
        with suppress(ValueError), np.errstate(all="ignore"):
            scaled = [
                (a * reference.factors[factor] ** power).sum(0)
                for a, reference in zip(parts, references)
            ]
            yield Hypothesis("factor", f"{sentence} of {name}", scaled)


def factor_hypotheses(results: Results) -> Iterator[Hypothesis]:
    """A named array left out of some terms, applied once too often, or dividing for multiplying."""
    name, references, terms = results.name, results.references, results.terms
    groups = [
        group
        for length in range(len(terms), 0, -1)
        for group in itertools.combinations(terms, length)
    ]
    words = {-1: "left out", 1: "a factor too many", -2: "divided by where it multiplies"}
    for factor, power, group in itertools.product(_factors_of_shape(results), words, groups):
        with np.errstate(all="ignore"):
            predictions = [_scale(r, name, group, r.factors[factor] ** power) for r in references]
        where = "" if len(group) == len(terms) else f", in the term {', '.join(group)}"
        yield Hypothesis("factor", f"{factor} is {words[power]} in {name}{where}", predictions)


def factor_pair_hypotheses(results: Results) -> Iterator[Hypothesis]:
    """Two named arrays left out of a term, or applied once too often."""
    name, references = results.name, results.references
    factors = _factors_of_shape(results)
    words = {-1: "left out", 1: "a factor too many"}
    for (f, g), p, q in itertools.product(itertools.combinations(factors, 2), words, words):
        for group in (
            ([key] for key in results.terms) if len(results.terms) > 1 else [results.terms]
        ):
            with np.errstate(all="ignore"):
                predictions = [
                    _scale(r, name, group, r.factors[f] ** p * r.factors[g] ** q)
                    for r in references
                ]
            where = f" in {name}, in the term {', '.join(group)}"
            sentence = f"{f} is {words[p]} and {g} is {words[q]}{where}"
            yield Hypothesis("factor", sentence, predictions)


def scaled_terms(results: Results) -> Iterator[tuple[str, list[Reference]]]:
    """The references with a named array left out of one term, or applied once too often."""
    name = results.name
    for factor, power, key in itertools.product(_factors_of_shape(results), (-1, 1), results.terms):
        with np.errstate(all="ignore"):
            changed = [
                Reference(
                    {name: r.terms[name] | {key: r.terms[name][key] * r.factors[factor] ** power}}
                )
                for r in results.references
            ]
        word = "left out" if power < 0 else "a factor too many"
        yield f"{factor} is {word} in the term {key} of {name}", changed


def _factors_of_shape(results: Results) -> list[str]:
    """The named arrays that have the shape of the result in every case."""
    return [
        factor
        for factor in results.references[0].factors
        if all(
            r.factors[factor].shape == np.shape(r.total(results.name)) for r in results.references
        )
    ]


def _scale(reference: Reference, name: str, group: Sequence[str], factor: Array) -> Array:
    """A result in which some terms are multiplied by an array."""
    terms = reference.terms[name].items()
    scaled = [term * factor if key in group else term for key, term in terms]
    return np.asarray(sum(scaled[1:], start=scaled[0]))


def row_findings(results: Results) -> Iterator[Finding]:
    """Right up to one number a row or column, in the whole output or in one term of it."""
    name = results.name
    if any(t.ndim < 2 or t.shape != a.shape for t, a in zip(results.totals, results.actual)):
        return
    for term, axis in itertools.product([None, *results.terms], (-1, 0)):
        if _is_right_by_row(results, term, axis):
            subject = name if term is None else f"the term {term} of {name}"
            unit = "row" if axis else "column"
            verdict: VerdictName = "other" if results.is_output else "factor"
            yield Finding(verdict, f"{subject} is right up to one factor a {unit}", name)


def _is_right_by_row(results: Results, term: str | None, axis: int) -> bool:
    """Whether one number a row (axis -1) or column (axis 0) turns a term into what was returned."""
    for reference, total, actual in zip(results.references, results.totals, results.actual):
        part = total if term is None else reference.terms[results.name][term]
        rest = total - part
        squares = np.maximum((part * part).sum(axis, keepdims=True), 1e-300)
        ratio = ((actual - rest) * part).sum(axis, keepdims=True) / squares
        if not is_equal(rest + ratio * part, actual, scale_of(reference, results.name)):
            return False
    return True


def zero_findings(results: Results) -> Iterator[Finding]:
    """Right, but 0 in places where it should not be."""
    for reference, total, actual in zip(results.references, results.totals, results.actual):
        if total.shape != actual.shape or not np.any(actual):
            return
        kept = np.where(actual == 0, 0, total)
        if not is_equal(kept, actual, scale_of(reference, results.name)):
            return
    name = results.name
    yield Finding("mask", f"{name} is right where it is not 0, and 0 where it should not be", name)
