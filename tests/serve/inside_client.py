"""A small trained run, the application in this process, and the page's own decoding of arrays."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from glasslm.config.schema import DeviceConfig, EngineName
from glasslm.serve.app import build_app
from glasslm.serve.inside.routes import Inside, inside_routes
from glasslm.serve.limits import Limits
from glasslm.serve.served_model import name_sources
from glasslm.serve.service import Service


class View:
    """A decoded answer: arrays by name, and the facts of its header."""

    def __init__(self, body: bytes) -> None:
        size = int.from_bytes(body[:4], "little")
        header = json.loads(body[4 : 4 + size])
        start = 4 + size
        assert start % 8 == 0
        self.arrays = {}
        for name, entry in header.pop("arrays").items():
            count = int(np.prod(entry["shape"]))
            first = start + entry["offset"]
            assert first % 8 == 0
            array = np.frombuffer(body, entry["dtype"], count, first)
            self.arrays[name] = array.reshape(entry["shape"])
        self.facts = header

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]


class InsideClient:
    """The application over some runs, called from a test that is not asynchronous."""

    def __init__(self, service: Service, http: httpx.AsyncClient, loop: Any) -> None:
        self._service, self._http, self._loop = service, http, loop

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        call = self._http.request(method, path, **options)
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(60)

    def get(self, path: str, **params: Any) -> httpx.Response:
        return self.request("GET", path, params=params or None)

    def runs(self) -> list[dict[str, Any]]:
        return self.get("/inside/runs").json()["runs"]

    def checkpoint(self, run: int = 0, index: int = -1) -> str:
        return self.runs()[run]["checkpoints"][index]["hash"]

    def post_text(self, text: str, run: str | None = None) -> dict[str, Any]:
        response = self.request("POST", "/inside/texts", json={"run": run, "text": text})
        assert response.status_code == 200, response.text
        return response.json()

    def view(self, view: str, checkpoint: str, text: str, **params: Any) -> View:
        response = self.get(f"/inside/{view}/{checkpoint}/{text}", **params)
        assert response.status_code == 200, response.text
        return View(response.content)


@contextmanager
def looking_at(
    *runs: Path, engine: EngineName = "numpy", api_key: str | None = None
) -> Iterator[InsideClient]:
    """The routes of the microscope over `runs`, in a loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Service, Inside, httpx.AsyncClient]:
        device = DeviceConfig(engine=engine, threads=1)
        service = Service(name_sources([str(run) for run in runs], "latest", device), Limits())
        await service.load()
        inside = Inside(service)
        app = build_app(
            service, inside_routes(inside), api_key=api_key, loopback=True, allow_origins=()
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        return service, inside, httpx.AsyncClient(transport=transport, base_url="http://localhost")

    service, inside, http = asyncio.run_coroutine_threadsafe(start(), loop).result(60)

    async def stop() -> None:
        inside.stop()
        await http.aclose()
        await service.close_thread()

    try:
        yield InsideClient(service, http, loop)
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
