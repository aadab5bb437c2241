"""The learning rate: a linear warmup, then half a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable

from glasslm import ops
from glasslm.course.learn.exercise import (
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Sizes,
    VerdictName,
)

Formula = Callable[[int, int, float, float, int], float]  # step, steps, lr, min_lr, warmup


def learning_rate(step: int, max_steps: int, lr: float, min_lr: float, warmup_steps: int) -> float:
    """A linear warmup, then half a cosine that ends at min_lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (max_steps - 1 - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def reference(
    step: int,
    max_steps: int,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    *,
    warmup: Formula | None = None,
    after: Formula | None = None,
) -> float:
    """The rate of one update. `warmup` and `after` are wrong formulas for the two parts."""
    wrong = warmup if step < warmup_steps else after
    if wrong:
        return wrong(step, max_steps, lr, min_lr, warmup_steps)
    return ops.learning_rate(step, max_steps, lr=lr, min_lr=min_lr, warmup_steps=warmup_steps)


def cosine(progress: float, lr: float, low: float) -> float:
    """From lr at the progress 0 to `low` at 1."""
    return low + (lr - low) * (1 + math.cos(math.pi * progress)) / 2


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    lr = random.number(0.5, 1.5)
    min_lr = round(lr * (0.1, 0.2, 0.35)[number % 3], 3)
    step, max_steps, warmup_steps = sizes.values()
    inputs = {
        "step": step,
        "max_steps": max_steps,
        "lr": lr,
        "min_lr": min_lr,
        "warmup_steps": warmup_steps,
    }
    return Case({**sizes, "lr": lr, "min_lr": min_lr}, inputs)


WRONG_WARMUPS: tuple[tuple[VerdictName, str, Formula], ...] = (
    (
        "other",
        "the warmup is off by one: update 0 has the rate 0; it is lr (step + 1) / warmup_steps",
        lambda s, n, lr, low, W: lr * s / W,
    ),
    (
        "other",
        "the warmup is divided by warmup_steps + 1: it reaches lr at its last update, "
        "step = warmup_steps - 1",
        lambda s, n, lr, low, W: lr * (s + 1) / (W + 1),
    ),
    (
        "other",
        "the warmup is off by one: it is lr (step + 1) / warmup_steps",
        lambda s, n, lr, low, W: lr * (s + 2) / W,
    ),
    (
        "other",
        "the warmup is flat: it rises to lr, by (step + 1) / warmup_steps",
        lambda s, n, lr, low, W: lr + 0 * s,
    ),
    (
        "other",
        "the warmup starts at min_lr: it starts at 0, as lr (step + 1) / warmup_steps",
        lambda s, n, lr, low, W: low + (lr - low) * (s + 1) / W,
    ),
    (
        "other",
        "the warmup starts at min_lr: it is lr (step + 1) / warmup_steps",
        lambda s, n, lr, low, W: low + (lr - low) * s / W,
    ),
    (
        "factor",
        "the warmup is not multiplied by lr",
        lambda s, n, lr, low, W: (s + 1) / W,
    ),
    (
        "missing_term",
        "there is no warmup: the first warmup_steps updates have the rate lr (step + "
        "1) / warmup_steps",
        lambda s, n, lr, low, W: cosine((s - W) / (n - 1 - W), lr, low),
    ),
)

WRONG_COSINES: tuple[tuple[VerdictName, str, Formula], ...] = (
    (
        "other",
        "the cosine runs over all steps: it begins after the warmup, so that its "
        "progress is (step - warmup_steps) / (max_steps - 1 - warmup_steps)",
        lambda s, n, lr, low, W: cosine(s / (n - 1), lr, low),
    ),
    (
        "other",
        "the cosine runs over all steps, and one short of the end: its progress is "
        "(step - warmup_steps) / (max_steps - 1 - warmup_steps)",
        lambda s, n, lr, low, W: cosine(s / n, lr, low),
    ),
    (
        "other",
        "warmup_steps is not subtracted from step: the progress must be 0 at the end of the warmup",
        lambda s, n, lr, low, W: cosine(s / (n - 1 - W), lr, low),
    ),
    (
        "other",
        "warmup_steps is not subtracted from the length: the progress must be 1 at the last step",
        lambda s, n, lr, low, W: cosine((s - W) / (n - 1), lr, low),
    ),
    (
        "other",
        "the cosine does not reach min_lr: the last step is max_steps - 1, so its "
        "length is max_steps - 1 - warmup_steps",
        lambda s, n, lr, low, W: cosine((s - W) / (n - W), lr, low),
    ),
    (
        "other",
        "the cosine is off by one: its progress is 0 at step = warmup_steps",
        lambda s, n, lr, low, W: cosine((s + 1 - W) / (n - W), lr, low),
    ),
    (
        "other",
        "the cosine is off by one: its progress is 0 at step = warmup_steps",
        lambda s, n, lr, low, W: cosine((s + 1 - W) / (n - 1 - W), lr, low),
    ),
    (
        "missing_term",
        "the cosine falls to 0: it falls to min_lr",
        lambda s, n, lr, low, W: cosine((s - W) / (n - 1 - W), lr, 0.0),
    ),
    (
        "other",
        "min_lr is added to a cosine from lr to 0: its height is lr - min_lr, so that "
        "it starts at lr",
        lambda s, n, lr, low, W: low + cosine((s - W) / (n - 1 - W), lr, 0.0),
    ),
    (
        "missing_term",
        "min_lr is not added: the cosine falls from lr to min_lr",
        lambda s, n, lr, low, W: cosine((s - W) / (n - 1 - W), lr, low) - low,
    ),
    (
        "other",
        "the rate stops at min_lr: the cosine is stretched, to end at min_lr, not cut",
        lambda s, n, lr, low, W: max(cosine((s - W) / (n - 1 - W), lr, 0.0), low),
    ),
    (
        "factor",
        "the 1/2 is left out: (1 + cos) / 2 falls from 1 to 0",
        lambda s, n, lr, low, W: 2 * cosine((s - W) / (n - 1 - W), lr, low) - low,
    ),
    (
        "missing_term",
        "the 1 is left out: (1 + cos) / 2 falls from 1 to 0, the cosine alone from 1 to -1",
        lambda s, n, lr, low, W: low + (lr - low) / 2 * math.cos(math.pi * (s - W) / (n - 1 - W)),
    ),
    (
        "missing_term",
        "the 1 is left out: (1 + cos) / 2 falls from 1 to 0, the cosine alone from 1 to -1",
        lambda s, n, lr, low, W: low + (lr - low) * math.cos(math.pi * (s - W) / (n - 1 - W)),
    ),
    (
        "sign",
        "the cosine rises: it is 1 + cos, not 1 - cos",
        lambda s, n, lr, low, W: lr + low - cosine((s - W) / (n - 1 - W), lr, low),
    ),
    (
        "other",
        "the rate falls along a line: it falls along half a cosine",
        lambda s, n, lr, low, W: lr - (lr - low) * (s - W) / (n - 1 - W),
    ),
    (
        "factor",
        "the angle is pi / 2 at the end: half a cosine has the angle pi there",
        lambda s, n, lr, low, W: cosine((s - W) / (n - 1 - W) / 2, lr, low),
    ),
    (
        "factor",
        "the angle is 2 pi at the end, a whole cosine: it is pi",
        lambda s, n, lr, low, W: cosine(2 * (s - W) / (n - 1 - W), lr, low),
    ),
    (
        "factor",
        "the angle is not multiplied by pi",
        lambda s, n, lr, low, W: cosine((s - W) / (n - 1 - W) / math.pi, lr, low),
    ),
    (
        "missing_term",
        "the rate stays at lr after the warmup: it falls along half a cosine",
        lambda s, n, lr, low, W: lr + 0 * s,
    ),
)

EXERCISE = Exercise(
    name="learning_rate",
    title="warmup and cosine",
    task="The learning rate of update `step`: lr (step + 1) / warmup_steps while step < "
    "warmup_steps, then half a cosine from lr, at step = warmup_steps, down to min_lr at the last "
    "step, max_steps - 1.",
    signature="learning_rate(step, max_steps, lr, min_lr, warmup_steps)",
    shapes="""step          from 0 to max_steps - 1
max_steps     updates of the run, at least warmup_steps + 2
lr, min_lr    the highest rate and the last one, floats
warmup_steps  updates of the warmup; 0 for none
returns       the rate of this update, a float""",
    reference=reference,
    sizes=Sizes.of(
        "step max_steps warmup_steps",
        small="0 3 1, 2 3 1, 1 3 1, 0 4 2, 1 4 2, 2 5 2, 3 5 2",
        distinct="0 12 4, 2 12 4, 3 12 4, 4 12 4, 7 12 4, 11 12 4, 1 17 5, 6 17 5, 13 17 5, "
        "0 9 0, 3 9 0, 8 9 0",
        equal="0 12 4, 3 12 4, 4 12 4, 7 12 4, 10 12 4, 1 16 4, 6 16 4, 9 16 4, 15 16 4",
    ),
    draw=draw,
    hints=(
        "The first update has number 0 and must not have the rate 0: it would be wasted.",
        "The progress of the cosine is 0 at step = warmup_steps and 1 at step = max_steps - 1.",
        "(1 + cos(pi progress)) / 2 falls from 1 to 0.",
        "min_lr + (lr - min_lr) * (1 + cos(pi * (step - W) / (max_steps - 1 - W))) / 2.",
    ),
    derivation="Learning rate",
    solution="course/learn/exercises/learning_rate.py:learning_rate",
    outputs=("rate",),
    mistakes=(
        *(
            Mistake(verdict, "rate", sentence, {"warmup": formula})
            for verdict, sentence, formula in WRONG_WARMUPS
        ),
        Mistake(
            "missing_term",
            "rate",
            "there is no warmup: the cosine begins at step 0",
            {
                "warmup": lambda s, n, lr, low, W: cosine(s / (n - 1), lr, low),
                "after": lambda s, n, lr, low, W: cosine(s / (n - 1), lr, low),
            },
        ),
        *(
            Mistake(verdict, "rate", sentence, {"after": formula})
            for verdict, sentence, formula in WRONG_COSINES
        ),
    ),
    keeps_dtype=False,
)
