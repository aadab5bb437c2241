"""Judges the validation loss and the gradient norm of a curve."""

from __future__ import annotations

import math

import numpy as np

from glasslm.lab.diagnosis.curve_files import Curve
from glasslm.lab.diagnosis.curve_table import Array, Series
from glasslm.lab.diagnosis.smoothed_curve import SmoothedCurve, noise_std
from glasslm.report.findings import Finding, Verdict


def judge_overfitting(train: Series, validation: Series) -> Finding:
    """Judge whether the validation loss climbs while the training loss falls."""
    signal, v = "overfitting", validation.values
    best, last = int(v.argmin()), validation.steps[-1]
    best_step, low, after = validation.steps[best], v[best], v[best + 1 :]
    end = _end_value(Series(validation.steps[best:], v[best:]))
    half = len(after) // 2
    climbs = len(after) >= 2 and np.median(after[half:]) >= np.median(after[:-half])
    evidence = (
        f"best validation loss {low:.4g} at {validation.at(best)}, {end:.4g} at {validation.at(-1)}"
    )
    span = (last - best_step) / 3
    fell = _median_between(train, best_step - span, best_step + span) - _median_between(
        train, last - span, last
    )
    if climbs and end - low > max(0.01 * low, 5 * noise_std(v)) and fell > 0:
        evidence += f", {end - low:.3g} above it; meanwhile the training loss fell by {fell:.3g}"
        verdict: Verdict = "bad" if end - low > 0.05 * low else "watch"
        return Finding(
            signal,
            verdict,
            evidence,
            "since then the model memorizes its training text",
            f"Use the checkpoint of {validation.at(best)}. Next time use --patience, more text, "
            "--dropout or a smaller model.",
        )
    return Finding(signal, "ok", evidence, "the validation loss does not climb from its minimum")


def judge_generalization_gap(train: Series, validation: Series) -> Finding:
    """Judge the difference of the validation and the training loss at the end."""
    signal = "generalization gap"
    span = (validation.steps[-1] - validation.steps[0]) / 10
    last = validation.steps[-1]
    train_loss = _median_between(train, last - span, last)
    val_loss = _end_value(validation)
    gap = val_loss - train_loss
    evidence = f"training {train_loss:.4g}, validation {val_loss:.4g} at the end"
    count = max(1, int(np.count_nonzero(train.steps >= last - span)))
    noise = 4 * noise_std(train.values) / math.sqrt(count)
    if gap > max(0.3 * abs(train_loss), noise):
        return Finding(
            signal,
            "watch",
            evidence,
            "the model fits its training text much better than other text",
            "Use more text, --dropout, --weight-decay or a smaller model.",
        )
    if gap < -max(0.15 * abs(train_loss), noise):
        return Finding(
            signal,
            "watch",
            evidence,
            "validation is far easier than training: dropout, another kind of text, "
            "or training text among the validation text",
            "Compare both without dropout, and look for passages that both parts have.",
        )
    return Finding(signal, "ok", evidence, "the two losses are close")


def _end_value(series: Series) -> float:
    """The median of the last three values, without those before the last tenth of the steps."""
    last, span = series.steps[-1], series.steps[-1] - series.steps[0]
    return float(np.median(series.values[-3:][series.steps[-3:] >= last - span / 10]))


def _median_between(series: Series, first: float, last: float) -> float:
    """The median of the values between two steps, or the value nearest to the second."""
    inside = series.values[(series.steps >= first) & (series.steps <= last)]
    if len(inside):
        return float(np.median(inside))
    return float(series.values[np.abs(series.steps - last).argmin()])


def judge_vanishing(loss: SmoothedCurve, norm: Series) -> Finding:
    """Judge whether the gradient norm fell to nearly 0 while the loss is still high."""
    signal, medians = "vanishing gradients", SmoothedCurve(norm).medians
    top, end = float(medians.max()), float(medians[-1])
    evidence = (
        f"gradient norm {norm.values.max():.3g} at its highest, about {end:.3g} at the end; loss "
        f"{loss.start:.4g} to {loss.end:.4g}"
    )
    if end < max(1e-3 * top, 1e-7) and loss.end > 0.4 * loss.start:
        return Finding(
            signal,
            "bad",
            evidence,
            "the gradients vanished while the loss is still high",
            "Look at the gradient norm of each layer (`glasslm diagnose RUN`): saturated or dead "
            "units, weights that are too small, no residual path, fp16 underflow.",
        )
    return Finding(signal, "ok", evidence, "gradients arrive while the loss is high")


def judge_exploding(loss: SmoothedCurve, curve: Curve) -> Finding:
    """Judge the growth of the gradient norm.

    While the loss still falls to its lowest level, a growing norm is a sign of memorized text, not
    of instability.
    """
    signal = "exploding gradients"
    medians = SmoothedCurve(curve.grad_norm.finite).medians
    lowest: Array = np.minimum.accumulate(medians)
    growth = float((medians / np.maximum(lowest, 1e-30)).max())
    clipped = curve.clipped.finite.values
    share = float(clipped[len(clipped) // 2 :].mean()) if len(clipped) else 0.0
    evidence = (
        f"gradient norm about {float(lowest[-1]):.3g} where it is lowest, about "
        f"{float(medians[-1]):.3g} at the end"
    )
    evidence += f"; {share:.0%} clipped in the second half" if len(clipped) else ""
    advice = "Lower --lr, lengthen --warmup-steps, clip (--grad-clip 1), try --qk-norm or pre-norm."
    if growth > 20:
        meaning = f"the norm grew {growth:.0f}-fold: training is becoming unstable"
        return Finding(signal, "bad", evidence, meaning, advice)
    if (growth > 6 or (share > 0.9 and growth > 3)) and loss.rise:
        return Finding(signal, "watch", evidence, f"the norm grew {growth:.1f}-fold", advice)
    meaning = (
        "the norm keeps its size"
        if growth < 3
        else f"the norm grew {growth:.1f}-fold while the loss went on falling"
    )
    return Finding(signal, "ok", evidence, meaning)
