"""Errors of the API: a status, and OpenAI's error object."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from glasslm.text import escape_control_chars

MAX_MESSAGE_CHARS = 1000
MALFORMED = "malformed_request"  # the code of requests that are no HTTP
SHUTTING_DOWN = "shutting_down"  # the code of requests that the end of the server ends

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that is refused or failed, with its HTTP status.

    `param` names the field of the request that is wrong, `code` is a word for programs.
    `retry_after_s` is the number of seconds after which a refused request may be sent again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s = retry_after_s

    @property
    def content(self) -> dict[str, Any]:
        """The JSON of the error: {"error": {message, type, param, code}}."""
        message = escape_control_chars(str(self))
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[: MAX_MESSAGE_CHARS - 3]}..."
        return {
            "error": {
                "message": message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def body(self) -> bytes:
        """`content` in ASCII."""
        return json.dumps(self.content).encode()

    @property
    def headers(self) -> dict[str, str]:
        """The header fields of the response besides those of its content."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413) or self.code == MALFORMED:  # the body is not read
            headers["Connection"] = "close"
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return headers


def error_response(error: ApiError) -> Response:
    """The response that an error is."""
    headers = {"Content-Type": "application/json"} | error.headers
    return Response(error.body, error.status, headers=headers)


def wrong_value(param: str, value: object, expected: str) -> ApiError:
    """The error 400 of a field with a wrong value."""
    return ApiError(
        400,
        f"{param} is {describe_value(value)}: expected {expected}",
        param=param,
        code="invalid_value",
    )


def describe_value(value: object) -> str:
    """A JSON value in at most about 60 characters."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "an integer of more than 30 digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
