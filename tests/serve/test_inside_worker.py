"""The microscope's thread: one job at a time, and none for a client that has left."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

pytest.importorskip("starlette")

from starlette.requests import ClientDisconnect, Request

from glasslm.serve.inside.worker import Check, JobDropped, Worker


def make_request(leaves: asyncio.Event) -> Request:
    """A request without a body, whose client leaves when the event is set."""
    received = []

    async def receive() -> dict[str, Any]:
        if not received:
            received.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
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
