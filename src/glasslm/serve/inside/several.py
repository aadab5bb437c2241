"""Several views in one response: a page that is saved holds hundreds, and a request costs more."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from glasslm.serve.api_error import ApiError, wrong_value
from glasslm.serve.fields import Fields
from glasslm.serve.limits import Limits
from glasslm.serve.request_body import read_request

MAX_ADDRESSES = 64
ADDRESS = re.compile(r"/inside/(?P<view>[^/?]+)/(?P<checkpoint>[^/?]+)/(?P<text>[^/?]+)(\?.*)?")
EXPECTED = f"a list of at most {MAX_ADDRESSES} addresses such as /inside/read/CHECKPOINT/TEXT"

Handler = Callable[[Request], Awaitable[Response]]


async def answer_several(
    request: Request, limits: Limits, find_handler: Callable[[str], Handler]
) -> Response:
    """The bodies of the views at `addresses`, in this order, each after its length as a uint32.

    The length of a view that is refused is 0. `find_handler` gives the handler of a view's name.
    """
    matches = await read_request(request, limits, parse_addresses)
    body = bytearray()
    for match in matches:
        query = (match[4] or "?")[1:].encode()
        scope = {**request.scope, "path_params": match.groupdict(), "query_string": query}
        try:
            answer = await find_handler(match["view"])(Request(scope, request.receive))
        except ApiError:
            body += bytes(4)
            continue
        body += len(answer.body).to_bytes(4, "little") + answer.body
    headers = {"Cache-Control": "no-store"}
    return Response(bytes(body), media_type="application/octet-stream", headers=headers)


def parse_addresses(content: object, limits: Limits) -> list[re.Match[str]]:
    """The addresses in a JSON body. Raises ApiError for a wrong one."""
    value: Any = Fields(content).get("addresses")
    if not isinstance(value, list) or len(value) > MAX_ADDRESSES:
        raise wrong_value("addresses", value, EXPECTED)
    matches = [ADDRESS.fullmatch(item) for item in value if isinstance(item, str)]
    found = [match for match in matches if match]
    if len(found) < len(value):
        raise wrong_value("addresses", value, EXPECTED)
    return found
