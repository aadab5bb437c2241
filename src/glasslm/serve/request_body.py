"""Reading the JSON of a request: bounded size, time and depth, before anything is computed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from glasslm.serve.api_error import ApiError
from glasslm.serve.limits import Limits

_DRAIN_S = 1.0  # for the rest of a body that is too large, so that its client reads the answer
INLINE_BYTES = 64 << 10  # parsed in the event loop; larger bodies in a thread

Parsed = TypeVar("Parsed")


async def read_request(
    request: Request, limits: Limits, parse: Callable[[object, Limits], Parsed]
) -> Parsed:
    """The body, as `parse` reads its JSON.

    Raises ApiError for a body that is wrong, ClientDisconnect where the client leaves before its
    end.
    """
    body = await _read_body(request, limits)

    def read() -> Parsed:
        return parse(parse_json(body, limits.json_depth), limits)

    return read() if len(body) <= INLINE_BYTES else await asyncio.to_thread(read)


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body. One that is too large is read on for a moment before it is refused.

    A connection that is closed with unread bytes is reset, and its client may lose the answer.
    """
    declared = request.headers.get("content-length", "")
    is_large = declared.isdigit() and int(declared) > limits.body_bytes
    more = not (is_large and request.headers.get("expect", "").lower() == "100-continue")
    body = bytearray()
    try:
        async with asyncio.timeout(_DRAIN_S if is_large else limits.body_s) as deadline:
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                more = message.get("more_body", False)
                if is_large:
                    continue
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    is_large = True
                    deadline.reschedule(asyncio.get_running_loop().time() + _DRAIN_S)
    except TimeoutError:
        if not is_large:
            raise ApiError(
                408, f"the body did not come within {limits.body_s:g} seconds", code="timeout"
            ) from None
    if is_large:
        raise ApiError(
            413,
            f"the body is too large: expected at most {limits.body_bytes:,} bytes",
            code="too_large",
        )
    return bytes(body)


def parse_json(body: bytes, max_depth: int) -> Any:
    """Strict JSON in UTF-8 of at most `max_depth` levels. Raises ApiError for anything else."""
    try:
        content = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 (byte {error.start}): expected JSON in UTF-8",
            code="invalid_json",
        ) from None  # fmt: skip
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError as error:  # also of an integer with thousands of digits
        raise ApiError(
            400, f"the body is not JSON ({error}): expected an object", code="invalid_json"
        ) from None
    level = [content]
    for _ in range(max_depth):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return content
    raise _too_deep(max_depth)


def _too_deep(max_depth: int) -> ApiError:
    return ApiError(
        400, f"the JSON is nested too deeply: expected at most {max_depth} levels",
        code="invalid_json",
    )  # fmt: skip


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members. Of two with the same name, programs take the first or last."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{json.dumps(name[:100])} is given twice")
        content[name] = value
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
