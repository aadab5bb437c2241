"""AdamW, one update in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def reference(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    t: int,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    corrects_m: bool = True,
    corrects_v: bool = True,
    eps_place: str = "outside",
    has_root: bool = True,
    step_shift: int = 0,
    are_betas_exchanged: bool = False,
    overwrites: str = "",
    frozen: str = "",
    decay_is: str = "lr decay p",
    v_takes: str = "g²",
    step_takes: str = "m",
) -> Reference:
    """p, g, m, v of one shape -> m, v, and the step of p. arXiv:1711.05101, algorithm 2."""
    b1, b2 = betas[::-1] if are_betas_exchanged else betas
    if decay_is == "L2":
        g = g + decay * p
    old_m, old_v = m, v
    m_terms = {"b1 m": b1 * m * (overwrites != "m"), "(1 - b1) g": (1 - b1) * g}
    square = {"g²": g * g, "g": g, "|g|": abs(g)}[v_takes]
    v_terms = {"b2 v": b2 * v * (overwrites != "v"), "(1 - b2) g²": (1 - b2) * square}
    if overwrites == "exchanged weights":
        m_terms, v_terms = (
            {"b1 g": b1 * g, "m": (1 - b1) * m},
            {"b2 g²": b2 * square, "v": (1 - b2) * v},
        )
    if overwrites == "corrected":
        m_terms = {key: term / (1 - b1**t) for key, term in m_terms.items()}
        v_terms = {key: term / (1 - b2**t) for key, term in v_terms.items()}
        corrects_m = corrects_v = False
    m, v = sum(m_terms.values(), start=0 * m), sum(v_terms.values(), start=0 * v)
    if step_takes == "old moments":
        m, v = old_m, old_v
    m_hat = m / (1 - b1 ** (t + step_shift)) if corrects_m else m
    below = denominator(
        v, 1 - b2 ** (t + step_shift) if corrects_v else 1.0, eps, eps_place, has_root
    )
    update = -lr * (g if step_takes == "g" else m_hat) / below
    decayed = p + update if decay_is == "after the step" else p
    rate = decay if decay_is == "decay p" else 0.0 if decay_is == "L2" else lr * decay
    step = {"-lr decay p": -rate * decayed, "-lr m / (sqrt v + eps)": update}
    if overwrites == "p":
        step["-p"] = -p
    terms = {"m": m_terms, "v": v_terms, "step": step}
    if frozen:
        zeros = {"m": {"m": old_m}, "v": {"v": old_v}, "step": {"0": 0 * p}}
        terms = {name: zeros[name] if name == frozen else value for name, value in terms.items()}
    return Reference(terms, {"1 / (sqrt v + eps)": 1 / below, "m": m_hat, "g": g})


def denominator(v: Array, correction: float, eps: float, eps_place: str, has_root: bool) -> Any:
    """sqrt(v / correction) + eps, with the usual mistakes about eps and the root."""
    corrected = v / correction
    root = np.sqrt(abs(corrected)) if has_root else corrected
    if eps_place == "no denominator":
        return 1.0 + 0 * v
    if eps_place == "inside":
        return np.sqrt(abs(corrected + eps))
    if eps_place == "before the correction":
        return (np.sqrt(abs(v)) + eps) / np.sqrt(correction)
    return root if eps_place == "none" else root + eps


def call(function: Callable[..., Any], case: Case) -> dict[str, Any]:
    """The moments after one update, and how far p moved."""
    p, _, m, v = case.inputs.values()
    before = p.copy(), m.copy(), v.copy()
    function(*case.inputs.values(), **case.options)
    if all(np.array_equal(old, new) for old, new in zip(before, (p, m, v))):
        raise NotImplementedError(
            "p, m and v are not changed in place: write p -= step, not p = p - step"
        )
    return {"m": m, "v": v, "step": p - before[0]}


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    shape = tuple(sizes.values())
    inputs = {
        "p": random.array(*shape),
        "g": random.array(*shape),
        "m": random.array(*shape) * 0.5,
        "v": abs(random.array(*shape)),
    }
    t, betas = (2, 3, 5)[number % 3], ((0.9, 0.99), (0.8, 0.95))[number % 2]
    lr, decay = (0.1, 0.03)[number % 2], (0.2, 0.5)[number % 2]
    eps = (1e-2, 0.3)[number % 2]
    options = {"t": t, "lr": lr, "decay": decay, "betas": betas, "eps": eps}
    names = {"lr": lr, "decay": decay, "b1": betas[0], "b2": betas[1]}
    names |= {"(1 - b1)": 1 - betas[0], "(1 - b2)": 1 - betas[1]}
    return Case({**sizes, **names}, inputs, options)


def list_mistakes() -> Iterator[Mistake]:
    """The mistakes of an update; each may show in the moments or in the step."""
    changes: list[tuple[Any, str, dict[str, Any]]] = [
        ("other", "p is not changed in place", {"frozen": "step"}),
        ("other", "m is not changed in place", {"frozen": "m"}),
        ("other", "v is not changed in place", {"frozen": "v"}),
        ("other", "the decay goes through the moments: Adam with L2", {"decay_is": "L2"}),
        ("overwritten", "m is overwritten by the gradient", {"overwrites": "m"}),
        ("overwritten", "p is overwritten by the step", {"overwrites": "p"}),
        ("overwritten", "v is overwritten by the gradient's square", {"overwrites": "v"}),
        ("other", "b1 and 1 - b1 are exchanged", {"overwrites": "exchanged weights"}),
        ("factor", "the corrected averages are stored in m and v", {"overwrites": "corrected"}),
        ("other", "the betas are exchanged", {"are_betas_exchanged": True}),
        ("other", "v takes the gradient, not its square", {"v_takes": "g"}),
        ("other", "v takes |g|, not g²", {"v_takes": "|g|"}),
        ("missing_term", "no bias correction", {"corrects_m": False, "corrects_v": False}),
        ("missing_term", "no bias correction of m", {"corrects_m": False}),
        ("missing_term", "no bias correction of v", {"corrects_v": False}),
        ("missing_term", "the step is not divided by sqrt(v)", {"eps_place": "no denominator"}),
        ("other", "the step uses g, not m", {"step_takes": "g"}),
        ("other", "the step uses m and v from before the update", {"step_takes": "old moments"}),
        ("other", "eps is inside the square root", {"eps_place": "inside"}),
        ("missing_term", "eps is left out", {"eps_place": "none"}),
        ("other", "eps is added before v's correction", {"eps_place": "before the correction"}),
        ("factor", "the square root of v is left out", {"has_root": False}),
        ("factor", "the decay is not multiplied by lr", {"decay_is": "decay p"}),
        ("other", "the decay comes after the step", {"decay_is": "after the step"}),
        ("other", "t is off by one: t - 1 is used", {"step_shift": -1}),
        ("other", "t is off by one: t + 1 is used", {"step_shift": 1}),
    ]
    for verdict, sentence, change in changes:
        for output in ("m", "v", "step"):
            yield Mistake(verdict, output, sentence, change)


EXERCISE = Exercise(
    name="adamw",
    title="AdamW",
    task="Update weights, and the moving averages m of the gradient and v of its square, all in "
    "place: p -= lr decay p, then p -= lr m̂ / (sqrt(v̂) + eps) with m̂ = m / (1 - b1^t) and "
    "v̂ = v / (1 - b2^t).",
    signature="adamw(p, g, m, v, *, t, lr, decay, betas, eps)",
    shapes="""p      weights of any shape, changed in place
g      their gradient
m, v   moving averages of g and g², changed in place
t      number of this update: 1, 2, ...
lr     learning rate; decay: weight decay; betas: (b1, b2); eps: a small number
returns nothing""",
    reference=reference,
    sizes=Sizes.of("N O", small="1 1, 1 2", distinct="5 7, 3 4", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "In place: m *= b1, then m += (1 - b1) * g. `m = ...` would only rename a local variable.",
        "The averages start at 0, so early ones are too small: divide by 1 - b1**t and 1 - b2**t.",
        "The decay does not go through m and v: it takes lr * decay of p itself.",
        "eps is added after the square root of the corrected v.",
    ),
    derivation="adamw",
    solution="engines/numpy/optimizer.py:adamw",
    outputs=("m", "v", "step"),
    mistakes=tuple(list_mistakes()),
    call=call,
    zero_inputs=("p", "g", "m", "v"),
)
