"""One update by Muon, in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Reference,
    Sizes,
    VerdictName,
)
from glasslm.course.learn.exercises.orthogonalize import iterate


def orthogonalize(g: Array) -> Array:
    """g (O, I) -> about U Vᵀ (O, I), by five steps."""
    return iterate(g, 5)


def reference(
    p: Array,
    g: Array,
    m: Array,
    *,
    lr: float,
    decay: float,
    momentum: float,
    kept: Callable[[float], float] = lambda momentum: momentum,
    added: Callable[[Array, float], Array] = lambda g, momentum: g,
    direction: Callable[[Array, Array, float], Array] = lambda m, g, momentum: orthogonalize(
        m * momentum + g
    ),
    scale: Callable[[int, int], float] = lambda outs, ins: 0.2 * math.sqrt(max(outs, ins)),
    decay_of: str = "p",
    decay_rate: Callable[[float, float], float] = lambda lr, decay: lr * decay,
    keeps_p: bool = True,
) -> Reference:
    """m after the update, and the change of p. arXiv:2502.16982, equation 4."""
    if decay_of == "g":
        g = g + decay * p
    m_terms = {"momentum m": kept(momentum) * m, "g": added(g, momentum)}
    new_m = m_terms["momentum m"] + m_terms["g"]
    step = -lr * scale(*p.shape) * direction(new_m, g, momentum)
    decayed = {"p": p, "g": 0 * p, "p after the step": p + step}[decay_of]
    changes = {"step": step, "decay": -decay_rate(lr, decay) * decayed}
    if not keeps_p:
        changes["-p"] = -p
    return Reference({"new m": m_terms, "change of p": changes})


def call(function: Callable[..., Any], case: Case) -> dict[str, Any]:
    """m after the learner's update, and how p has changed."""
    p, g, m = case.inputs.values()
    before, before_m = p.copy(), m.copy()
    function(p, g, m, **case.options)
    if (p == before).all() and (m == before_m).all():
        raise NotImplementedError(
            "p and m are not changed: update them in place, as in p -= ... or p[...] = ..."
        )
    return {"new m": m, "change of p": p - before}


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    lr, decay, momentum = ((0.1, 0.3, 0.9), (0.05, 0.7, 0.8), (0.02, 0.4, 0.95))[number % 3]
    inputs = {name: random.array(*sizes.values()) for name in "pgm"}
    scalars = {"lr": lr, "decay": decay, "momentum": momentum}
    return Case({**sizes, **scalars, "1 - momentum": 1 - momentum}, inputs, scalars)


