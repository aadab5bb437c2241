"""Tables of positions for both engines and for exports: RoPE's cos and sin, sinusoids, slopes.

Letters: T positions, D width, H query heads, Q head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import LayerKind, ModelConfig, RopeScaling

Array = NDArray[Any]

# Positions in a new table of RoPE. Tables grow as texts do: that of a context of 131,072 tokens
# would take longer to compute than a short answer.
MIN_TABLE_POSITIONS = 1024


def rope_cos_sin(
    positions: NDArray[np.int64],
    heads: int,
    Q: int,
    dtype: DTypeLike,
    scaling: RopeScaling,
    factor: float,
    base: float = 10_000.0,
    band: Band | None = None,
) -> tuple[Array, Array]:
    """cos and sin, (..., heads, Q) each, of the angles position x base^(-2j / Q).

    positions (...); all heads have the same angles. arXiv:2104.09864, section 3.2.2. The second
    half of Q repeats the first; sin is negative in the first half, so that the rotation of x is
    x cos + swap(x) sin. `scaling` stretches the angles for texts `factor` times as long as those of
    training, with the settings `band`: see ROPE_SCALINGS.
    """
    frequencies, divisor, amplitude = ROPE_SCALINGS[scaling](base, factor, Q, band or Band())
    angles: Array = positions[..., None] * frequencies
    angles /= divisor
    cos = amplitude * np.tile(np.cos(angles), 2 * heads)
    sin = amplitude * np.tile(np.concatenate([-np.sin(angles), np.sin(angles)], -1), heads)
    shape = (*positions.shape, heads, Q)
    return cos.reshape(shape).astype(dtype), sin.reshape(shape).astype(dtype)


def layer_cos_sin(
    c: ModelConfig,
    kind: LayerKind,
    positions: NDArray[np.int64],
    heads: int,
    dtype: DTypeLike,
) -> tuple[Array, Array]:
    """cos and sin, (..., heads, R) each, of the layers of one kind; R dimensions are rotated.

    Window layers with a base of their own are not stretched.
    """
    R = c.rotary_size
    if kind == "w" and c.window_rope_base:
        return rope_cos_sin(positions, heads, R, dtype, "none", 1.0, c.window_rope_base)
    original = c.rope_original_context or c.block_size / c.rope_factor
    band = Band(
        original, c.block_size, c.rope_low_rotations, c.high_rotations, c.rope_attention_factor
    )
    return rope_cos_sin(
        positions, heads, R, dtype, c.rope_scaling, c.rope_factor, c.rope_base, band
    )


class Band(NamedTuple):
    """Settings of the scalings that treat frequencies by their rotations, or contexts by length."""

    original: float = 1.0  # tokens of the context in training
    context: float = 1.0  # tokens of the context now
    low: float = 1.0  # rotations in the original context, below which a frequency is stretched
    high: float = 4.0  # ... and above which it is kept
    attention_factor: float = 0.0  # YaRN's amplitude; 0: 1 + 0.1 ln factor


class Angles(NamedTuple):
    """The angles of a position: position x frequencies (Q / 2,) / divisor."""

    frequencies: Array
    divisor: float = 1.0
    amplitude: float = 1.0  # of cos and sin


def _frequencies(base: float, Q: int) -> Array:
    """(Q / 2,): the angles of position 1."""
    frequencies: Array = base ** (-np.arange(0, Q, 2) / Q)
    return frequencies


def _scale_nothing(base: float, factor: float, Q: int, band: Band) -> Angles:
    return Angles(_frequencies(base, Q))


def _scale_positions(base: float, factor: float, Q: int, band: Band) -> Angles:
    """Divide the positions by the factor. arXiv:2306.15595."""
    return Angles(_frequencies(base, Q), divisor=factor)


def _scale_base(base: float, factor: float, Q: int, band: Band) -> Angles:
    """Multiply the base by factor^(Q / (Q - 2)): "NTK-aware", arXiv:2309.00071, section 3.1.

    The lowest frequency becomes `factor` times slower and the highest stays as it is. With Q = 2
    there is one frequency only, the highest.
    """
    return Angles(_frequencies(base * factor ** (Q / (Q - 2)) if Q > 2 else base, Q))


def _scale_base_by_context(base: float, factor: float, Q: int, band: Band) -> Angles:
    """ "Dynamic NTK": as _scale_base, by how far the context exceeds the original one.

    The factor is factor x context / original - (factor - 1), at least 1: within the original
    context nothing changes. arXiv:2309.00071, section 3.3. The context is that of the model and not
    the length of a text, so that cached keys stay valid.
    """
    growth = max(1.0, factor * band.context / band.original - (factor - 1))
    return _scale_base(base, growth, Q, band)


def _scale_by_parts(base: float, factor: float, Q: int, band: Band) -> Angles:
    """YaRN: stretch low frequencies, keep high ones, and a ramp over the dimensions between.

    The bounds are whole dimensions, as in the published models. arXiv:2309.00071, section 3.2;
    section 3.4 has the amplitude.
    """
    frequencies = _frequencies(base, Q)

    def dimension(rotations: float) -> float:
        return Q * math.log(band.original / (2 * math.pi * rotations)) / (2 * math.log(base))

    first, last = max(0, math.floor(dimension(band.high))), math.ceil(dimension(band.low))
    last = min(last, Q - 1)
    width = last - first or 0.001
    stretched = np.clip((np.arange(Q // 2) - first) / width, 0, 1)
    frequencies *= stretched / factor + (1 - stretched)
    return Angles(frequencies, amplitude=band.attention_factor or 1 + 0.1 * math.log(factor))


def _scale_by_rotations(base: float, factor: float, Q: int, band: Band) -> Angles:
    """Llama 3: as YaRN, with a ramp over the rotations in the original context.

    As in the code of Llama 3.1 (arXiv:2407.21783).
    """
    frequencies = _frequencies(base, Q)
    rotations = band.original * frequencies / (2 * math.pi)
    unscaled = np.clip((rotations - band.low) / (band.high - band.low), 0, 1)
    frequencies *= unscaled + (1 - unscaled) / factor
    return Angles(frequencies)


Scaling: TypeAlias = Callable[[float, float, int, Band], Angles]  # base, factor, Q, band
ROPE_SCALINGS: dict[RopeScaling, Scaling] = {
    "none": _scale_nothing,
    "linear": _scale_positions,
    "ntk": _scale_base,
    "dynamic": _scale_base_by_context,
    "yarn": _scale_by_parts,
    "llama3": _scale_by_rotations,
}


def sinusoids(T: int, D: int, rms: float, dtype: DTypeLike) -> Array:
    """(T, D): sines and cosines of arXiv:1706.03762, section 3.5, with root mean square `rms`.

    The paper scales the embeddings up to the sinusoids instead. Only their ratio matters.
    """
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(T, D)
    return (math.sqrt(2) * rms * table).astype(dtype)


def alibi_slopes(H: int, dtype: DTypeLike) -> Array:
    """(H,): the geometric sequence 2^(-8 h / H), h = 1..H. arXiv:2108.12409, section 3."""
    return (2.0 ** (-8 * np.arange(1, H + 1) / H)).astype(dtype)
