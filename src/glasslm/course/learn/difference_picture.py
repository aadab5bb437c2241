"""A picture of a wrong result: which elements are wrong, and by how much."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from glasslm import files
from glasslm.course.learn.exercise import Array
from glasslm.course.learn.verdict import Verdict


def has_difference(verdict: Verdict) -> bool:
    """Whether the verdict's example has a result of numbers beside the right one."""
    example = verdict.example or {}
    return "got" in example and all(
        _as_matrix(example[key]) is not None for key in ("got", "wanted")
    )


def draw_difference(verdict: Verdict, path: Path) -> None:
    """Draw the result, the right one and their difference into a PNG file.

    Arrays of more than two axes are drawn with all but the last axis as rows.
    """
    from matplotlib.figure import Figure

    assert verdict.example is not None
    example = verdict.example
    got, wanted = _as_matrix(example["got"]), _as_matrix(example["wanted"])
    assert got is not None
    assert wanted is not None
    panels = {f"your {example['output']}": got, f"right {example['output']}": wanted}
    if got.shape == wanted.shape:
        panels["difference"] = got - wanted
    figure = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items()):
        limit = float(np.nanmax(np.abs(values), initial=1e-12))
        image = axis.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
        axis.set_title(title)
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(values.shape[0]))
        figure.colorbar(image, ax=axis, shrink=0.7)
    figure.suptitle(f"{verdict.exercise}: {verdict.verdict.replace('_', ' ')}")
    image_bytes = io.BytesIO()
    figure.savefig(image_bytes, format="png", dpi=120)
    files.write_atomic(path, image_bytes.getvalue())


def _as_matrix(value: object) -> Array | None:
    """Nested lists of numbers as a matrix; None for anything else."""
    try:
        array = np.array(value, dtype=float)
    except (TypeError, ValueError):
        return None
    if array.size == 0:
        return None
    return array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(1, -1)
