"""A thread that computes for the page, so that the texts of the API never wait for it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from glasslm.serve.request_body import wait_for_disconnect

Result = TypeVar("Result")


Check = Callable[[], None]  # raises JobDropped once nobody waits for the result


class JobDropped(Exception):
    """The client of a job has left."""


class Worker:
    """Computes jobs one after another.

    A job whose client has left is dropped before it starts, and a long one where it calls `check`.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[Check], Any], asyncio.Future[Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def compute(self, request: Request, job: Callable[[Check], Result]) -> Result:
        """The result of `job`, or its exception; ClientDisconnect where the client has left.

        The body of the request must have been read.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="microscope", daemon=True)
            self._thread.start()
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        leaving = asyncio.create_task(wait_for_disconnect(request))
        self._jobs.put((job, future))
        either: list[asyncio.Future[Any]] = [future, leaving]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise ClientDisconnect
            return future.result()
        finally:
            leaving.cancel()
            future.cancel()

    def stop(self) -> None:
        """End the thread after the job under way."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, future = entry
            if future.cancelled():
                continue

            def check(future: asyncio.Future[Any] = future) -> None:
                if future.cancelled():
                    raise JobDropped

            try:
                result, error = job(check), None
            except Exception as exception:  # it belongs to the request
                result, error = None, exception
            _deliver(future, result, error)


def _deliver(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    def settle() -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    loop = future.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
