"""Judges a loss curve: divergence, plateau, spikes, oscillation, overfitting, gradient norms.

Every threshold is relative to the noise and the total fall of the curve, because nothing else is
known about another program's run. The thresholds are rules of thumb, chosen so that noisy but
healthy curves of any length raise no alarm.
"""

from __future__ import annotations

import math

import numpy as np

from glasslm.lab.diagnosis.curve_columns import (
    judge_exploding,
    judge_generalization_gap,
    judge_overfitting,
    judge_vanishing,
)
from glasslm.lab.diagnosis.curve_files import Curve
from glasslm.lab.diagnosis.curve_table import Series
from glasslm.lab.diagnosis.smoothed_curve import (
    SmoothedCurve,
    find_norm_spikes,
    find_spikes,
    fit_non_increasing,
)
from glasslm.report.findings import SEVERITY, Finding, Verdict

MIN_LOSSES = 10  # finite values; fewer are not judged


def judge_curve(curve: Curve, fine_tuned: bool = False) -> list[Finding]:
    """The findings of every signal that the curve's columns support, the worst first.

    `fine_tuned` means that the run started from trained weights.
    """
    train = curve.train.finite
    findings = [_judge_nonfinite(curve)]
    if len(train) < MIN_LOSSES:
        findings.append(
            Finding(
                "length",
                "watch",
                f"{len(train)} finite losses",
                f"too few to judge: at least {MIN_LOSSES} are needed",
                "Log more often, or train longer.",
            )
        )
    else:
        smoothed = SmoothedCurve(train)
        findings += [
            _judge_divergence(smoothed),
            _judge_plateau(smoothed, curve.vocab_size, fine_tuned),
            _judge_spikes(train),
            _judge_oscillation(smoothed),
            _judge_final_slope(smoothed),
        ]
        if curve.vocab_size:
            findings.append(_judge_initial_loss(train, curve.vocab_size))
        if len(curve.validation.finite) >= 3:
            findings.append(judge_overfitting(train, curve.validation.finite))
            if curve.train_unit == curve.validation_unit:
                findings.append(judge_generalization_gap(train, curve.validation.finite))
        if len(curve.grad_norm.finite) >= MIN_LOSSES:
            findings += [
                judge_vanishing(smoothed, curve.grad_norm.finite),
                judge_exploding(smoothed, curve),
                _judge_norm_spikes(curve.grad_norm.finite),
            ]
    return sorted(findings, key=lambda finding: -SEVERITY[finding.verdict])


