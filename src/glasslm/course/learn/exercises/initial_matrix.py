"""Initial values of a matrix: three schemes, and the smaller scale of residual outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Sizes,
    VerdictName,
)
from glasslm.lab.diagnosis.gradient_trials import init_std
from glasslm.model.parameters import INIT_STD

Deviation = Callable[[int, int, int], float]  # outputs, inputs, layers -> the deviation
SCHEMES = ("plain", "residual", "xavier", "he")


def initial_matrix(normal: Array, scheme: str, n_layers: int) -> Array:
    """normal (O, I), standard normal numbers -> the initial values (O, I)."""
    outs, ins = normal.shape
    std = {
        "plain": 0.02,
        "residual": 0.02 / math.sqrt(2 * n_layers),
        "xavier": math.sqrt(2 / (ins + outs)),
        "he": math.sqrt(2 / ins),
    }[scheme]
    return normal * std


def reference(
    normal: Array,
    scheme: str,
    n_layers: int,
    *,
    plain: Deviation = lambda outs, ins, layers: INIT_STD,
    residual: Deviation = lambda outs, ins, layers: INIT_STD / math.sqrt(2 * layers),
    xavier: Deviation = lambda outs, ins, layers: init_std("xavier", outs, ins),
    he: Deviation = lambda outs, ins, layers: init_std("he", outs, ins),
    is_added: bool = False,
) -> Array:
    """The initial values by the deviations of glasslm, or by wrong ones."""
    deviations = {"plain": plain, "residual": residual, "xavier": xavier, "he": he}
    std = deviations[scheme](normal.shape[0], normal.shape[1], n_layers)
    return normal + std if is_added else normal * std


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    outs, ins, layers = sizes.values()
    inputs = {
        "normal": random.array(outs, ins),
        "scheme": SCHEMES[number % len(SCHEMES)],
        "n_layers": layers,
    }
    return Case({**sizes, "O + I": outs + ins}, inputs)


WRONG_DEVIATIONS: tuple[tuple[str, VerdictName, str, Deviation], ...] = (
    (
        "he",
        "axis",
        "he divides by the outputs O: the sum runs over the inputs I, axis 1 of normal",
        lambda outs, ins, layers: math.sqrt(2 / outs),
    ),
    (
        "he",
        "factor",
        "he has the variance 2 / I as standard deviation: its root is missing",
        lambda outs, ins, layers: 2 / ins,
    ),
    (
        "he",
        "factor",
        "he has sqrt(1 / I): the 2, which makes up for ReLU's zeros, is missing",
        lambda outs, ins, layers: math.sqrt(1 / ins),
    ),
    (
        "xavier",
        "factor",
        "xavier has sqrt(1 / (I + O)): the mean of I and O is (I + O) / 2, so it is "
        "sqrt(2 / (I + O))",
        lambda outs, ins, layers: math.sqrt(1 / (ins + outs)),
    ),
    (
        "xavier",
        "factor",
        "xavier has sqrt(6 / (I + O)): that is the limit of a uniform distribution; "
        "the standard deviation is sqrt(2 / (I + O))",
        lambda outs, ins, layers: math.sqrt(6 / (ins + outs)),
    ),
    (
        "xavier",
        "factor",
        "xavier has the variance 2 / (I + O) as standard deviation: its root is missing",
        lambda outs, ins, layers: 2 / (ins + outs),
    ),
    (
        "xavier",
        "other",
        "xavier has sqrt(1 / I): it is sqrt(2 / (I + O)), the mean of both sides",
        lambda outs, ins, layers: math.sqrt(1 / ins),
    ),
    (
        "xavier",
        "other",
        "xavier has sqrt(2 / I), as he: it is sqrt(2 / (I + O))",
        lambda outs, ins, layers: math.sqrt(2 / ins),
    ),
    (
        "residual",
        "factor",
        "residual has 0.02 / sqrt(L): a layer adds twice to the residual stream, after "
        "attention and after the feed-forward, so it is sqrt(2 L)",
        lambda outs, ins, layers: 0.02 / math.sqrt(layers),
    ),
    (
        "residual",
        "factor",
        "residual has 0.02 / (2 L): the root is missing, it is 0.02 / sqrt(2 L)",
        lambda outs, ins, layers: 0.02 / (2 * layers),
    ),
    (
        "residual",
        "factor",
        "residual multiplies by sqrt(2 L): it divides by it",
        lambda outs, ins, layers: 0.02 * math.sqrt(2 * layers),
    ),
    (
        "residual",
        "missing_term",
        "residual is as plain: it is 0.02 / sqrt(2 L)",
        lambda outs, ins, layers: 0.02,
    ),
    (
        "plain",
        "factor",
        "plain has the standard deviation sqrt(0.02): 0.02 is the standard deviation, "
        "not the variance",
        lambda outs, ins, layers: math.sqrt(0.02),
    ),
    (
        "plain",
        "factor",
        "plain has the standard deviation 0.02²: 0.02 is the standard deviation already",
        lambda outs, ins, layers: 0.02**2,
    ),
)

EXERCISE = Exercise(
    name="initial_matrix",
    title="initial values",
    task="Scale standard normal numbers to the initial values of a matrix. The standard deviation "
    "is 0.02 (plain), 0.02 / sqrt(2 L) for the matrices that write into the residual stream "
    "(residual), sqrt(2 / (I + O)) (xavier) or sqrt(2 / I) (he).",
    signature="initial_matrix(normal, scheme, n_layers)",
    shapes="""normal    (O, I)  standard normal numbers; O outputs, I inputs
scheme    "plain", "residual", "xavier" or "he"
n_layers  the number of layers L
w         (O, I)  the type of normal""",
    reference=reference,
    sizes=Sizes.of(
        "O I L",
        small="1 2 2, 2 1 2, 1 2 3, 2 1 3",
        distinct="3 5 2, 5 3 4, 3 5 2, 5 3 4, 4 6 3, 6 4 5, 4 7 6, 7 4 3",
        equal="4 4 2, 5 5 4, 4 4 3, 5 5 2, 3 6 4, 6 3 2, 3 6 3, 6 3 5",
    ),
    draw=draw,
    hints=(
        "normal has the standard deviation 1. A product with std gives it the deviation std.",
        "A sum over I inputs with variance 1 has the variance I std². That is where 1 / I is from.",
        "Each of the L layers adds twice to the residual stream, so 2 L variances add up there.",
        "The deviation is the square root of the variance. normal.shape is (O, I): outputs first.",
    ),
    derivation="Initial values",
    solution="course/learn/exercises/initial_matrix.py:initial_matrix",
    needs=("linear", "residual"),
    outputs=("w",),
    mistakes=(
        *(
            Mistake(verdict, "w", sentence, {scheme: std})
            for scheme, verdict, sentence, std in WRONG_DEVIATIONS
        ),
        Mistake("other", "w", "std is added: it multiplies the normal numbers", {"is_added": True}),
    ),
)
