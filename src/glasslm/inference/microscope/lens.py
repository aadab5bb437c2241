"""The logit lens: what the model would answer if it stopped after each part of each block.

nostalgebraist, "interpreting GPT: the logit lens" (2020). The stream is read with the last norm and
the output matrix, so the last place gives the model's own output.
Letters: P places, T positions, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.inference.microscope.recorded_pass import RecordedPass, top_tokens
from glasslm.inference.sampling import log_probabilities

Array = NDArray[Any]


def lens_places(c: ModelConfig) -> list[str]:
    """The places of the stream: after the embedding, after each attention and after each block.

    With norms after the sublayers the stream between attention and feed-forward is no sum of
    recorded parts, so those places are left out.
    """
    places = ["embedding"]
    for i in range(c.n_layers):
        places += [*([f"blocks.{i}.attention"] if c.norm_position == "pre" else []), f"blocks.{i}"]
    return places


def stream_at(recorded: RecordedPass, place: str) -> Array:
    """(T, D): the residual stream at one of the `lens_places`."""
    if not place.endswith(".attention"):
        return recorded[place]
    layer = int(place.split(".")[1])
    before = recorded[f"blocks.{layer - 1}" if layer else "embedding"]
    return before + recorded[place]


class Lens(NamedTuple):
    """The likeliest token at each place and position, and the token that comes in the text."""

    places: list[str]  # P
    top_ids: NDArray[np.int64]  # (P, T)
    top_logprobs: NDArray[np.float64]  # (P, T)
    target_logprobs: NDArray[np.float64]  # (P, T) of the next token of the text; nan at the end


def read_lens(recorded: RecordedPass) -> Lens:
    """The lens at every place and position."""
    places = lens_places(recorded.config)
    top_ids, top_logprobs, target_logprobs = [], [], []
    targets = recorded.targets
    for place in places:
        logprobs = log_probabilities(recorded.model.engine.readout(stream_at(recorded, place)))
        top = logprobs.argmax(-1)
        top_ids.append(top)
        top_logprobs.append(np.take_along_axis(logprobs, top[:, None], -1)[:, 0])
        target = np.take_along_axis(logprobs, np.maximum(targets, 0)[:, None], -1)[:, 0]
        target_logprobs.append(np.where(targets >= 0, target, np.nan))
    return Lens(places, np.stack(top_ids), np.stack(top_logprobs), np.stack(target_logprobs))


class LensColumn(NamedTuple):
    """All places at one position."""

    places: list[str]  # P
    ids: NDArray[np.int64]  # (P, TOP) the likeliest tokens of each place
    logprobs: NDArray[np.float64]  # (P, TOP)
    asked_logprobs: NDArray[np.float64]  # (P, A) of the tokens that were asked for


def read_lens_at(recorded: RecordedPass, t: int, asked: list[int], count: int = 8) -> LensColumn:
    """The lens at position t; `asked` are further tokens (A) whose probabilities are wanted."""
    places = lens_places(recorded.config)
    streams = np.stack([stream_at(recorded, place)[t] for place in places])
    logprobs = log_probabilities(recorded.model.engine.readout(streams))
    ids = top_tokens(logprobs, count)
    return LensColumn(places, ids, np.take_along_axis(logprobs, ids, -1), logprobs[:, asked])
