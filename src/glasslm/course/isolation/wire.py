"""Values between a learner's process and the one that judges: a JSON header and raw bytes.

Nothing is unpickled: each side reads only numbers, text, and arrays whose size it has checked.
Objects and functions stay in the learner's process and travel as numbers of handles.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np

MAX_FRAME_BYTES = 256 << 20
MAX_DEPTH = 20  # of lists in lists
NUMERIC_KINDS = "biufc"
_HEADER = struct.Struct(">II")  # bytes of JSON, bytes of arrays

PutHandle = Callable[[Any], dict[str, Any]]  # an object of this process -> its description
GetHandle = Callable[[dict[str, Any]], Any]  # a description -> the object, or a stand-in for it


class WireError(Exception):
    """What should be sent is too much, or what was received is no message."""


class ClosedError(WireError):
    """The other side has closed the connection."""


def write_message(stream: BinaryIO, message: dict[str, Any], arrays: list[bytes]) -> None:
    """Send a message and the bytes of its arrays."""
    write_bytes(stream, pack_message(message, arrays))


def write_bytes(stream: BinaryIO, data: bytes) -> None:
    """Send a message that is packed already."""
    stream.write(data)
    stream.flush()


def pack_message(message: dict[str, Any], arrays: list[bytes]) -> bytes:
    """A message and its arrays as bytes. Raises WireError where they are too many."""
    text = json.dumps(message | {"sizes": [len(data) for data in arrays]}).encode()
    body = b"".join(arrays)
    if len(text) + len(body) > MAX_FRAME_BYTES:
        raise WireError(f"the values have more than {MAX_FRAME_BYTES >> 20} MiB")
    return _HEADER.pack(len(text), len(body)) + text + body


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    """Receive a message and the bytes of its arrays. Raises ClosedError at the stream's end."""
    n_text, n_body = _HEADER.unpack(_read_exactly(stream, _HEADER.size))
    if n_text + n_body > MAX_FRAME_BYTES:
        raise WireError(f"the values have more than {MAX_FRAME_BYTES >> 20} MiB")
    text, body = _read_exactly(stream, n_text), _read_exactly(stream, n_body)
    try:
        message = json.loads(text)
        ends = np.cumsum([0, *message["sizes"]]).tolist()
        if min(message["sizes"], default=0) < 0 or ends[-1] != n_body:
            raise ValueError("the sizes of the arrays do not add up")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WireError(f"not a message: {error}") from None
    return message, [body[start:end] for start, end in pairwise(ends)]


def encode(value: Any, arrays: list[bytes], put: PutHandle, depth: int = 0) -> dict[str, Any]:
    """`value` as JSON types; the bytes of its arrays are appended to `arrays`.

    `put` describes what is neither a number, text, bytes nor an array or collection of these.
    Raises WireError where lists lie too deep in each other.
    """
    if depth > MAX_DEPTH:
        raise WireError(f"lists lie more than {MAX_DEPTH} deep in each other")
    if value is None or type(value) in (bool, int, float, str):
        return {"plain": value}
    if isinstance(value, np.generic) and value.dtype.kind in NUMERIC_KINDS:
        arrays.append(value.tobytes())
        return {"scalar": value.dtype.str}
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMERIC_KINDS:
        # A subclass may redefine its methods; the base class has the true bytes.
        data = np.ndarray.view(value, np.ndarray)
        arrays.append(np.ascontiguousarray(data).tobytes())
        return {"array": data.dtype.str, "shape": list(data.shape)}
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        items = [encode(item, arrays, put, depth + 1) for item in value.ravel().tolist()]
        return {"objects": items, "shape": list(value.shape)}
    if type(value) is bytes:
        arrays.append(value)
        return {"bytes": len(value)}
    if type(value) in (list, tuple, set, frozenset):
        return {type(value).__name__: [encode(item, arrays, put, depth + 1) for item in value]}
    if type(value) is dict:
        pairs = [item for pair in value.items() for item in pair]
        return {"dict": [encode(item, arrays, put, depth + 1) for item in pairs]}
    return put(value)


def decode(code: dict[str, Any], arrays: list[bytes], get: GetHandle) -> Any:
    """The value of `encode`; takes the bytes of its arrays from the front of `arrays`.

    Raises WireError where the description and the bytes do not fit.
    """
    try:
        return _decode(code, arrays, get, 0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise WireError(f"not a value: {error}") from None


def _decode(code: dict[str, Any], arrays: list[bytes], get: GetHandle, depth: int) -> Any:
    if depth > MAX_DEPTH + 1:
        raise ValueError("too deep")
    (kind, content), *others = code.items()
    if kind == "plain":
        return content
    if kind == "scalar":
        return _numbers(content, [], arrays)[()]
    if kind == "array":
        return _numbers(content, others[0][1], arrays)
    if kind == "objects":
        cells = np.empty(len(content), dtype=object)
        for index, item in enumerate(content):
            cells[index] = _decode(item, arrays, get, depth + 1)
        return cells.reshape(others[0][1])
    if kind == "bytes":
        return arrays.pop(0)
    if kind in ("list", "tuple", "set", "frozenset", "dict"):
        items = [_decode(item, arrays, get, depth + 1) for item in content]
        if kind == "dict":
            return dict(zip(items[::2], items[1::2], strict=True))
        make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return make(items)
    return get(code)


def _numbers(name: str, shape: list[int], arrays: list[bytes]) -> Any:
    """A writable array of the next bytes."""
    dtype = np.dtype(name)
    if dtype.kind not in NUMERIC_KINDS:
        raise ValueError(f"{name} is no type of numbers")
    return np.frombuffer(arrays.pop(0), dtype).reshape(shape).copy()


def is_mutable(value: Any) -> bool:
    """Whether a function can change this argument for its caller."""
    return isinstance(value, (np.ndarray, list, dict, set))


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    pieces = []
    while count:
        piece = stream.read(min(count, 1 << 20))
        if not piece:
            raise ClosedError("the connection was closed")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