def _judge_nonfinite(curve: Curve) -> Finding:
    signal = "non-finite values"
    columns = {
        "loss": curve.train,
        "validation loss": curve.validation,
        "gradient norm": curve.grad_norm,
    }
    nonfinite_steps = {
        name: series.steps[~np.isfinite(series.values)] for name, series in columns.items()
    }
    bad = [(name, steps, columns[name]) for name, steps in nonfinite_steps.items() if len(steps)]
    if not bad:
        return Finding(
            signal, "ok", f"all {len(curve.train):,} losses are finite", "nothing overflowed"
        )
    evidence = "; ".join(
        f"{len(steps):,} of {len(series):,} values of the {name}, the first at {series.unit} "
        f"{steps[0]:,g}"
        for name, steps, series in bad
    )
    name, steps, series = bad[0]
    ends_finite = bool(np.isfinite(series.values[-1]))
    if ends_finite and len(steps) <= max(1, len(series) // 100):
        return Finding(
            signal,
            "watch",
            evidence,
            "a step overflowed, and the run recovered",
            "Look at the batch of that step. If it happens again, clip gradients (--grad-clip 1).",
        )
    if name == "loss" and not ends_finite and len(series.finite):
        evidence += (
            f"; the last finite loss was {series.finite.values[-1]:.4g} at {series.finite.at(-1)}"
        )
    return Finding(
        signal,
        "bad",
        evidence,
        "the numbers overflowed their type",
        "Go back to an earlier checkpoint. Lower --lr or lengthen --warmup-steps, clip gradients "
        "(--grad-clip 1), and use --precision fp32 or bf16.",
    )


def _judge_divergence(curve: SmoothedCurve) -> Finding:
    signal = "divergence"
    advice = (
        "Lower --lr three- to tenfold, lengthen --warmup-steps, clip gradients (--grad-clip 1), "
        "try --qk-norm."
    )
    lowest_step = curve.part_steps[int(curve.medians.argmin())]
    if curve.has_exploded:
        evidence = (
            f"{curve.start:.4g} at first, {curve.lowest:.4g} near {curve.unit} {lowest_step:,g}, "
            f"{curve.end:.4g} at the end"
        )
        return Finding(signal, "bad", evidence, "the loss exploded and did not come back", advice)
    gain = max(curve.fall, 8 * curve.median_error)
    if curve.rise > 0.15 * gain:
        bad = curve.rise > 0.5 * gain or curve.end > curve.start + 8 * curve.end_error
        last = max(curve.end, curve.medians[-1])
        lowest = f"{curve.lowest:.4g} near {curve.unit} {lowest_step:,g}"
        evidence = f"from {lowest} up to {last:.4g} at the end"
        meaning = (
            "the loss exploded and did not come back"
            if bad
            else "the loss rose again and did not come back"
        )
        return Finding(signal, "bad" if bad else "watch", evidence, meaning, advice)
    above = curve.medians - np.minimum.accumulate(curve.medians)
    if above.max() > max(0.3 * gain, 8 * curve.median_error) and len(above) > 4:
        peak = int(above.argmax())
        evidence = (
            f"up by {above[peak]:.3g} near {curve.unit} {curve.part_steps[peak]:,g}, and down again"
        )
        return Finding(signal, "watch", evidence, "the run was unstable for some steps", advice)
    evidence = f"{curve.start:.4g} at first, {curve.end:.4g} at the end"
    return Finding(signal, "ok", evidence, "the loss never rose for long")


def _judge_plateau(curve: SmoothedCurve, vocab_size: int | None, fine_tuned: bool) -> Finding:
    signal = "plateau"
    uniform = math.log(vocab_size) if vocab_size else None
    if curve.has_exploded:
        return Finding(signal, "ok", "not judged", "see divergence")
    if curve.has_never_fallen:
        guess = f"; ln {vocab_size} = {uniform:.3f}" if uniform else ""
        evidence = f"{curve.start:.4g} at first, {curve.lowest:.4g} at its lowest{guess}"
        if fine_tuned:
            return Finding(
                signal,
                "watch",
                evidence,
                "little was left to learn, or the model learned hardly anything",
                "Compare with the weights it started from, on both texts.",
            )
        is_near_uniform = uniform is not None and abs(curve.lowest - uniform) < 0.1 * uniform
        meaning = (
            "the model guesses uniformly: it learned nothing"
            if is_near_uniform
            else "the model learned hardly anything"
        )
        return Finding(
            signal,
            "bad",
            evidence,
            meaning,
            "Check that gradients arrive (a learning rate of 0, frozen weights, wrongly shifted "
            "targets), overfit one batch, and run a learning-rate range test.",
        )
    since = _stall_step(curve)
    if since is not None and curve.lowest > 0.1 * curve.start:
        evidence = f"{curve.medians[-1]:.4g} at the end, no lower than near {curve.unit} {since:,g}"
        meaning = (
            "no progress since: training converged, or it is stuck (rate too high or too low, "
            "model too small)"
        )
        return Finding(
            signal,
            "watch",
            evidence,
            meaning,
            "If the loss is still too high: another --lr, a decaying "
            "--schedule, a larger model. Otherwise stop earlier (--patience).",
        )
    return Finding(signal, "ok", f"fell by {curve.fall:.4g}", "the run made progress")


def _stall_step(curve: SmoothedCurve) -> float | None:
    """The step after which the loss made no further progress, or None.

    If the loss is a power law in the number of steps, each doubling of the steps lowers it by at
    least half as much as the doubling before. The curve has a plateau when all doublings after a
    clear fall together bring less than a third of that.
    """
    N = len(curve.values)
    bounds = [N >> k for k in range(int(math.log2(N / 4)), -1, -1)]  # the first is at most N / 4
    widths = [max(2, bound // 3) for bound in bounds]
    means = [float(np.median(curve.values[b - w : b])) for b, w in zip(bounds, widths)]
    errors = [1.25 * curve.noise / math.sqrt(w) for w in widths]
    for k in range(1, len(bounds) - 2):
        fell, error = means[k - 1] - means[k], math.hypot(errors[k - 1], errors[k])
        after = means[k] - means[-1] + 2 * math.hypot(errors[k], errors[-1])
        expected = fell * (1 - 0.5 ** (len(bounds) - 1 - k))
        later = curve.medians[curve.part_steps >= curve.steps[bounds[k] - 1]]
        flat = len(later) and np.ptp(later) < max(fell / 3, 8 * curve.median_error)
        if fell > max(5 * error, 0.03 * curve.fall) and after < expected / 3 and flat:
            return float(curve.steps[bounds[k] - 1])
    return None


def _judge_spikes(train: Series) -> Finding:
    signal, spikes = "spikes", find_spikes(train)
    if not spikes:
        return Finding(signal, "ok", "none", "no loss is 6 sd above the 128 losses before it")
    verdict: Verdict = "bad" if len(spikes) >= 5 and len(spikes) > len(train) / 200 else "watch"
    return Finding(
        signal,
        verdict,
        _list_spikes(train, spikes),
        "single steps had a high loss, and the run recovered",
        "Look at these batches (`glasslm diagnose RUN --replay STEP`). If the text is sound, "
        "lower --lr or the second of --betas (.95), and clip gradients.",
    )


def _judge_norm_spikes(norm: Series) -> Finding:
    signal, spikes = "gradient spikes", find_norm_spikes(norm)
    if not spikes:
        return Finding(signal, "ok", "none", "no norm is 6 sd above the 128 norms before it")
    return Finding(
        signal,
        "watch",
        _list_spikes(norm, spikes),
        "single batches had a far larger gradient than those before them",
        "Clip gradients (--grad-clip 1). If the loss has spikes at the same steps, look at these "
        "batches (`glasslm diagnose RUN --replay STEP`).",
    )


def _list_spikes(series: Series, spikes: list[int]) -> str:
    """The count of spikes, and step and value of the first five."""
    where = ", ".join(f"{series.steps[i]:,g} ({series.values[i]:.4g})" for i in spikes[:5])
    more = f" and {len(spikes) - 5} more" if len(spikes) > 5 else ""
    return f"{len(spikes)}, at {series.unit} {where}{more}"


def curve_facts(curve: Curve) -> dict[str, object]:
    """The events of a curve for JSON: steps of spikes and non-finite values, the best loss."""
    best = curve.validation.finite if len(curve.validation.finite) else curve.train.finite
    lowest = int(best.values.argmin()) if len(best) else None
    train, norm = curve.train.finite, curve.grad_norm.finite
    nonfinite = [
        series.steps[~np.isfinite(series.values)] for series in (curve.train, curve.validation)
    ]
    return {
        "spikes": {
            "loss": train.steps[find_spikes(train)].tolist(),
            "grad_norm": norm.steps[find_norm_spikes(norm)].tolist(),
        },
        "nonfinite": sorted({step for steps in nonfinite for step in steps.tolist()}),
        "best": None
        if lowest is None
        else {"step": float(best.steps[lowest]), "loss": float(best.values[lowest])},
        "step_unit": curve.step_unit,
        "rows_read": curve.rows_read,
        "rows_dropped": curve.rows_dropped,
    }


def _judge_oscillation(curve: SmoothedCurve) -> Finding:
    """Judge noise and swings around the closest non-increasing curve."""
    signal, x = "oscillation", curve.values
    if curve.has_never_fallen or curve.rise > 0.15 * max(curve.fall, 8 * curve.median_error):
        return Finding(signal, "ok", "not judged", "see divergence and plateau")
    x = np.delete(x, find_spikes(Series(curve.steps, x)))
    residuals = x - fit_non_increasing(x)
    residuals = residuals[
        len(residuals) // 10 :
    ]  # where the fall is steep, the fitted curve follows the noise
    scale = 1.4826 * float(np.median(np.abs(residuals - np.median(residuals)))) / curve.fall
    width = max(3, len(residuals) // 40)
    smooth = np.convolve(residuals, np.ones(width) / width, "valid")
    swing = float(smooth.std()) / curve.fall
    expected = curve.noise / math.sqrt(width) / curve.fall
    centred = residuals - residuals.mean()
    flip = float((centred[1:] * centred[:-1]).sum() / max((centred**2).sum(), 1e-300))
    evidence = f"the noise from one value to the next is {scale:.1%} of the total fall"
    advice = "Lower --lr, use a larger --batch-size, or raise momentum and the second of --betas."
    if scale > 0.25:
        meaning = "the noise hides the progress: the rate is too high or the batch too small"
        return Finding(signal, "watch", evidence, meaning, advice)
    if swing > max(0.05, 4 * expected):
        evidence = f"swings of {swing:.1%} of the total fall, slower than noise"
        return Finding(
            signal,
            "watch",
            evidence,
            "the loss swings: a rate that is too high or cyclic, or a text in blocks of one kind",
            "Lower --lr, and check that the text is shuffled.",
        )
    if flip < -0.7 and scale > 0.03 and len(residuals) >= 20:
        evidence += "; it alternates up and down"
        return Finding(signal, "watch", evidence, "steps overshoot", advice)
    return Finding(signal, "ok", evidence, "an ordinary amount of noise")


def _judge_final_slope(curve: SmoothedCurve) -> Finding:
    signal = "final slope"
    last = max(5, len(curve.values) // 5)
    y = curve.values[-last:]
    x = np.arange(last) - (last - 1) / 2
    slope = float((x * y).sum() / (x * x).sum())
    error = float((y - y.mean() - slope * x).std()) / math.sqrt(float((x * x).sum()))
    clear = -slope > (5 + 20 / last) * error
    fell = -slope * last
    steep = fell > 0.5 * last / len(curve.values) * curve.fall
    if steep and clear and not curve.has_never_fallen:
        evidence = (
            f"the last fifth lowered the loss by {fell:.3g}, {fell / curve.fall:.0%} of the total "
            "fall"
        )
        return Finding(
            signal,
            "watch",
            evidence,
            "training stopped while the loss was still falling fast",
            "Train longer (--max-steps).",
        )
    evidence = f"the last fifth changed the loss by {-fell:+.3g}"
    return Finding(signal, "ok", evidence, "most of the fall came before the end")


def _judge_initial_loss(train: Series, vocab_size: int) -> Finding:
    signal, uniform, first = "initial loss", math.log(vocab_size), train.values[0]
    evidence = f"{first:.3f} at {train.at(0)}; ln {vocab_size} = {uniform:.3f}"
    if train.steps[0] > 1 or first <= uniform + 0.1:
        return Finding(signal, "ok", evidence, "no worse than a uniform guess")
    verdict: Verdict = "bad" if first > uniform + 0.5 else "watch"
    return Finding(
        signal,
        verdict,
        evidence,
        "worse than a uniform guess: the first logits are too large",
        "Start with smaller weights; normalize before the head.",
    )
