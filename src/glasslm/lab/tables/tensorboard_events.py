"""Read the scalars of a TensorBoard event file, with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

from glasslm.errors import InputError


def read_events(path: Path) -> list[dict[str, float]]:
    """The step and its scalars by tag, for each step that has any, in ascending order of steps.

    Another value of a scalar at the same step gets an entry of its own. Raises InputError where
    TensorBoard is not installed or the file has no scalars.
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
    latest: dict[int, dict[str, float]] = {}  # by step
    entries = []
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            cells = latest.get(event.step)
            if cells is None or (tag in cells and cells[tag] != event.value):
                latest[event.step] = {"step": float(event.step)}
                entries.append(latest[event.step])
            latest[event.step][tag] = event.value
    if not entries:
        raise InputError(f"{path} has no scalars: expected an event file that a training wrote")
    return sorted(entries, key=lambda entry: entry["step"])
