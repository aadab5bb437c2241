"""Who may use the server: the API key, and which hosts and origins a browser may send.

A page in a browser can reach a server on loopback. Its requests carry an Origin, or, after DNS
rebinding, the Host of the page. Other programs send neither an Origin nor a wrong Host.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from glasslm.serve.addresses import host_name, is_loopback
from glasslm.serve.api_error import ApiError, error_response

OPEN_PATHS = ("/", "/health")  # the page, which asks for the key, and the path for balancers
OPEN_PREFIX = "/page/"  # the static files of the page


class AccessControl:
    """Refuses requests without the key, of foreign pages, and to foreign host names.

    `api_key` None: no key is needed. `loopback`: the server listens on this machine alone, so the
    Host of a request is a name of this machine. `allow_origins` may hold "*".
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, loopback: bool, allow_origins: Sequence[str]
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._loopback, self._allow_origins = loopback, frozenset(allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            self._check_origin(headers)
            if scope["path"] not in OPEN_PATHS and not scope["path"].startswith(OPEN_PREFIX):
                self._check_key(headers)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host")  # missing in HTTP/1.0, which no browser sends
        if self._key is not None or not self._loopback or host is None:
            return
        if not is_loopback(host_name(host)):
            raise ApiError(
                403,
                "the Host of the request is no name of this machine: expected localhost or "
                "127.0.0.1. A proxy sets it (docs/howto/serve.md)",
                code="foreign_host",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or not self._allow_origins.isdisjoint((origin, "*")):
            return
        if origin.partition("://")[2] != headers.get("host"):
            raise ApiError(
                403,
                "a page of another origin sent this request: start the server with --allow-origin "
                "to allow it",
                code="foreign_origin",
            )

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_equal = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() != "bearer" or not is_equal:
            raise ApiError(
                401,
                "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )
