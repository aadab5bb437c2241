"""Arrays in a response: a JSON header, then the bytes of the arrays.

    uint32       length of the header in bytes, little-endian
    header       JSON: {"arrays": {name: {"dtype", "shape", "offset"}}, ...facts}, padded by spaces
    arrays       little-endian, each at its offset from the first one, a multiple of 8

A JavaScript typed array must start at a multiple of its width: so the header is padded until the
arrays start at a multiple of 8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("float32", "float16", "uint8", "int32")
_ALIGNMENT = 8


def encode_arrays(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> bytes:
    """The body with `arrays` (any shapes, DTYPES) and `facts`, whose nan and infinities are null.

    >>> body = encode_arrays({"nats": np.zeros(2, np.float32)}, {"t": 1})
    >>> body[4 : 4 + int.from_bytes(body[:4], "little")].split(b'"t"')[0]
    b'{"arrays":{"nats":{"dtype":"float32","shape":[2],"offset":0}},'
    """
    entries, parts, offset = {}, [], 0
    for name, array in arrays.items():
        assert array.dtype.name in DTYPES, (name, array.dtype)
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        entries[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "offset": offset}
        padding = -len(data) % _ALIGNMENT
        parts.append(data + bytes(padding))
        offset += len(data) + padding
    content = finite_json({"arrays": entries, **facts})
    header = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    header += b" " * (-(4 + len(header)) % _ALIGNMENT)
    return b"".join([len(header).to_bytes(4, "little"), header, *parts])


def finite_json(value: Any) -> Any:
    """`value` with lists for arrays and None for numbers that are not finite."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_pixels(values: NDArray[Any], axes: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """values >= 0 (any shape) as uint8, and the value of 255 in float32 for each of their pictures.

    `axes` are those of one picture, whose largest value becomes 255.
    """
    scale = values.max(axis=axes, keepdims=True)
    pixels = np.rint(values * (255 / np.where(scale > 0, scale, 1))).astype(np.uint8)
    return pixels, np.squeeze(scale, axes).astype(np.float32)
