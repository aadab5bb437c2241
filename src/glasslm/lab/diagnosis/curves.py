"""What a loss curve says about its run, in the field's words: divergence, plateau, spikes, overfitting, gradients.

Everything is judged against the curve's own noise and its own fall, because nothing else is known of somebody else's
run. The thresholds are rules of thumb, tuned so that decaying noisy curves of all lengths raise no alarm.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from glasslm.lab.diagnosis.curve_files import Array, Curve, Series
from glasslm.lab.diagnosis.curve_files import read as read
from glasslm.report.findings import SEVERITY, Finding, Verdict
from glasslm.training import guard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glasslm.report.figures import Palette

SHORTEST = 10  # finite values that can be judged
FEWER = (
    (32, 7.0),
    (16, 8.0),
    (8, 12.0),
)  # before the guard's window is full: of so many, and more sd
SEGMENTS = 20


def findings(curve: Curve, tuned: bool = False) -> list[Finding]:
    """Every signal that the curve's columns can tell of, the worst first. `tuned`: it did not start from nothing."""
    train = curve.train.finite
    found = [_nonfinite(curve)]
    if len(train) < SHORTEST:
        seen = f"{len(train)} finite losses"
        found.append(Finding("length", "watch", seen, f"too few to judge: at least {SHORTEST} are needed",
                             "Log more often, or train longer."))  # fmt: skip
    else:
        level = Level(train)
        found += [_divergence(level), _plateau(level, curve.vocab_size, tuned), _spikes(train)]
        found += [_noise(level), _end(level)]
        if curve.vocab_size:
            found.append(_initial(train, curve.vocab_size))
        if len(curve.validation.finite) >= 3:
            found += [
                _overfitting(train, curve.validation.finite),
                _gap(train, curve.validation.finite),
            ]
        if len(curve.grad_norm.finite) >= SHORTEST:
            found += [_vanishing(level, curve.grad_norm.finite), _exploding(level, curve)]
    return sorted(found, key=lambda finding: -SEVERITY[finding.verdict])


