"""A loss curve as medians of equal parts, the noise around them, and the spikes."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from glasslm.lab.diagnosis.curve_table import Array, Series
from glasslm.training import guard

MAX_PARTS = 20
# Before the guard's window is full, fewer values are the history of a spike, with more standard
# deviations.
SHORT_HISTORIES = ((32, 7.0), (16, 8.0), (8, 12.0))
MIN_NORM_FACTOR = 3.0  # of the peak of a gradient norm to the median before it
SPIKE_CHUNK = 4096  # values whose windows are in memory together


class SmoothedCurve:
    """The finite values of a curve as medians of equal parts, with their standard errors."""

    def __init__(self, series: Series) -> None:
        steps, values = series.steps, series.values
        self.steps, self.values = steps, values  # (N,)
        self.unit = series.unit  # of the steps
        self.noise = noise_std(values)
        parts = np.array_split(np.arange(len(values)), min(MAX_PARTS, len(values) // 3))
        self.medians = np.array([np.median(values[part]) for part in parts])  # (parts,)
        self.part_steps = np.array([steps[part[len(part) // 2]] for part in parts])  # (parts,)
        self.median_error = 1.25 * self.noise / math.sqrt(min(map(len, parts)))
        first = np.sort(values[: min(5, max(1, len(values) // 25))])
        # The highest value may be a spike, so the second highest counts. If the second or third
        # step exploded, the median of the first three is lower.
        self.start = float(min(first[-2:][0], np.median(values[:3])))
        self.lowest = float(self.medians.min())
        self.fall = max(self.start - self.lowest, 0.0)
        tail = values[-max(3, len(values) // 100) :]
        self.end = float(np.median(tail))
        self.end_error = 1.25 * self.noise / math.sqrt(len(tail))

    @property
    def rise(self) -> float:
        """How far the end lies above the lowest median; 0 unless that is more than noise."""
        rises = [
            (self.medians[-1] - self.lowest, self.median_error),
            (self.end - self.lowest, self.end_error),
        ]
        return max(rise if rise > 8 * error else 0.0 for rise, error in rises)

    @property
    def has_exploded(self) -> bool:
        """Whether the loss ended far above its start, or never came below it again."""
        levels = ((self.lowest, self.median_error, 0.02), (self.end, self.end_error, 0.1))
        return any(
            level > self.start + max(8 * error, 4 * self.noise, share * abs(self.start))
            for level, error, share in levels
        )

    @property
    def has_never_fallen(self) -> bool:
        """Whether the loss fell by less than 5% of its start, or by less than the noise."""
        return self.fall <= max(0.05 * abs(self.start), 3 * self.median_error)


def noise_std(values: Array) -> float:
    """The standard deviation of the noise of values (N,), if it is normal.

    It is 0 for fewer than 5 values. It is the smaller of two estimates. A trend inflates that from
    first differences; a loss that alternates up and down inflates that from second differences.
    """
    if len(values) < 5:
        return 0.0
    first, second = (float(np.median(np.abs(np.diff(values, k)))) for k in (1, 2))
    return min(first / math.sqrt(2), second / math.sqrt(6)) / 0.6745


def find_spikes(series: Series) -> list[int]:
    """The indices of finite values far above those before them that come down again.

    High values at most 5 apart are one spike, of which the index of its peak is returned.
    """
    x = series.values
    limits, window = np.full(len(x), np.inf), guard.WINDOW_STEPS
    shortest = SHORT_HISTORIES[-1]
    for i in range(shortest[0], min(window, len(x))):
        count, deviations = next(
            history for history in SHORT_HISTORIES if i >= 2 * history[0] or history == shortest
        )
        limits[i] = guard.window_limits(x[i - count : i], deviations)
    for first in range(window, len(x), SPIKE_CHUNK):
        end = min(first + SPIKE_CHUNK, len(x))
        windows = sliding_window_view(x[first - window : end - 1], window)
        limits[first:end] = guard.window_limits(windows)
    spikes: list[list[int]] = []  # the indices of each
    for i in np.flatnonzero(x > limits).tolist():
        comes_down = i + 1 == len(x) or np.median(x[i + 1 : i + 17]) < limits[i]
        if spikes and i - spikes[-1][-1] <= 5:
            spikes[-1].append(i)
        elif comes_down:
            spikes.append([i])
    return [max(spike, key=lambda i: x[i]) for spike in spikes]


def find_norm_spikes(series: Series) -> list[int]:
    """The indices of the peaks of gradient norms, found in their logarithms.

    Norms vary by factors: sound batches have norms of several standard deviations above the mean.
    So a peak is also MIN_NORM_FACTOR times the median of the values before it.
    """
    positive = series.values > 0
    indices, values = np.flatnonzero(positive), series.values[positive]
    peaks = find_spikes(Series(series.steps[positive], np.log(values)))
    return [
        int(indices[i])
        for i in peaks
        if values[i] >= MIN_NORM_FACTOR * np.median(values[max(0, i - guard.WINDOW_STEPS) : i])
    ]


def fit_non_increasing(values: Array) -> Array:
    """(N,) the non-increasing sequence closest to values (N,) in least squares.

    The algorithm is pooling adjacent violators.

    >>> fit_non_increasing(np.array([3.0, 1.0, 2.0, 0.0])).tolist()
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
