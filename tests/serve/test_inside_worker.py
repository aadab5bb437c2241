"""The microscope's thread: one job at a time, and none for a client that has left."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

pytest.importorskip("starlette")

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from glasslm.serve.inside.several import answer_several
from glasslm.serve.inside.worker import Check, JobDropped, Worker
from glasslm.serve.limits import Limits


def make_request(leaves: asyncio.Event, body: bytes = b"") -> Request:
    """A request whose client leaves when the event is set."""
    received = []

    async def receive() -> dict[str, Any]:
        if not received:
            received.append(True)
            return {"type": "http.request", "body": body, "more_body": False}
        await leaves.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "method": "GET", "headers": []}, receive)


def test_jobs_are_computed_one_after_another_with_their_results_and_errors() -> None:
    threads = set()

    def fail(check: Check) -> None:
        raise ValueError("the job's own error")

    def note(check: Check) -> int:
        threads.add(threading.get_ident())
        return 7

    async def run() -> None:
        worker, stays = Worker(), asyncio.Event()
        results = await asyncio.gather(
            *(worker.compute(make_request(stays), note) for _ in range(5))
        )
        assert results == [7] * 5
        with pytest.raises(ValueError, match="own error"):
            await worker.compute(make_request(stays), fail)
        assert await worker.compute(make_request(stays), note) == 7  # it goes on
        worker.stop()

    asyncio.run(run())
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_a_job_whose_client_left_is_not_computed() -> None:
    started, computed = threading.Event(), list[str]()
    may_end = threading.Event()

    def long(check: Check) -> str:
        started.set()
        may_end.wait(10)
        computed.append("long")
        return "long"

    async def run() -> None:
        worker, stays, leaves = Worker(), asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(worker.compute(make_request(stays), long))
        await asyncio.to_thread(started.wait, 10)
        second = asyncio.create_task(
            worker.compute(make_request(leaves), lambda check: computed.append("second"))
        )
        third = asyncio.create_task(
            worker.compute(make_request(stays), lambda check: computed.append("third"))
        )
        await asyncio.sleep(0)
        leaves.set()
        with pytest.raises(ClientDisconnect):
            await second
        may_end.set()
        assert await first == "long"
        await third
        worker.stop()

    asyncio.run(run())
    assert computed == ["long", "third"]


def test_a_long_job_ends_where_it_checks() -> None:
    started, ended = threading.Event(), list[str]()

    def long(check: Check) -> None:
        started.set()
        while True:
            try:
                check()
            except JobDropped:
                ended.append("dropped")
                raise

    async def run() -> None:
        worker, stays, leaves = Worker(), asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(worker.compute(make_request(leaves), long))
        await asyncio.to_thread(started.wait, 10)
        leaves.set()
        with pytest.raises(ClientDisconnect):
            await task
        assert await worker.compute(make_request(stays), lambda check: 1) == 1
        worker.stop()

    asyncio.run(run())
    assert ended == ["dropped"]


def test_no_view_is_computed_for_a_client_that_left_after_the_one_before() -> None:
    computed, sent = list[str](), list[bytes]()

    async def view(request: Request) -> Response:
        computed.append(request.path_params["view"])
        return Response(b"abc")

    async def run() -> None:
        leaves = asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.append(message["body"])
                leaves.set()

        addresses = [f"/inside/{name}/c/t" for name in ("read", "lens", "why")]
        request = make_request(leaves, json.dumps({"addresses": addresses}).encode())
        response = await answer_several(request, Limits(), lambda name: view)
        with pytest.raises(ClientDisconnect):
            await response(request.scope, request.receive, send)

    asyncio.run(run())
    assert computed == ["read"]
    assert sent == [b"\x03\0\0\0abc"]
