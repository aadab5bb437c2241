"""What an exercise is: one operation, its reference in named terms, its cases, its usual mistakes.

Everything that is special about an exercise is one `Exercise` in one file of `exercises/`. The
checker derives all else from it: the file to start with, the worked example, the comparison, and
the hypotheses about what is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

VerdictName = Literal[
    "right",
    "shape",
    "axis",
    "missing_sum",
    "factor",
    "sign",
    "missing_term",
    "overwritten",
    "transposed",
    "mask",
    "mutates_input",
    "unstable",
    "dtype",
    "not_implemented",
    "exception",
    "other",
]

SHORT_ARRAY = 6  # arrays of at most as many entries have one decimal, so that people can compute


@dataclass(frozen=True)
class Case:
    """One call of the learner's function.

    `inputs` are its positional arguments by name, `options` its keyword arguments, and `dy` is what
    `backward` gets: the gradient of the output (None for a function without backward). `sizes` are
    the numbers by which a wrong factor may be named: dimensions, and scalars such as a rate.
    """

    sizes: dict[str, float]
    inputs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    dy: Any = None

    def cast(self, dtype: str) -> Case:
        """This case with all floating-point arrays in `dtype`."""

        def convert(value: Any) -> Any:
            is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
            return value.astype(dtype) if is_float else value

        inputs = {name: convert(value) for name, value in self.inputs.items()}
        return Case(self.sizes, inputs, self.options, convert(self.dy))


@dataclass(frozen=True)
class Sizes:
    """The sizes of the cases of an exercise, each a dict of dimension to length.

    `small` ones give the examples that people read, in growing order, and the last one is the
    worked example. In each of `distinct` all dimensions differ, so that no wrong axis goes
    unnoticed. In `equal` as many as possible agree, so that a transposed matrix runs.
    """

    small: tuple[dict[str, int], ...]
    distinct: tuple[dict[str, int], ...]
    equal: tuple[dict[str, int], ...]

    @staticmethod
    def of(letters: str, *, small: str, distinct: str, equal: str) -> Sizes:
        """Sizes from text: `Sizes.of("N D", small="1 2, 2 3", distinct="5 7, 4 6", ...)`.

        >>> Sizes.of("N D", small="1 2, 2 3", distinct="5 7", equal="4 4").small
        ({'N': 1, 'D': 2}, {'N': 2, 'D': 3})
        """
        names = letters.split()

        def read(text: str) -> tuple[dict[str, int], ...]:
            return tuple(
                dict(zip(names, map(int, sizes.split()), strict=True)) for sizes in text.split(",")
            )

        return Sizes(read(small), read(distinct), read(equal))


class CaseRandom:
    """Random inputs of a case, a function of the seed."""

    def __init__(self, seed: int | tuple[int, ...]) -> None:
        self.generator = np.random.default_rng(seed)

    def array(self, *shape: int) -> Array:
        """Float64 entries from 0.1 to 2 with either sign: none is near 0, the kink of ReLU."""
        signs = self.generator.choice([-1, 1], shape)
        values = self.generator.uniform(0.1, 2, shape) * signs
        return np.round(values, 1) if values.size <= SHORT_ARRAY else values

    def integers(self, low: int, high: int, *shape: int) -> Array:
        """Integers from `low` to `high` - 1."""
        return self.generator.integers(low, high, shape)

    def number(self, low: float, high: float) -> float:
        """A float between the two, with two decimals."""
        return round(float(self.generator.uniform(low, high)), 2)


def draw_activation(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    """A case of an activation: x (N, D), 300 times as large for large values, and dy (N, D)."""
    N, D = sizes.values()
    x = random.array(N, D) * (300 if is_large else 1)
    return Case(dict(sizes), {"x": x}, {}, random.array(N, D))


@dataclass(frozen=True)
class Reference:
    """The right results of a case, as named terms.

    Args:
        terms: Output or gradient -> name of a term -> array; the result is the sum of its terms.
        factors: Arrays that a learner may leave out of a term, or apply twice, by name. They have
            the shape of the output or gradient that they belong to.
        parts: Gradient -> (array before its sum, number of axes to be summed). These axes are the
            first ones of the array.
    """

    terms: dict[str, dict[str, Any]]
    factors: dict[str, Array] = field(default_factory=dict)
    parts: dict[str, tuple[Array, int]] = field(default_factory=dict)

    def total(self, name: str) -> Any:
        """An output or gradient: the sum of its terms."""
        first, *others = self.terms[name].values()
        return sum(others, start=first) if others else first


@dataclass(frozen=True)
class Mistake:
    """A usual mistake: what `output` becomes when the reference is called with `changes`.

    `output` is the name of an output or a gradient, or "gradients" for all gradients.
    """

    verdict: VerdictName
    output: str
    sentence: str
    changes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise of the course. To write one, copy rms_norm.py or causal_mask.py.

    An exercise is a module of `exercises/` with the constant EXERCISE, and a line in the order of
    `exercises/__init__.py`. There are two kinds:

    - **An operation** has `gradients`. The learner's function returns `output, backward`, and
      `reference(dy, *inputs, **options)` returns a `Reference`: every output and gradient as named
      terms. A term of a gradient that the learner leaves out, or takes with another sign or factor,
      is then found by least squares, without a line of yours.
    - **A function** has none, and gets a forward mark only. `reference(*inputs, **options)` returns
      the result as such: an array, a number, a string, a list; or a dict of several named outputs.

    In both, keyword-only arguments of `reference` that no case sets are the switches of the
    `mistakes`: `Mistake("axis", "y", "the mean runs over the tokens", {"axis": 0})` claims that a
    learner whose y equals reference(..., axis=0)'s has made that mistake. State the mistakes that
    the terms, sums, shapes and factors do not give already.

    Args:
        name: The function that the learner writes.
        title: A few words for `learn list`.
        task: One or two sentences: what the function computes, with its formula.
        signature: The line of `def`, without `def` and the colon.
        shapes: The shapes and meanings of arguments and results, a line each.
        reference: The right results; see above.
        sizes: The sizes of its cases.
        draw: draw(random, sizes, number, is_large) -> Case. `number` counts the cases of one group,
            so that options can differ between them. With `is_large` the values are those at which
            an unstable formula overflows or cancels.
        hints: From the gentlest to the last before the solution.
        derivation: The heading in docs/backward.md, such as "rms_norm"; "" if there is none.
        solution: Where the solution is, as "engines/numpy/ops.py:rms_norm"; "" shows `reference`.
        needs: Exercises that come before this one.
        outputs: The names of what the function returns, or changes in place.
        gradients: The names of what `backward` returns, in order; () for a function.
        mistakes: Usual mistakes, the most usual first.
        call: call(function, case) -> {output: value}, for functions that are not simply called
            once: those that work in place, or a class. The default calls function(*inputs,
            **options) and takes what it returns as the output, or as a tuple of the outputs.
        keeps_dtype: Whether float32 inputs must give float32 results.
        zero_inputs: Inputs that may be all zero and must then give finite results.
        token_inputs: Inputs with an axis of tokens, for the question which tokens move an output.
        mixes_tokens: Whether the output of a token depends on other tokens.
        more_axes: More groups of sizes for `draw`, with other numbers of axes than the rest.
    """

    name: str
    title: str
    task: str
    signature: str
    shapes: str
    reference: Callable[..., Any]
    sizes: Sizes
    draw: Callable[[CaseRandom, dict[str, int], int, bool], Case]
    hints: tuple[str, ...]
    derivation: str = ""
    solution: str = ""
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("y",)
    gradients: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    call: Callable[[Callable[..., Any], Case], dict[str, Any]] | None = None
    keeps_dtype: bool = True
    zero_inputs: tuple[str, ...] = ()
    token_inputs: tuple[str, ...] = ()
    mixes_tokens: bool = False
    more_axes: tuple[dict[str, int], ...] = ()

    @property
    def has_backward(self) -> bool:
        """Whether the learner writes a backward pass."""
        return bool(self.gradients)

    def compute(self, case: Case, **changes: Any) -> Reference:
        """The reference's results of a case; `changes` make a usual mistake."""
        arguments = [*case.inputs.values()]
        if self.has_backward:
            arguments.insert(0, case.dy)
        with np.errstate(all="ignore"):
            result = self.reference(*arguments, **case.options, **changes)
        if isinstance(result, Reference):
            return result
        results = result if isinstance(result, dict) else {self.outputs[0]: result}
        return Reference({name: {name: to_array(value)} for name, value in results.items()})

    def optional_names(self) -> set[str]:
        """Keyword arguments with a default in the signature: a learner's function may lack them."""
        parameters = inspect.signature(self.reference).parameters.values()
        return {p.name for p in parameters if p.default is not inspect.Parameter.empty}

    def draw_cases(
        self, group: tuple[dict[str, int], ...], seed: int, start: int = 0
    ) -> list[Case]:
        """Ordinary cases of some sizes; `start` tells apart the groups of one seed."""
        return [
            self.draw(CaseRandom((seed, start, number)), dict(sizes), number, False)
            for number, sizes in enumerate(group)
        ]


def to_array(value: Any) -> Any:
    """A copy as an array of numbers; what is no array of numbers as it is."""
    if isinstance(value, (str, bytes, dict, set)):
        return value
    try:
        array = np.array(value)
    except Exception:  # lists of different lengths, or the learner's own objects
        return value
    return array if array.dtype.kind in "fiub" else value
