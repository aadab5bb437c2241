"""ALiBi's bias."""

from __future__ import annotations

import numpy as np

from glasslm.course.learn.exercise import Array, Case, CaseRandom, Exercise, Mistake, Sizes
from glasslm.engines.positions import alibi_slopes


def alibi_bias(H: int, T: int) -> Array:
    """(H, T, T): minus slope x distance, 0 for keys after the query. arXiv:2108.12409."""
    slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H)
    distance = np.maximum(np.arange(T)[:, None] - np.arange(T), 0)
    return -slopes[:, None, None] * distance


def reference(
    H: int,
    T: int,
    *,
    slopes: str = "2^(-8h/H)",
    keys_after: str = "0",
    shift: int = 0,
    power: int = 1,
    is_transposed: bool = False,
) -> Array:
    """`alibi_bias` with the usual mistakes."""
    slope = SLOPES[slopes](H)[:, None, None]
    offset = np.arange(T)[:, None] - np.arange(T)  # of query i and key j
    bias = -slope * np.maximum(offset + shift, 0) ** power
    ahead = slope * np.maximum(-offset, 0)
    bias = (
        bias
        + {
            "0": 0,
            "positive": ahead,
            "negative": -ahead,
            "minus infinity": np.where(ahead > 0, -np.inf, 0),
            "-1e9": np.where(ahead > 0, -1e9, 0),
        }[keys_after]
    )
    return bias.swapaxes(1, 2) if is_transposed else bias


def power_of_two_slopes(H: int) -> Array:
    """The slopes of the paper's own code, which has other numbers unless H is a power of two."""
    n = 1 << (H.bit_length() - 1)
    return np.append(alibi_slopes(n, np.float64), alibi_slopes(2 * n, np.float64)[::2][: H - n])


SLOPES = {
    "2^(-8h/H)": lambda H: alibi_slopes(H, np.float64),
    "h from 0": lambda H: 2.0 ** (-8 * np.arange(H) / H),
    "2^(-4h/H)": lambda H: 2.0 ** (-4 * np.arange(1, H + 1) / H),
    "e^(-8h/H)": lambda H: np.exp(-8 * np.arange(1, H + 1) / H),
    "2^(-h/H)": lambda H: 2.0 ** (-np.arange(1, H + 1) / H),
    "2^(-h)": lambda H: 2.0 ** (-np.arange(1, H + 1)),
    "reversed": lambda H: alibi_slopes(H, np.float64)[::-1],
    "the first for all": lambda H: np.repeat(alibi_slopes(H, np.float64)[:1], H),
    "h/H": lambda H: np.arange(1, H + 1) / H,
    "power of two": power_of_two_slopes,
}


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    return Case(dict(sizes), dict(sizes))


EXERCISE = Exercise(
    name="alibi_bias",
    title="ALiBi",
    task="The bias that ALiBi adds to the scores of causal attention: minus slope times distance. "
    "Head h = 1..H has the slope 2^(-8 h / H). Keys after the query get 0: the mask hides them.",
    signature="alibi_bias(H, T)",
    shapes="""H     number of heads; any number, also 3 or 6
T     number of positions
bias  (H, T, T): head, query i, key j""",
    reference=reference,
    sizes=Sizes.of("H T", small="1 2, 2 2, 2 3", distinct="3 5, 6 4, 8 7", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "Build two tables first: the slopes (H,), and the distances (T, T) of query i and key j.",
        "The distance is i - j, and never below 0. np.arange(T)[:, None] - np.arange(T) has the "
        "queries as rows.",
        "The slopes are a geometric sequence that ends at 2^-8: 2.0 ** (-8 * np.arange(1, H + 1) / "
        "H).",
        "slopes[:, None, None] * distances has the shape (H, T, T). Mind the sign: far keys get "
        "less.",
    ),
    derivation="alibi_bias",
    solution="course/learn/exercises/alibi_bias.py:alibi_bias",
    needs=("attention",),
    outputs=("bias",),
    mistakes=(
        Mistake(
            "transposed",
            "bias",
            "queries and keys are exchanged: row i must be a query, and its past keys get the bias",
            {"is_transposed": True},
        ),
        Mistake(
            "mask",
            "bias",
            "keys after the query get a positive bias: their distance must be 0",
            {"keys_after": "positive"},
        ),
        Mistake(
            "mask",
            "bias",
            "keys after the query get a bias by |i - j|: their distance must be 0",
            {"keys_after": "negative"},
        ),
        Mistake(
            "mask",
            "bias",
            "keys after the query get minus infinity: the bias leaves the hiding to the mask",
            {"keys_after": "minus infinity"},
        ),
        Mistake(
            "mask",
            "bias",
            "keys after the query get -1e9: the bias leaves the hiding to the mask",
            {"keys_after": "-1e9"},
        ),
        Mistake(
            "other",
            "bias",
            "the slopes start at h = 0, with slope 1: h runs from 1 to H",
            {"slopes": "h from 0"},
        ),
        Mistake(
            "other",
            "bias",
            "the slopes are those of the paper's own code, which takes the nearest power of two; "
            "this exercise has 2^(-8 h / H) for every H",
            {"slopes": "power of two"},
        ),
        Mistake(
            "factor",
            "bias",
            "the 8 in the exponent is left out: the slopes are 2^(-8 h / H)",
            {"slopes": "2^(-h/H)"},
        ),
        Mistake(
            "factor",
            "bias",
            "the exponent has a 4: the slopes are 2^(-8 h / H), so that the last is 2^-8",
            {"slopes": "2^(-4h/H)"},
        ),
        Mistake(
            "other",
            "bias",
            "the slopes are powers of e: they are powers of 2, 2^(-8 h / H)",
            {"slopes": "e^(-8h/H)"},
        ),
        Mistake(
            "factor",
            "bias",
            "the exponent is -h: the slopes are 2^(-8 h / H), so that the last is 2^-8 for every H",
            {"slopes": "2^(-h)"},
        ),
        Mistake(
            "other",
            "bias",
            "the slopes are in the reverse order: the first head has the largest",
            {"slopes": "reversed"},
        ),
        Mistake(
            "axis",
            "bias",
            "all heads have the slope of the first: each head has its own",
            {"slopes": "the first for all"},
        ),
        Mistake(
            "other",
            "bias",
            "the slopes are h / H: they are a geometric sequence, 2^(-8 h / H)",
            {"slopes": "h/H"},
        ),
        Mistake(
            "other",
            "bias",
            "the distance is off by one: a query has the distance 0 to its own key",
            {"shift": 1},
        ),
        Mistake(
            "other",
            "bias",
            "the distance is off by one: the key before the query has the distance 1",
            {"shift": -1},
        ),
        Mistake("other", "bias", "the distance is squared: the bias is linear in it", {"power": 2}),
    ),
    keeps_dtype=False,
)
