"""The application: its routes, the form of its errors, and a line of the log for each request."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glasslm.serve.access import AccessControl
from glasslm.serve.addresses import resolve_absolute_target
from glasslm.serve.api_error import MALFORMED, ApiError, error_response
from glasslm.serve.endpoints import Endpoints
from glasslm.serve.limits import large_head_error
from glasslm.serve.page_files import page_routes
from glasslm.serve.service import Service
from glasslm.text import to_one_line

CLIENT_LEFT = 499  # nginx's status of a request whose client left; only in the log and /metrics


def api_routes(service: Service) -> list[BaseRoute]:
    """The routes of the API, and of the page."""
    api = Endpoints(service)
    return [
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{name:path}/reload", api.reload, methods=["POST"]),
        Route("/v1/models/{name:path}", api.model, methods=["GET"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/health", api.health, methods=["GET"]),
        Route("/metrics", api.metrics, methods=["GET"]),
        *page_routes(),
    ]


def build_app(
    service: Service,
    routes: Sequence[BaseRoute],
    *,
    api_key: str | None,
    loopback: bool,
    allow_origins: Sequence[str],
) -> ASGIApp:
    """The application that serves `routes`, with access control and errors in OpenAI's form."""
    middleware = [
        Middleware(AccessControl, api_key=api_key, loopback=loopback, allow_origins=allow_origins)
    ]
    if allow_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=allow_origins,
            allow_methods=["GET", "POST"],
            # OpenAI's clients send headers of their own. The middleware answers with the names
            # that were asked for, Authorization included, which a literal * would not admit.
            allow_headers=["*"],
            expose_headers=["Warning", "Retry-After"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=list(routes),
        middleware=middleware,
        exception_handlers={
            HTTPException: _http_error,
            ApiError: _api_error,
            Exception: _internal_error,
        },
    )
    app.router.redirect_slashes = False  # a path that is not one of these is a 404 with its reason
    return RequestBoundary(app, service)


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    messages = {
        404: "there is no such path: see docs/howto/serve.md for those of this server",
        405: f"this path does not take {request.method}",
    }
    message = messages.get(error.status_code, error.detail)
    code = "not_found" if error.status_code == 404 else None
    response = error_response(ApiError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _internal_error(request: Request, error: Exception) -> Response:
    """The answer to a request that met a bug; RequestBoundary logs the exception."""
    return error_response(ApiError(500, "an internal error: see the log of the server"))


class RequestBoundary:
    """The outermost layer: no exception leaves it, and each request has a line of the log.

    An exception is a bug: its request gets the status 500, or a stream that ends without [DONE].
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["facts"], scope["warning"] = {}, {}
        started_s, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        app: ASGIApp = self._app
        if (error := self._find_head_error(scope)) is not None:
            app = error_response(error)
        resolve_absolute_target(scope)
        try:
            await app(scope, receive, send_and_note)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception as bug:
            place = traceback.extract_tb(bug.__traceback__)[-1]
            # The message of the exception may hold the text of the request.
            scope["facts"]["bug"] = f"{type(bug).__name__} in {place.filename}:{place.lineno}"
        self._note(scope, status or CLIENT_LEFT, time.monotonic() - started_s)

    def _find_head_error(self, scope: Scope) -> ApiError | None:
        """Why a header is refused. The connection refuses large ones that are not complete."""
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._service.limits.head_bytes:
            return large_head_error(self._service.limits)
        if {b"content-length", b"transfer-encoding"} <= dict(scope["headers"]).keys():
            # A proxy may read another end of the body than this server does.
            return ApiError(
                400,
                "the header has Content-Length and Transfer-Encoding: expected one of them",
                code=MALFORMED,
            )
        return None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = route.path if route is not None else "other"
        metrics = self._service.metrics
        metrics.requests.labels(path, str(status)).inc()
        metrics.seconds.labels(path).observe(seconds)
        if status in (401, 403, 413, 429, 503):
            metrics.refused.labels(str(status)).inc()
        facts = "".join(f" {name}={value}" for name, value in scope["facts"].items())
        client = (scope["client"] or ("-",))[0]
        where = to_one_line(scope["path"], 80)
        self._service.log.add(f"{client} {scope['method']} {where} {status} {seconds:.3f}s{facts}")
