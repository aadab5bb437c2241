"""Activations of a second text put into the first: what the loss of a token becomes.

Meng et al., "Locating and Editing Factual Associations in GPT" (arXiv:2202.05262), where they trace
causes. Letters: T positions, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.inspection import Edit
from glasslm.inference.microscope.recorded_pass import RecordedPass
from glasslm.inference.microscope.variants import check_nothing, variant_logits
from glasslm.inference.sampling import log_probabilities


def patch_places(c: ModelConfig) -> list[str]:
    """The places of the stream that can be patched: the embedding, and after each block."""
    return ["embedding", *(f"blocks.{layer}" for layer in range(c.n_layers))]


class Patch(NamedTuple):
    """The next tokens after position t, with one position's stream from another text."""

    positions: NDArray[np.int64]  # (N,) the patched ones
    logprobs: NDArray[np.float64]  # (N, C) of the candidates, after each patch
    before: NDArray[np.float64]  # (C,) without a patch


def patch_stream(
    recorded: RecordedPass,
    other: RecordedPass,
    t: int,
    place: str,
    positions: range,
    candidates: NDArray[np.int64],
    check: Callable[[], None] = check_nothing,
) -> Patch:
    """The effect on `candidates` (C,) after t of the other text's stream at `place`.

    Each of `positions`, which end at t at the latest, is patched alone, by the same position of the
    other text, which the same model has read. `check` is that of variant_logits.
    """
    assert positions.stop <= min(t + 1, other.length)
    variants = [[Edit(place, p, other[place][p])] for p in positions]
    before = recorded.log_probabilities_at(t)[candidates]
    if not variants:
        return Patch(np.zeros(0, np.int64), np.zeros((0, len(candidates))), before)
    logprobs = log_probabilities(variant_logits(recorded, variants, t, check))
    return Patch(np.array(positions), logprobs[:, candidates], before)
