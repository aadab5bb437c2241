"""Sending an answer: at once, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glasslm.serve.answer import Answer
from glasslm.serve.answers import (
    DONE,
    PING,
    AsciiJSONResponse,
    Head,
    Shape,
    compact_json,
    server_sent_event,
)
from glasslm.serve.api_error import SHUTTING_DOWN, ApiError
from glasslm.serve.choice_text import Delta
from glasslm.serve.request_body import wait_for_disconnect
from glasslm.serve.service import Service

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on at once
]


@asynccontextmanager
async def watch_client(request: Request, service: Service, answer: Answer) -> AsyncIterator[None]:
    """While in the block, give the answer up when the client leaves; close it at the end."""
    watcher = asyncio.create_task(wait_for_disconnect(request))
    watcher.add_done_callback(lambda _: answer.leave())
    try:
        yield
    finally:
        if answer.error is None and not answer.is_complete:
            answer.leave()
        watcher.cancel()
        service.close(answer)
        request.scope["facts"] |= {
            "model": answer.loaded.name,
            "prompt": answer.prompt_tokens,
            "generated": answer.n_generated,
        }
        if answer.has_left:
            request.scope["facts"]["client"] = "left"


async def send_whole(
    request: Request, service: Service, answer: Answer, shape: Shape, head: Head
) -> Response:
    """The answer in one piece. Raises ClientDisconnect where the client leaves before its end."""
    totals = [Delta() for _ in answer.texts]
    async with watch_client(request, service, answer):
        while not answer.is_complete:
            deltas = await answer.next_deltas()
            if answer.has_left:
                raise ClientDisconnect
            for index, delta in deltas.items():
                totals[index].extend(delta)
    choices = [
        shape.whole_choice(index, total.text, total.tokens, total.finish or "stop")
        for index, total in enumerate(totals)
    ]
    request.scope["facts"]["finish"] = ",".join(sorted({str(t.finish) for t in totals}))
    content = head.content(shape.object_name) | {
        "choices": choices,
        "usage": answer.usage.content,
    }
    return AsciiJSONResponse(content, headers=request.scope["warning"])


class EventStream(Response):
    """The answer as server-sent events. Its header is sent with the first event or ping."""

    def __init__(
        self,
        request: Request,
        service: Service,
        answer: Answer,
        shape: Shape,
        head: Head,
        include_usage: bool,
    ) -> None:
        self._request, self._service, self._answer = request, service, answer
        self._shape, self._include_usage = shape, include_usage
        # All chunks begin with the same fields.
        self._start = compact_json(head.content(shape.chunk_name))[:-1]
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        pinger = asyncio.create_task(answer.wake_every(self._service.limits.ping_s))
        async with watch_client(self._request, self._service, answer):
            try:
                while not (answer.is_complete or answer.has_left):
                    deltas = await answer.next_deltas()
                    events = self._events(deltas) if deltas else PING
                    if events and not answer.has_left:
                        await self._send(send, events)
                if answer.is_complete:
                    await self._send(send, self._last_events(), more=False)
            except ApiError as error:
                if not self._is_started:
                    raise
                scope["facts"]["failed"] = error.code or error.status
                await self._send(send, self._error_events(error), more=False)
            finally:
                pinger.cancel()

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        if not self._is_started:
            self._is_started = True
            headers = [*STREAM_HEADERS]
            for name, value in self._request.scope["warning"].items():
                headers.append((name.lower().encode(), value.encode()))
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            await send(start)
            body = self._opening() + body
        await send({"type": "http.response.body", "body": body, "more_body": more})

    def _opening(self) -> bytes:
        indices = range(len(self._answer.texts))
        return b"".join(
            self._chunk([choice]) for index in indices for choice in self._shape.first_chunks(index)
        )

    def _events(self, deltas: dict[int, Delta]) -> bytes:
        return b"".join(
            self._chunk([choice])
            for index, delta in deltas.items()
            for choice in self._shape.chunks(index, delta)
        )

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        rest = {"choices": choices, "usage": usage} if self._include_usage else {"choices": choices}
        return f"data: {self._start},{compact_json(rest)[1:]}\n\n".encode()

    def _last_events(self) -> bytes:
        return self._usage_event() + DONE

    def _usage_event(self) -> bytes:
        usage = self._answer.usage.content
        return self._chunk([], usage=usage) if self._include_usage else b""

    def _error_events(self, error: ApiError) -> bytes:
        """The end of a stream that has begun.

        Texts that the end of the server cuts are as good as texts cut by max_tokens, so each gets
        its finish_reason before the error. A text whose generation failed gets none.
        """
        events = b""
        if error.code == SHUTTING_DOWN:
            cut = dict.fromkeys(sorted(self._answer.unfinished), Delta(finish="length"))
            events = self._events(cut) + self._usage_event()
        return events + server_sent_event(error.content) + DONE