class Level:
    """The finite values of a curve without their noise: medians of equal parts, and what they tell at a glance."""

    def __init__(self, series: Series) -> None:
        steps, values = series.steps, series.values
        self.steps, self.values = steps, values
        self.noise = noise_of(values)
        parts = np.array_split(np.arange(len(values)), min(SEGMENTS, len(values) // 3))
        self.parts = parts
        self.medians = np.array([np.median(values[part]) for part in parts])
        self.at = np.array([steps[part[len(part) // 2]] for part in parts])
        self.error = (
            1.25 * self.noise / math.sqrt(min(map(len, parts)))
        )  # standard error of such a median
        first = np.sort(values[: min(5, max(1, len(values) // 25))])
        # Not the highest, which may be a spike; and where the second or third step exploded, what was before it
        self.start = float(min(first[-2:][0], np.median(values[:3])))
        self.low = float(self.medians.min())
        self.fall = max(self.start - self.low, 0.0)
        tail = values[-max(3, len(values) // 100) :]
        self.end = float(np.median(tail))
        self.end_error = 1.25 * self.noise / math.sqrt(len(tail))

    @property
    def rise(self) -> float:
        """How far the end lies above the lowest level; 0 unless that is more than noise."""
        rises = [(self.medians[-1] - self.low, self.error), (self.end - self.low, self.end_error)]
        return max(rise if rise > 8 * error else 0.0 for rise, error in rises)

    @property
    def exploded(self) -> bool:
        """It ended far above where it began, or has not been as low since: no fall is there to be measured by."""
        levels = ((self.low, self.error, 0.02), (self.end, self.end_error, 0.1))
        return any(
            x > self.start + max(8 * e, 4 * self.noise, share * abs(self.start))
            for x, e, share in levels
        )

    @property
    def never_fell(self) -> bool:
        return self.fall <= max(0.05 * abs(self.start), 3 * self.error)


def noise_of(values: Array) -> float:
    """The sd of normal noise; 0 for fewer than 5 values.

    From first differences and from second ones, of which the lesser counts: a trend inflates the first, a loss that
    goes up and down in turns the second.
    """
    if len(values) < 5:
        return 0.0
    first, second = (float(np.median(np.abs(np.diff(values, k)))) for k in (1, 2))
    return min(first / math.sqrt(2), second / math.sqrt(6)) / 0.6745


def _nonfinite(curve: Curve) -> Finding:
    signal = "non-finite values"
    columns = {
        "loss": curve.train,
        "validation loss": curve.validation,
        "gradient norm": curve.grad_norm,
    }
    lost = {name: series.steps[~np.isfinite(series.values)] for name, series in columns.items()}
    bad = [(name, where, columns[name]) for name, where in lost.items() if len(where)]
    if not bad:
        return Finding(
            signal, "ok", f"all {len(curve.train):,} losses are finite", "nothing overflowed"
        )
    seen = "; ".join(f"{len(where):,} of {len(series):,} values of the {name}, the first at step {where[0]:,g}"
                     for name, where, series in bad)  # fmt: skip
    name, _, series = bad[0]
    recovered = bool(np.isfinite(series.values[-1])) and len(bad[0][1]) <= max(
        1, len(series) // 100
    )
    if name == "loss" and not np.isfinite(series.values[-1]) and len(series.finite):
        seen += f"; the last finite loss was {series.finite.values[-1]:.4g} at step {series.finite.steps[-1]:,g}"
    means = (
        "a step overflowed, and the run recovered"
        if recovered
        else "the numbers left the range of their type"
    )
    advice = ("Look at the batch of that step. If it happens again, clip gradients (--grad-clip 1)." if recovered else
              "Lower --lr or lengthen --warmup-steps, clip gradients, keep --precision fp32 or bf16; go back to a "
              "checkpoint from before.")  # fmt: skip
    return Finding(signal, "watch" if recovered else "bad", seen, means, advice)


def _divergence(level: Level) -> Finding:
    signal = "divergence"
    advice = "Lower --lr three- to tenfold, lengthen --warmup-steps, clip gradients (--grad-clip 1), try --qk-norm."
    where = level.at[int(level.medians.argmin())]
    if level.exploded:
        seen = f"{level.start:.4g} at first, {level.low:.4g} near step {where:,g}, {level.end:.4g} at the end"
        return Finding(signal, "bad", seen, "the loss exploded and did not come back", advice)
    gain = max(level.fall, 8 * level.error)
    if level.rise > 0.15 * gain:
        bad = level.rise > 0.5 * gain or level.end > level.start + 8 * level.end_error
        seen = f"from {level.low:.4g} near step {where:,g} up to {max(level.end, level.medians[-1]):.4g} at the end"
        means = (
            "the loss exploded and did not come back"
            if bad
            else "the loss rises again, and has not come back"
        )
        return Finding(signal, "bad" if bad else "watch", seen, means, advice)
    above = level.medians - np.minimum.accumulate(level.medians)
    if above.max() > max(0.3 * gain, 8 * level.error) and len(above) > 4:
        peak = int(above.argmax())
        seen = f"up by {above[peak]:.3g} near step {level.at[peak]:,g}, and down again"
        return Finding(signal, "watch", seen, "the run was unstable for a while", advice)
    seen = f"{level.start:.4g} at first, {level.end:.4g} at the end"
    return Finding(signal, "ok", seen, "the loss never rose for long")


def _plateau(level: Level, vocab_size: int | None, tuned: bool) -> Finding:
    signal = "plateau"
    advice = (
        "Check that gradients arrive (a learning rate of 0, frozen weights, targets shifted wrongly), learn one batch "
        "by heart, and run a learning-rate range test."
    )
    uniform = math.log(vocab_size) if vocab_size else None
    guess = f"; ln {vocab_size} = {uniform:.3f}" if uniform else ""
    if level.exploded:
        return Finding(signal, "ok", "not judged", "see divergence")
    if level.never_fell:
        seen = f"{level.start:.4g} at first, {level.low:.4g} at its lowest{guess}"
        if tuned:
            return Finding(signal, "watch", seen, "little was left to learn, or it hardly learnt anything",
                           "Compare with the weights it began with, on both texts.")  # fmt: skip
        near = uniform is not None and abs(level.low - uniform) < 0.1 * uniform
        means = "it guesses uniformly: nothing was learnt" if near else "it hardly learnt anything"
        return Finding(signal, "bad", seen, means, advice)
    since = _stalled(level)
    if since is not None and level.low > 0.1 * level.start:
        seen = f"{level.medians[-1]:.4g} at the end, no lower than near step {since:,g}"
        means = "no progress since: it has converged, or it is stuck (too high or too low a rate, too small a model)"
        return Finding(signal, "watch", seen, means, "If that is not low enough: another --lr, a decaying --schedule, "
                       "a larger model; else stop earlier (--patience).")  # fmt: skip
    return Finding(signal, "ok", f"fell by {level.fall:.4g}", "the run made progress")


def _stalled(level: Level) -> float | None:
    """The step after which nothing more was learnt, or None.

    Of a power law in the number of steps each doubling brings at least half of what the one before it brought. It is
    a plateau when the doublings after a clear fall bring less than a third of that together.
    """
    N = len(level.values)
    bounds = [
        N >> k for k in range(int(math.log2(N / 4)), -1, -1)
    ]  # N/4 at most at the first of them
    widths = [max(2, bound // 3) for bound in bounds]
    means = [float(np.median(level.values[b - w : b])) for b, w in zip(bounds, widths)]
    errors = [1.25 * level.noise / math.sqrt(w) for w in widths]
    for k in range(1, len(bounds) - 2):
        fell, error = means[k - 1] - means[k], math.hypot(errors[k - 1], errors[k])
        after = means[k] - means[-1] + 2 * math.hypot(errors[k], errors[-1])
        expected = fell * (1 - 0.5 ** (len(bounds) - 1 - k))
        later = level.medians[level.at >= level.steps[bounds[k] - 1]]
        flat = len(later) and np.ptp(later) < max(fell / 3, 8 * level.error)
        if fell > max(5 * error, 0.03 * level.fall) and after < expected / 3 and flat:
            return float(level.steps[bounds[k] - 1])
    return None


def spikes(series: Series) -> list[int]:
    """Indices of finite values far above those before them, the first of each group; those that come down again."""
    x = series.values
    limits, window = np.full(len(x), np.inf), guard.WINDOW
    for i in range(FEWER[-1][0], min(window, len(x))):
        count, sds = next(few for few in FEWER if i >= 2 * few[0] or few == FEWER[-1])
        limits[i] = guard.limit_of(x[i - count : i], sds)
    for first in range(
        window, len(x), 4096
    ):  # in pieces, because the windows of a long curve would fill the memory
        end = min(first + 4096, len(x))
        limits[first:end] = guard.limit_of(sliding_window_view(x[first - window : end - 1], window))
    found: list[int] = []
    for i in np.flatnonzero(x > limits).tolist():
        comes_down = i + 1 == len(x) or np.median(x[i + 1 : i + 17]) < limits[i]
        if comes_down and not (found and i - found[-1] <= 5):
            found.append(i)
    return found


def _spikes(train: Series) -> Finding:
    signal, found = "spikes", spikes(train)
    if not found:
        return Finding(signal, "ok", "none", "no loss stands 6 sd above the 128 before it")
    where = ", ".join(f"{train.steps[i]:,g} ({train.values[i]:.4g})" for i in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    verdict: Verdict = "bad" if len(found) >= 5 and len(found) > len(train) / 200 else "watch"
    return Finding(signal, verdict, f"{len(found)}, at step {where}{more}", "single steps went wrong and were overcome",
                   "Look at these batches (`glasslm diagnose RUN --replay STEP`); if they are sound, lower --lr or "
                   "the second of --betas (.95), and clip gradients.")  # fmt: skip


def _noise(level: Level) -> Finding:
    """Noise and swings, measured from the closest curve that never rises."""
    signal, x = "oscillation", level.values
    if level.never_fell or level.rise > 0.15 * max(level.fall, 8 * level.error):
        return Finding(signal, "ok", "not judged", "see divergence and plateau")
    x = np.delete(x, spikes(Series(level.steps, x)))
    rest = x - falling(x)
    rest = rest[
        len(rest) // 10 :
    ]  # where the fall is steep the closest such curve follows the noise
    scale = 1.4826 * float(np.median(np.abs(rest - np.median(rest)))) / level.fall
    width = max(3, len(rest) // 40)
    smooth = np.convolve(rest, np.ones(width) / width, "valid")
    swing = float(smooth.std()) / level.fall
    expected = level.noise / math.sqrt(width) / level.fall
    centred = rest - rest.mean()
    flip = float((centred[1:] * centred[:-1]).sum() / max((centred**2).sum(), 1e-300))
    seen = f"{scale:.1%} of the whole fall is noise from one value to the next"
    advice = "Lower --lr, use a larger --batch-size, or raise momentum and the second of --betas."
    if scale > 0.25:
        means = "the noise hides the progress: the rate is high or the batch small"
        return Finding(signal, "watch", seen, means, advice)
    if swing > max(0.05, 4 * expected):
        seen = f"swings of {swing:.1%} of the whole fall, slower than noise"
        return Finding(signal, "watch", seen, "the loss swings: too high a rate, a rate that cycles, or text in blocks",
                       "Lower --lr; see that the text is shuffled.")  # fmt: skip
    if flip < -0.7 and scale > 0.03 and len(rest) >= 20:
        return Finding(
            signal, "watch", f"{seen}; up and down from each to the next", "steps overshoot", advice
        )
    return Finding(signal, "ok", seen, "an ordinary amount of noise")


def falling(values: Array) -> Array:
    """The non-increasing sequence closest to `values` in squares, by pooling neighbours that are out of order.

    >>> falling(np.array([3.0, 1.0, 2.0, 0.0])).tolist()
    [3.0, 1.5, 1.5, 0.0]
    """
    blocks: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while blocks and blocks[-1][0] < mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def _end(level: Level) -> Finding:
    signal = "the end"
    last = max(5, len(level.values) // 5)
    y = level.values[-last:]
    x = np.arange(last) - (last - 1) / 2
    slope = float((x * y).sum() / (x * x).sum())
    error = float((y - y.mean() - slope * x).std()) / math.sqrt(float((x * x).sum()))
    clear = -slope > (5 + 20 / last) * error
    fell = -slope * last
    if fell > 0.5 * last / len(level.values) * level.fall and clear and not level.never_fell:
        return Finding(signal, "watch", f"the last fifth brought {fell:.3g}, {fell / level.fall:.0%} of the whole fall",
                       "it stopped while it was still learning fast", "Train longer (--max-steps).")  # fmt: skip
    return Finding(
        signal, "ok", f"the last fifth changed the loss by {-fell:+.3g}", "most was learnt before"
    )


def _initial(train: Series, vocab_size: int) -> Finding:
    signal, uniform, first = "initial loss", math.log(vocab_size), train.values[0]
    seen = f"{first:.3f} at step {train.steps[0]:,g}; ln {vocab_size} = {uniform:.3f}"
    if train.steps[0] > 1 or first <= uniform + 0.1:
        return Finding(signal, "ok", seen, "no worse than a uniform guess")
    verdict: Verdict = "bad" if first > uniform + 0.5 else "watch"
    return Finding(signal, verdict, seen, "worse than a uniform guess: its first logits are too large",
                   "Start with smaller weights; normalise before the head.")  # fmt: skip


def _around(series: Series, first: float, last: float) -> float:
    """The median between two steps, of at least the value closest to the second."""
    inside = series.values[(series.steps >= first) & (series.steps <= last)]
    return (
        float(np.median(inside))
        if len(inside)
        else float(series.values[np.abs(series.steps - last).argmin()])
    )


def _overfitting(train: Series, validation: Series) -> Finding:
    signal, v = "overfitting", validation.values
    best, last = int(v.argmin()), validation.steps[-1]
    at, low, after = validation.steps[best], v[best], v[best + 1 :]
    end = float(np.median(v[-min(3, max(1, len(after))) :]))
    climbs = len(after) >= 2 and np.median(after[len(after) // 2 :]) >= np.median(
        after[: -(len(after) // 2)]
    )
    seen = f"best validation loss {low:.4g} at step {at:,g}, {end:.4g} at step {last:,g}"
    span = (last - at) / 3
    fell = _around(train, at - span, at + span) - _around(train, last - span, last)
    if climbs and end - low > max(0.01 * low, 5 * noise_of(v)) and fell > 0:
        seen += f", {end - low:.3g} above it; meanwhile the training loss fell by {fell:.3g}"
        verdict: Verdict = "bad" if end - low > 0.05 * low else "watch"
        return Finding(signal, verdict, seen, "since then it learns its text by heart",
                       f"Use the checkpoint of step {at:,g}. Next time --patience, more text, --dropout or a smaller "
                       "model.")  # fmt: skip
    return Finding(signal, "ok", seen, "the validation loss does not climb from its minimum")


def _gap(train: Series, validation: Series) -> Finding:
    signal = "generalisation gap"
    span = (validation.steps[-1] - validation.steps[0]) / 10
    last = validation.steps[-1]
    seen_train, seen_val = (
        _around(train, last - span, last),
        float(np.median(validation.values[-3:])),
    )
    gap = seen_val - seen_train
    seen = f"training {seen_train:.4g}, validation {seen_val:.4g} at the end"
    noise = (
        4
        * noise_of(train.values)
        / math.sqrt(max(1, int(np.count_nonzero(train.steps >= last - span))))
    )
    if gap > max(0.3 * abs(seen_train), noise):
        return Finding(signal, "watch", seen, "much of what it knows holds for its own text only",
                       "More text, --dropout, --weight-decay, a smaller model.")  # fmt: skip
    if gap < -max(0.15 * abs(seen_train), noise):
        return Finding(signal, "watch", seen, "validation is far easier than training: dropout, another kind of text, "
                       "or training text among the validation text",
                       "Compare both without dropout, and look for passages that both parts have.")  # fmt: skip
    return Finding(signal, "ok", seen, "the two agree")


def _vanishing(level: Level, norm: Series) -> Finding:
    signal, medians = "vanishing gradients", Level(norm).medians
    top, end = float(medians.max()), float(medians[-1])
    seen = f"gradient norm {top:.3g} at its highest, {end:.3g} at the end; loss {level.start:.4g} to {level.end:.4g}"
    if end < max(1e-3 * top, 1e-7) and level.end > 0.4 * level.start:
        return Finding(signal, "bad", seen, "nothing flows back any more, while the loss is still high",
                       "Look at the gradient norm of each layer (`glasslm diagnose RUN`): saturated or dead units, too "
                       "small weights, no residual path, fp16 that underflows.")  # fmt: skip
    return Finding(signal, "ok", seen, "gradients arrive as long as there is something to learn")


def _exploding(train: Level, curve: Curve) -> Finding:
    """A norm that grows while the loss goes on falling to its lowest level is how text is learnt by heart."""
    signal, norm = "exploding gradients", curve.grad_norm.finite
    medians = Level(norm).medians
    low = float(np.minimum.accumulate(medians)[-1])
    grown = float((medians / np.maximum(np.minimum.accumulate(medians), 1e-30)).max())
    end = float(medians[-1])
    clipped = curve.clipped.finite.values
    share = float(clipped[len(clipped) // 2 :].mean()) if len(clipped) else 0.0
    seen = f"gradient norm {low:.3g} at its lowest level, {end:.3g} at the end"
    seen += f"; {share:.0%} clipped in the second half" if len(clipped) else ""
    advice = "Lower --lr, lengthen --warmup-steps, clip (--grad-clip 1), try --qk-norm or pre-norm."
    if grown > 20:
        return Finding(
            signal,
            "bad",
            seen,
            f"the norm grew {grown:.0f}-fold: the run leaves the stable region",
            advice,
        )
    if (grown > 6 or (share > 0.9 and grown > 3)) and train.rise:
        return Finding(signal, "watch", seen, f"the norm grew {grown:.1f}-fold", advice)
    means = (
        "the norm keeps its size"
        if grown < 3
        else f"the norm grew {grown:.1f}-fold while the loss went on falling"
    )
    return Finding(signal, "ok", seen, means)


def draw(curve: Curve, colours: Palette) -> Figure:
    """The curve with what can be pointed at: spikes, values that are not finite, the best validation loss."""
    from matplotlib.figure import Figure

    from glasslm.report import figures

    norms = curve.grad_norm.finite
    figure = Figure(figsize=(9, 5.6 if len(norms) else 4), layout="constrained")
    ratios = (3, 1) if len(norms) else (1,)
    (losses, *below) = figure.subplots(
        len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False
    )[:, 0]
    figures.dress(losses, "Loss", "", colours)
    train, validation, lost = (
        curve.train.finite,
        curve.validation.finite,
        ~np.isfinite(curve.train.values),
    )
    losses.plot(
        train.steps, train.values, color=colours.train, linewidth=0.9, alpha=0.8, label="training"
    )
    if len(validation):
        best = int(validation.values.argmin())
        losses.plot(validation.steps, validation.values, "o-", color=colours.validation, markersize=3.5, linewidth=1.8,
                    label="validation")  # fmt: skip
        losses.plot(validation.steps[best], validation.values[best], "*", color=colours.validation, markersize=14,
                    markeredgecolor=colours.ink, markeredgewidth=0.6, label="best validation loss")  # fmt: skip
    if found := spikes(train):
        losses.plot(
            train.steps[found],
            train.values[found],
            "v",
            color=colours.third,
            markersize=8,
            label="spike",
        )
    if lost.any():
        losses.plot(curve.train.steps[lost], np.full(lost.sum(), 0.02), "x", color=colours.validation, markersize=5,
                    transform=losses.get_xaxis_transform(), label="not finite")  # fmt: skip
    for axes in below:
        figures.dress(axes, "Gradient norm", "", colours)
        axes.plot(norms.steps, norms.values, color=colours.third, linewidth=0.9)
        if (norms.values > 0).all():
            axes.set_yscale("log")
            close = np.ptp(np.log10(norms.values)) < 1
            axes.tick_params(which="minor", labelleft=close, colors=colours.ink, labelsize=8)
    (below or [losses])[-1].set_xlabel("step", color=colours.ink)
    for axes in (losses, *below):
        figures.finish(axes, colours)
    return figure
