"""Rotary positions, half-split as in Llama."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Reference,
    Sizes,
)


def reference(
    dy: Array,
    x: Array,
    cos: Array,
    sin: Array,
    *,
    take: str = "halves",
    put: str = "halves",
    table_axis: int = 1,
    is_swapped: bool = False,
    shift: int = 0,
    rotates_second: bool = True,
) -> Reference:
    """x (B, T, H, Q), cos and sin (T, Q/2) -> y, dx. arXiv:2104.09864."""
    half = cos.shape[-1]
    shape = [1, 1, 1, half]
    shape[table_axis] = len(cos)
    first, second = (sin, cos) if is_swapped else (cos, sin)
    cosines, sines = (np.roll(table, shift, 0).reshape(shape) for table in (first, second))
    slices = {
        "halves": (slice(0, half), slice(half, None)),
        "swapped": (slice(half, None), slice(0, half)),
        "pairs": (slice(0, None, 2), slice(1, None, 2)),
    }

    def rotate(array: Array, sines: Array, name: str) -> dict[str, Array]:
        """The four products of a rotation, each in its half of the output."""
        a, b = (array[..., part] for part in slices[take])
        products = {
            f"{name}[:Q/2] cos": (0, a * cosines),
            f"{name}[Q/2:] sin": (0, -b * sines),
            f"{name}[:Q/2] sin": (1, a * sines),
            f"{name}[Q/2:] cos": (1, b * cosines),
        }
        if not rotates_second:
            products |= {f"{name}[:Q/2] sin": (1, 0 * a), f"{name}[Q/2:] cos": (1, b)}
        terms = {}
        for key, (place, values) in products.items():
            terms[key] = np.zeros_like(array)
            terms[key][..., slices[put][place]] = values
        return terms

    return Reference({"y": rotate(x, sines, "x"), "dx": rotate(dy, -sines, "dy")})


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    B, T, H, Q = sizes.values()
    angles = random.generator.uniform(0.2, 3, (T, Q // 2))
    inputs = {"x": random.array(B, T, H, Q), "cos": np.cos(angles), "sin": np.sin(angles)}
    return Case(dict(sizes), inputs, {}, random.array(B, T, H, Q))


def list_mistakes() -> Iterator[Mistake]:
    """The mistakes of the rotation, forward and backward."""
    pairs = {
        "it rotates neighbours": ("pairs", "pairs"),
        "it takes neighbours": ("pairs", "halves"),
        "it writes neighbours": ("halves", "pairs"),
    }
    for output in ("y", "dx"):
        for what, (take, put) in pairs.items():
            sentence = f"{what} (2j, 2j+1), not the halves (j, j + Q/2)"
            yield Mistake("axis", output, sentence, {"take": take, "put": put})
        for axis, what in ((2, "heads"), (0, "batch")):
            sentence = f"cos and sin run along the {what}, not the positions"
            yield Mistake("axis", output, sentence, {"table_axis": axis})
        yield Mistake(
            "axis", output, "the two halves are written in the wrong order", {"put": "swapped"}
        )
        yield Mistake(
            "missing_term", output, "the second half passes unrotated", {"rotates_second": False}
        )
        yield Mistake("other", output, "cos and sin are exchanged", {"is_swapped": True})
        for shift in (1, -1):
            yield Mistake("other", output, "the positions are off by one", {"shift": shift})


EXERCISE = Exercise(
    name="rope",
    title="rotary positions (RoPE)",
    task="Rotate each pair (x[j], x[j + Q/2]) of a head by the angle of its position: "
    "(a, b) becomes (a cos - b sin, a sin + b cos).",
    signature="rope(x, cos, sin)",
    shapes="""x    (B, T, H, Q)   batch, positions, heads, size of a head
cos  (T, Q/2)       cosines of the angles, a row for each position
sin  (T, Q/2)
y    (B, T, H, Q)
backward(dy) -> dx, the shape of x""",
    reference=reference,
    sizes=Sizes.of(
        "B T H Q",
        small="1 1 1 2, 1 2 1 2, 1 2 2 2, 1 2 2 4",
        distinct="3 5 2 6, 2 4 3 8",
        equal="4 4 4 8, 6 6 6 6",
    ),
    draw=draw,
    hints=(
        "Split the last axis in halves: a = x[..., :Q/2], b = x[..., Q/2:].",
        "cos and sin need an axis for the heads: cos[:, None, :] has the shape (T, 1, Q/2).",
        "A rotation is undone by the rotation with the opposite angle, and its transpose is that.",
        "backward is the same rotation with -sin in place of sin.",
    ),
    derivation="rope",
    solution="engines/numpy/attention.py:rope",
    gradients=("dx",),
    mistakes=tuple(list_mistakes()),
    token_inputs=("x",),
)
