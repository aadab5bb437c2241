"""Binding, running and ending a server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn

from glasslm.errors import InputError, raise_if_exhausted
from glasslm.serve.addresses import format_host, is_loopback
from glasslm.serve.app import api_routes, build_app
from glasslm.serve.connection import Connection
from glasslm.serve.inside.routes import Inside, inside_routes
from glasslm.serve.limits import Limits
from glasslm.serve.served_model import ModelSource
from glasslm.serve.service import Service
from glasslm.text import notify
from glasslm.training.interruption import SignalEvent, catch_signals, pass_on_signal

SEND_BUFFER_BYTES = 16 << 10  # of each connection, in the system
BACKLOG = 2048  # connections that the system holds before they are accepted


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens, and who may use it. `api_key` None: everybody."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    follow: bool = False
    open_browser: bool = False
    limits: Limits = field(default_factory=Limits)


def serve(sources: Sequence[ModelSource], settings: ServerSettings) -> None:
    """Serve models until a signal comes, which the program then gets.

    Prints `serving: http://HOST:PORT` once requests are answered. Raises InputError where the
    address cannot be used, and the errors of loading a model.
    """
    raise_file_limit(settings.limits.connections)
    listener = bind(settings.host, settings.port)
    # No asyncio.run: at its end it would wait for a tokenizer that does not return.
    with (
        catch_signals() as interrupt,
        contextlib.closing(listener),
        contextlib.closing(asyncio.new_event_loop()) as loop,
    ):
        loop.run_until_complete(_serve(sources, settings, listener, interrupt))
    pass_on_signal(interrupt.received)


async def _serve(
    sources: Sequence[ModelSource],
    settings: ServerSettings,
    listener: socket.socket,
    interrupt: SignalEvent,
) -> None:
    service = Service(sources, settings.limits)
    server = _Server(make_config(service, settings), service, interrupt)
    address = f"http://{format_host(settings.host)}:{listener.getsockname()[1]}"
    running = asyncio.create_task(server.serve([listener]))
    notify(f"loading {', '.join(service.sources)} ({address}/health answers 503 until then)")
    loading = asyncio.create_task(service.load())
    following = None
    try:
        await asyncio.wait([running, loading], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            print(f"serving: {address}", flush=True)
            if settings.open_browser:
                _open_browser(address)
            following = asyncio.create_task(service.follow()) if settings.follow else None
            await running
    finally:
        server.should_exit = True
        await running
        for task in (following, loading):
            if task is not None:
                task.cancel()
        await service.close_thread()


def _open_browser(address: str) -> None:
    """Open the page. A browser in a terminal would return only at its end, hence the thread."""

    def open_or_tell() -> None:
        if not webbrowser.open(address):
            notify(f"note: no browser was found: open {address}/ yourself")

    threading.Thread(target=open_or_tell, name="browser", daemon=True).start()


def make_config(service: Service, settings: ServerSettings) -> uvicorn.Config:
    """uvicorn's settings: its parser in Python, no logs, no WebSockets, our connections."""
    app = build_app(
        service,
        [*api_routes(service), *inside_routes(Inside(service))],
        api_key=settings.api_key,
        loopback=is_loopback(settings.host),
        allow_origins=settings.allow_origins,
    )
    limits = settings.limits
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, limits=limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        loop="asyncio",
        interface="asgi3",
        log_config=None,
        log_level=logging.CRITICAL + 1,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=limits.shutdown_s,
        backlog=BACKLOG,
    )


class _Server(uvicorn.Server):
    """uvicorn's server, which ends when `interrupt` is set and first ends all answers."""

    def __init__(self, config: uvicorn.Config, service: Service, interrupt: SignalEvent) -> None:
        super().__init__(config)
        self._service, self._interrupt = service, interrupt

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The caller of `serve` has installed handlers."""
        yield

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._interrupt.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stop()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at this address; port 0 is any free one. Raises InputError."""
    try:
        family, kind, tcp, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only where TCP is named. Without it an answer waits for 40 ms.
        listener = socket.socket(family, kind, tcp)
    except (OSError, UnicodeError) as error:
        raise_if_exhausted(error, f"a socket at {host}")
        raise InputError(f"--host {host} is no address of this machine ({error})") from None
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. A client that does not read is noticed once this buffer is full.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise_if_exhausted(error, f"a socket at {host}")
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} is in use: choose another --port, or 0 for any free one"
            ) from None
        raise InputError(
            f"{host} port {port} cannot be used ({error.strerror}): choose another --host or --port"
        ) from None
    return listener


def raise_file_limit(n_connections: int) -> None:
    """Let the process open a file for each connection, as far as the system allows."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n_connections + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
