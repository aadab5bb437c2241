"""Several views in one response.

A saved page holds hundreds of answers, and each request has a cost of its own.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glasslm.serve.api_error import ApiError, wrong_value
from glasslm.serve.fields import Fields
from glasslm.serve.limits import Limits
from glasslm.serve.request_body import read_request

MAX_ADDRESSES = 16  # of one request
MAX_ADDRESS_CHARS = 4000
EXPECTED = (
    f"a list of at most {MAX_ADDRESSES} addresses such as /inside/read/CHECKPOINT/TEXT, each of at "
    f"most {MAX_ADDRESS_CHARS:,} characters"
)

# Printable ASCII, in the path without / and ?: anything else must be percent-encoded in a URL.
SEGMENT, QUERY = "[!-.0->@-~]+", "[!-~]*"
ADDRESS = re.compile(
    f"/inside/(?P<view>{SEGMENT})/(?P<checkpoint>{SEGMENT})/(?P<text>{SEGMENT})"
    rf"(\?(?P<query>{QUERY}))?"
)
HEADERS = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-store")]

Handler = Callable[[Request], Awaitable[Response]]


class Address(NamedTuple):
    """The address of a view: /inside/VIEW/CHECKPOINT/TEXT?QUERY."""

    view: str
    checkpoint: str
    text: str
    query: str


async def answer_several(
    request: Request, limits: Limits, find_handler: Callable[[str], Handler]
) -> Response:
    """The bodies of the views at `addresses`, in this order, each after its length as a uint32.

    The length of a view that is refused is 0. `find_handler` gives the handler of a view's name.
    """
    addresses = await read_request(request, limits, parse_addresses)
    return ViewStream(request, addresses, find_handler)


def parse_addresses(content: object, limits: Limits) -> list[Address]:
    """The addresses in a JSON body. Raises ApiError for a wrong one."""
    value: Any = Fields(content).get("addresses")
    if not isinstance(value, list) or len(value) > MAX_ADDRESSES:
        raise wrong_value("addresses", value, EXPECTED)
    addresses = []
    for item in value:
        is_short = isinstance(item, str) and len(item) <= MAX_ADDRESS_CHARS
        match = ADDRESS.fullmatch(item) if is_short else None
        if match is None:
            raise wrong_value("addresses", value, EXPECTED)
        addresses.append(Address(**match.groupdict(default="")))
    return addresses


class ViewStream(Response):
    """Computes a view once the client has taken the one before, so that only one is in memory."""

    def __init__(
        self,
        request: Request,
        addresses: Sequence[Address],
        find_handler: Callable[[str], Handler],
    ) -> None:
        self._request, self._addresses, self._find_handler = request, addresses, find_handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        for address in self._addresses:
            if await self._request.is_disconnected():
                raise ClientDisconnect
            body = await self._compute(address)
            part = len(body).to_bytes(4, "little") + body
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _compute(self, address: Address) -> bytes:
        """The body of a view; empty where it is refused."""
        names = {"view": address.view, "checkpoint": address.checkpoint, "text": address.text}
        query = address.query.encode()
        scope = {**self._request.scope, "path_params": names, "query_string": query}
        try:
            answer = await self._find_handler(address.view)(Request(scope, self._request.receive))
        except ApiError:
            return b""
        return bytes(answer.body)
