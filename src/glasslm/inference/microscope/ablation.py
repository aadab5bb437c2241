"""Parts of a model switched off: what losses and the next tokens become without them.

A part is named as in contributions.py: "2.0" is head 0 of layer 2, "2.attention" and
"2.feedforward" its sublayers, "2" the whole layer, "2.n17" neuron 17 of its feed-forward. A part
that is off writes zeros. Letters: P parts, C candidates, T positions, V vocabulary, F inner width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.inspection import Edit
from glasslm.errors import InputError
from glasslm.inference.microscope.contributions import (
    Weights,
    logit_directions,
    require_additive,
)
from glasslm.inference.microscope.recorded_pass import RecordedPass
from glasslm.inference.microscope.variants import (
    Variant,
    check_nothing,
    edit_of_row,
    variant_logits,
)
from glasslm.inference.sampling import log_probabilities
from glasslm.model.adapters import effective_matrix

ALL = np.s_[:]  # every position


def part_names(c: ModelConfig) -> list[str]:
    """The heads of each layer, and its sublayers."""
    names = []
    for layer in range(c.n_layers):
        names += [f"{layer}.{head}" for head in range(c.n_heads)]
        names += [f"{layer}.attention", f"{layer}.feedforward"]
    return names


def switch_off(part: str, c: ModelConfig) -> Variant:
    """The edits that switch a part off. Raises InputError for a part that the model lacks."""
    match = re.fullmatch(r"(\d{1,6})(?:\.(n?)(\d{1,6})|\.(attention|feedforward))?", part)
    layer = int(match[1]) if match else c.n_layers
    if match is None or layer >= c.n_layers:
        raise _no_part(part, c)
    block = f"blocks.{layer}"
    if match[3] is None:
        sublayers = [match[4]] if match[4] else ["attention", "feedforward"]
        return [Edit(f"{block}.{sublayer}", ALL, 0.0) for sublayer in sublayers]
    number = int(match[3])
    if not match[2]:
        if number >= c.n_heads:
            raise _no_part(part, c)
        return [Edit(f"{block}.attention.heads", (ALL, number), 0.0)]
    require_neurons(c)
    if number >= c.resolve().d_ff:
        raise _no_part(part, c)
    return [Edit(f"{block}.feedforward.activation", (ALL, number), 0.0)]


def require_neurons(c: ModelConfig) -> None:
    """Raise InputError for a mixture of experts, in which a neuron sees only some tokens."""
    if c.n_experts:
        raise InputError(
            "the neurons of a mixture of experts see only the tokens of their expert: switch a "
            "feed-forward off instead"
        )


def _no_part(part: str, c: ModelConfig) -> InputError:
    return InputError(
        f"there is no part '{part[:40]}': expected one such as 0.{c.n_heads - 1} (a head), "
        "0.attention, 0.feedforward, 0 (a layer) or 0.n5 (a neuron)"
    )


class Ablation(NamedTuple):
    """The next tokens after position t, with every part switched off in turn."""

    parts: list[str]  # P
    logprobs: NDArray[np.float64]  # (P, C) of the candidates, without the part
    before: NDArray[np.float64]  # (C,) with all parts


def ablate_each(
    recorded: RecordedPass,
    t: int,
    candidates: NDArray[np.int64],
    check: Callable[[], None] = check_nothing,
) -> Ablation:
    """The effect of each head and sublayer on the log-probabilities of `candidates` (C,).

    `check` is that of variant_logits.
    """
    parts = part_names(recorded.config)
    variants = [switch_off(part, recorded.config) for part in parts]
    logprobs = log_probabilities(variant_logits(recorded, variants, t, check))
    before = recorded.log_probabilities_at(t)[candidates]
    return Ablation(parts, logprobs[:, candidates], before)


def nats_without(
    recorded: RecordedPass, parts: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(T,), (T, V): surprise of each token, and log-probabilities, with `parts` off together.

    The first token has no surprise: nan.
    """
    edits = [edit for part in parts for edit in switch_off(part, recorded.config)]
    rows = [edit_of_row(0, edit) for edit in edits]
    logprobs = log_probabilities(recorded.inspect(["logits"], rows)["logits"][0])
    after = -np.take_along_axis(logprobs[:-1], recorded.ids[1:, None], -1)[:, 0]
    return np.concatenate([[np.nan], after]), logprobs


class Neurons(NamedTuple):
    """The neurons of a layer that push one token above another most, by their direct effect."""

    ids: NDArray[np.int64]  # (N,) strongest first
    activations: NDArray[np.float64]  # (N,) what the down matrix reads
    shares: NDArray[np.float64]  # (N,) in the difference of the two logits


def strongest_neurons(
    recorded: RecordedPass,
    weights: Weights,
    t: int,
    layer: int,
    pair: NDArray[np.int64],
    count: int = 16,
) -> Neurons:
    """The neurons of a layer with the largest share in logit(pair[0]) - logit(pair[1]) after t.

    Raises InputError for a mixture of experts, and where a model has no additive parts.
    """
    require_neurons(recorded.config)
    require_additive(recorded.model.config)
    name = f"blocks.{layer}.feedforward"
    directions, _ = logit_directions(recorded, weights, t, pair)
    read = (directions[0] - directions[1]) @ effective_matrix(
        weights, f"{name}.down", recorded.config
    )
    activations = recorded[f"{name}.activation"][t].astype(np.float64)
    shares = activations * read
    ids = np.argsort(-np.abs(shares), kind="stable")[:count]
    return Neurons(ids, activations[ids], shares[ids])
