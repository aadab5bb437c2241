"""Which checkpoint of a run is meant: the best, the latest or that of a step."""

from __future__ import annotations

from typing import Literal

from glasslm.errors import InputError

CheckpointSelector = Literal["latest", "best"] | int


def parse_checkpoint(text: str) -> CheckpointSelector:
    """The value of --checkpoint: "best", "latest" or a step. Raises InputError for other text."""
    if text == "best":
        return "best"
    if text == "latest":
        return "latest"
    if text.isascii() and text.isdigit():
        return int(text)
    raise InputError(f"checkpoint is '{text}': expected best, latest or the number of a step")