MISTAKES: tuple[tuple[VerdictName, str, str, dict[str, Any]], ...] = (
    (
        "overwritten",
        "new m",
        "m is replaced by g: the momentum is kept, m = momentum m + g",
        {"kept": lambda momentum: 0.0},
    ),
    (
        "factor",
        "new m",
        "g is multiplied by 1 - momentum: Muon adds all of it, m = momentum m + g",
        {"added": lambda g, momentum: (1 - momentum) * g},
    ),
    (
        "factor",
        "new m",
        "m is not multiplied by momentum: m = momentum m + g",
        {"kept": lambda momentum: 1.0},
    ),
    (
        "other",
        "new m",
        "the decay is added to the gradient: it acts on p alone",
        {"decay_of": "g"},
    ),
    (
        "other",
        "new m",
        "the gradient is orthogonalized before the momentum: orthogonalize momentum m + g",
        {"added": lambda g, momentum: orthogonalize(g)},
    ),
    (
        "missing_term",
        "change of p",
        "the step is that of m, without Nesterov: orthogonalize momentum m + g",
        {"direction": lambda m, g, momentum: orthogonalize(m)},
    ),
    (
        "factor",
        "change of p",
        "the new m is not multiplied by momentum: orthogonalize momentum m + g",
        {"direction": lambda m, g, momentum: orthogonalize(m + g)},
    ),
    (
        "missing_term",
        "change of p",
        "the step is not orthogonalized",
        {"direction": lambda m, g, momentum: momentum * m + g},
    ),
    (
        "missing_term",
        "change of p",
        "the step is m, not orthogonalized",
        {"direction": lambda m, g, momentum: m},
    ),
    (
        "other",
        "change of p",
        "the step is that of the gradient, without the momentum: orthogonalize momentum m + g",
        {"direction": lambda m, g, momentum: orthogonalize(g)},
    ),
    *(
        (
            "other",
            "change of p",
            f"{steps} steps of the iteration: five are needed",
            {"direction": lambda m, g, momentum, steps=steps: iterate(m * momentum + g, steps)},
        )
        for steps in (3, 4, 6, 10)
    ),
    (
        "factor",
        "change of p",
        "the step is multiplied by sqrt(max(1, O / I)), another convention of Muon: this "
        "one is 0.2 sqrt(max(O, I))",
        {"scale": lambda outs, ins: math.sqrt(max(1, outs / ins))},
    ),
    (
        "factor",
        "change of p",
        "the step has the factor 0.2 sqrt(min(O, I)): it is the longer side",
        {"scale": lambda outs, ins: 0.2 * math.sqrt(min(outs, ins))},
    ),
    *(
        (
            "factor",
            "change of p",
            f"the step has the factor {text}: it is 0.2 sqrt(max(O, I))",
            {"scale": scale},
        )
        for text, scale in (
            ("0.2 sqrt(I)", lambda outs, ins: 0.2 * math.sqrt(ins)),
            ("0.2 sqrt(O)", lambda outs, ins: 0.2 * math.sqrt(outs)),
            ("0.2 sqrt(O I)", lambda outs, ins: 0.2 * math.sqrt(outs * ins)),
            ("0.2 sqrt(O / I)", lambda outs, ins: 0.2 * math.sqrt(outs / ins)),
            ("sqrt(max(O, I))", lambda outs, ins: math.sqrt(max(outs, ins))),
        )
    ),
    (
        "factor",
        "change of p",
        "the step has the factor 0.2 max(O, I): its root is missing",
        {"scale": lambda outs, ins: 0.2 * max(outs, ins)},
    ),
    (
        "other",
        "change of p",
        "the decay comes after the step, and shrinks it, too: decay p first",
        {"decay_of": "p after the step"},
    ),
    (
        "factor",
        "change of p",
        "the decay is not multiplied by lr",
        {"decay_rate": lambda lr, decay: decay},
    ),
    (
        "overwritten",
        "change of p",
        "p is replaced by the step: it is added to p",
        {"keeps_p": False, "decay_rate": lambda lr, decay: 0.0},
    ),
)

EXERCISE = Exercise(
    name="muon",
    title="Muon",
    task="One update in place: m = momentum m + g; the step is the orthogonalized Nesterov "
    "momentum, orthogonalize(momentum m + g) with 5 steps, times 0.2 sqrt(max(O, I)); and "
    "p = (1 - lr decay) p - lr step. Bring your orthogonalize along in the same file.",
    signature="muon(p, g, m, *, lr, decay, momentum)",
    shapes="""p  (O, I)  the weight; it is overwritten
g  (O, I)  its gradient; it stays as it is
m  (O, I)  the momentum; it is overwritten
lr, decay, momentum  floats
returns nothing""",
    reference=reference,
    sizes=Sizes.of("O I", small="1 1, 1 2, 2 2", distinct="3 5, 6 4, 2 7", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "In place: m *= momentum, then m += g. The names p and m must not be bound to new arrays.",
        "Nesterov looks one step ahead: the matrix that is orthogonalized is momentum m + g with "
        "the new m.",
        "U Vᵀ has entries of root mean square 1 / sqrt(max(O, I)). The factor makes it 0.2.",
        "p *= 1 - lr * decay; p -= lr * 0.2 * math.sqrt(max(p.shape)) * orthogonalize(...).",
    ),
    derivation="muon",
    solution="engines/numpy/optimizer.py:muon",
    needs=("orthogonalize", "adamw"),
    outputs=("new m", "change of p"),
    mistakes=tuple(
        Mistake(verdict, output, sentence, changes)
        for verdict, output, sentence, changes in MISTAKES
    ),
    call=call,
)
