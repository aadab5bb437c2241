"""uvicorn's HTTP/1.1 connection with time limits in both directions.

uvicorn has no time limit for a header that comes slowly or for a client that does not read, answers
a malformed request with plain text, and stops reading, so that it does not notice the end of a
client, when a second request comes before the answer to the first.
"""

from __future__ import annotations

import asyncio
import http
import sys
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from glasslm.serve.api_error import MALFORMED, ApiError
from glasslm.serve.limits import Limits, large_head_error

RETRY_S = 5


class Connection(H11Protocol):
    """One connection of a client."""

    def __init__(self, *arguments: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._early = b""  # the start of the next request, which came before the answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any byte that the system does not take counts
        if len(self.connections) > self._limits.connections:
            busy = ApiError(503, "too many connections: try again later", retry_after_s=RETRY_S)
            self._refuse(busy)
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_answering:
            self._early += data
            if len(self._early) > self._limits.head_bytes:
                self.transport.abort()
            return
        if self._head_timer is None and not self._is_receiving:
            self._start_head_timer()
        super().data_received(data)
        if self._is_receiving or self._is_answering:
            self._stop_head_timer()
        if self._is_answering:
            self.flow.resume_reading()  # to notice the end of the client

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._early and not self.transport.is_closing():
            data, self._early = self._early, b""
            self.data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request; called while h11's error is handled."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        if status == 431:
            self._refuse(large_head_error(self._limits))
        else:
            self._refuse(ApiError(status, msg, code=MALFORMED))

    def shutdown(self) -> None:
        """Called when the server stops: a request whose body is not complete is refused."""
        if self._is_receiving and not self.cycle.response_started:
            self._refuse(ApiError(503, "the server stops", retry_after_s=RETRY_S))
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def _is_receiving(self) -> bool:
        """Whether the header of a request has come, and its body not yet."""
        return bool(self.cycle and not self.cycle.response_complete and self.cycle.more_body)

    @property
    def _is_answering(self) -> bool:
        """Whether a request has come, and its answer is not complete."""
        return bool(self.cycle and not self.cycle.response_complete and not self.cycle.more_body)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_s, self._refuse_slow_head)

    def _refuse_slow_head(self) -> None:
        seconds = self._limits.head_s
        self._refuse(ApiError(408, f"the header did not come within {seconds:g} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error outside of the application, and close."""
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        if (
            self.cycle is not None
            and self.cycle.response_started
            and not self.cycle.response_complete
        ):
            self.transport.abort()
            return
        fields = {
            "Content-Type": "application/json",
            "Content-Length": str(len(error.body)),
            "Connection": "close",
            **error.headers,
        }
        head = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.transport.write(head.encode() + b"\r\n" + error.body)
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_timers(self) -> None:
        self._stop_head_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
