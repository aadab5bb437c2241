"""Read the scalars of a TensorBoard event file, with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

from glasslm.errors import InputError


def read_events(path: Path) -> list[dict[str, float]]:
    """The step and its scalars by tag, for each step that has any.

    Raises InputError where TensorBoard is not installed or the file has no scalars.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise InputError(
            f"{path} is a TensorBoard event file, and TensorBoard is not installed: pip install "
            "tensorboard, or export the scalars as CSV"
        ) from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    cells: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            cells.setdefault(event.step, {"step": float(event.step)})[tag] = event.value
    if not cells:
        raise InputError(f"{path} has no scalars: expected an event file that a training wrote")
    return [cells[step] for step in sorted(cells)]
