"""Multi-head attention: projections, heads, and the output projection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
from glasslm.course.learn.exercises import attention

Gradients = dict[str, dict[str, Array]]


def reference(
    dy: Array,
    x: Array,
    wq: Array,
    wk: Array,
    wv: Array,
    wo: Array,
    n_heads: int,
    *,
    split: str = "heads first",
    leaves_out: str = "",
    transposes: str = "",
    transposes_back: str = "",
    **changes: Any,
) -> Reference:
    """x (B, T, D), four matrices (D, D) -> y and five gradients. arXiv:1706.03762, section 3.2.2.

    `changes` are those of the reference of `attention`.
    """
    B, T, D = x.shape
    shape = (B, T, n_heads, D // n_heads)

    def to_heads(array: Array) -> Array:
        if split == "heads first":
            return array.reshape(shape)
        if split == "heads last":  # head h takes the entries h, h + H, h + 2 H ...
            return array.reshape(B, T, D // n_heads, n_heads).swapaxes(2, 3)
        return array.reshape(B, n_heads, T, D // n_heads).swapaxes(1, 2)  # without a transpose

    def from_heads(array: Array) -> Array:
        if split == "heads first":
            return array.reshape(B, T, D)
        if split == "heads last":
            return array.swapaxes(2, 3).reshape(B, T, D)
        return array.swapaxes(1, 2).reshape(B, T, D)

    matrices = {"q": wq, "k": wk, "v": wv, "o": wo}

    def project(array: Array, letter: str) -> Array:
        w = matrices[letter]
        return array @ (w if letter == transposes else w.T)

    def project_back(array: Array, letter: str) -> Array:
        w = matrices[letter]
        return array @ (w.T if letter == transposes_back else w)

    inputs = [to_heads(project(x, letter)) for letter in "qkv"]
    dheads = to_heads(project_back(dy, "o"))
    core = attention.reference(dheads, *inputs, **changes)
    heads = from_heads(core.total("y"))
    if leaves_out == "wo":
        return Reference({"y": {"y": heads}} | _zeros(x, (wq, wk, wv, wo)))
    terms = {
        (letter, key): from_heads(term)
        for letter in "qkv"
        for key, term in core.terms[f"d{letter}"].items()
    }
    dx = {
        f"d{letter} w{letter}, {key}": project_back(d, letter) for (letter, key), d in terms.items()
    }
    parts = {"dwo": {"dyᵀ heads": np.einsum("bto,bti->btoi", dy, heads)}}
    for letter in "qkv":
        parts[f"dw{letter}"] = {
            f"d{letter}ᵀ x, {key}": np.einsum("bto,bti->btoi", term, x)
            for (owner, key), term in terms.items()
            if owner == letter
        }
    gradients = {
        name: {key: array.sum((0, 1)) for key, array in arrays.items()}
        for name, arrays in parts.items()
    }
    sums = {name: (sum(arrays.values(), start=np.zeros(1)), 2) for name, arrays in parts.items()}
    return Reference({"y": {"heads woᵀ": project(heads, "o")}, "dx": dx, **gradients}, {}, sums)


def _zeros(x: Array, matrices: tuple[Array, ...]) -> Gradients:
    """Gradients of zeros, for a mistake that is in the output alone."""
    names = ("dx", "dwq", "dwk", "dwv", "dwo")
    return {name: {name: 0 * array} for name, array in zip(names, (x, *matrices))}


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    B, T, H, Q = sizes.values()
    D = H * Q
    inputs: dict[str, Any] = {"x": random.array(B, T, D) * (10 if is_large else 1)}
    inputs |= {name: random.array(D, D) / D**0.5 for name in ("wq", "wk", "wv", "wo")}
    inputs["n_heads"] = H
    return Case({**sizes, "D": D}, inputs, {}, random.array(B, T, D))


def list_mistakes() -> Iterator[Mistake]:
    """Those of attention's output, and those of the heads and the projections."""
    yield Mistake("missing_term", "y", "the output projection is left out", {"leaves_out": "wo"})
    for output in ("y", "gradients"):
        yield Mistake(
            "axis",
            output,
            "the heads are the last part of D, not the first",
            {"split": "heads last"},
        )
        yield Mistake(
            "transposed", output, "heads are split by reshape without a transpose",
            {"split": "no transpose"},
        )  # fmt: skip
    for letter in "qkvo":
        yield Mistake("transposed", "y", f"w{letter} is not transposed", {"transposes": letter})
        sentence = f"w{letter} is transposed in the gradient"
        yield Mistake("transposed", "gradients", sentence, {"transposes_back": letter})
    for mistake in attention.list_mistakes():
        has_groups = {"groups", "sums"} & mistake.changes.keys()
        if mistake.output in ("y", "gradients") and not has_groups:
            yield mistake


EXERCISE = Exercise(
    name="multi_head",
    title="multi-head attention",
    task="Project x to queries, keys and values, split each into heads of D / n_heads entries, "
    "attend causally in each head with the weights p = softmax(q k / sqrt(D / n_heads)), join the "
    "heads and project: y = joined woᵀ.",
    signature="multi_head(x, wq, wk, wv, wo, n_heads)",
    shapes="""x       (B, T, D)   batch, positions, width
wq, wk, wv, wo  (D, D), outputs first: q = x wqᵀ
n_heads H; head h has the entries h D/H to (h + 1) D/H - 1
y       (B, T, D)
backward(dy) -> (dx, dwq, dwk, dwv, dwo), each with the shape of its input""",
    reference=reference,
    sizes=Sizes.of(
        "B T H Q",
        small="1 1 1 1, 1 2 1 1, 1 2 2 1, 1 2 1 2",
        distinct="2 5 3 4, 3 4 2 5",
        equal="4 4 2 2, 2 4 2 2",
    ),
    draw=draw,
    hints=(
        "It is linear, reshape, attention, reshape, linear: use what you have written, and call "
        "the backward functions in the opposite order.",
        "(B, T, D).reshape(B, T, H, D // H) splits the heads; the backward pass reshapes back.",
        "dwo = dyᵀ joined, summed over batch and positions.",
        "x goes into three projections: dx = dq wq + dk wk + dv wv.",
    ),
    derivation="attention",
    needs=("attention",),
    gradients=("dx", "dwq", "dwk", "dwv", "dwo"),
    mistakes=tuple(list_mistakes()),
    token_inputs=("x",),
    mixes_tokens=True,
)
