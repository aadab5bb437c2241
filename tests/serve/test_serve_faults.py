"""Clients that are slow, gone, malformed or too many, over raw sockets, and a server that ends."""

import concurrent.futures
import json
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from server_process import (
    ServerProcess,
    make_run,
    read_events,
    serving,
    serving_with_limits,
)

HEAD_S = BODY_S = WRITE_S = 0.5
LIMITS = {
    "head_bytes": 4096, "body_bytes": 20_000, "head_s": HEAD_S, "body_s": BODY_S,
    "write_s": WRITE_S, "ping_s": 0.1, "queued_texts": 600, "connections": 300,
}  # fmt: skip
LONG = 60_000  # tokens: far more than a test waits for

# Generating 12 or 13 tokens fails in a text, generating 14 in a step of the scheduler.
PRELUDE = """
from glasslm.inference import stream, scheduler
drawing, appending = stream.Stream.draw, stream.Stream.append
submitting, stepping = scheduler.Scheduler.submit, scheduler.Scheduler.step
def draw(self):
    if self.request.max_new_tokens == 12:
        raise ArithmeticError("planted in a draw")
    return drawing(self)
def append(self, token, logprob, top):
    if self.request.max_new_tokens == 13:
        raise ArithmeticError("planted in a text")
    return appending(self, token, logprob, top)
def submit(self, request):
    self.fails = request.max_new_tokens == 14
    return submitting(self, request)
def step(self):
    if self.fails:
        raise MemoryError("planted in a step")
    return stepping(self)
stream.Stream.draw, stream.Stream.append = draw, append
scheduler.Scheduler.submit, scheduler.Scheduler.step = submit, step
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "char")


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[ServerProcess]:
    with serving_with_limits(run, prelude=PRELUDE, **LIMITS) as process:
        yield process


_clients: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_clients() -> Iterator[None]:
    yield
    while _clients:
        _clients.pop().close()


def connect(server: ServerProcess, receive_bytes: int = 0) -> socket.socket:
    """A connection, which is closed at the end of the test at the latest."""
    client = socket.socket()
    _clients.append(client)
    if receive_bytes:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(10)
    client.connect(("127.0.0.1", server.port))
    return client


def head(length: int | str, *fields: str, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def request_bytes(**body: Any) -> bytes:
    content = json.dumps({"prompt": "the cat", **body}).encode()
    return head(len(content)) + content


def read_all(client: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def require_fast(server: ServerProcess) -> None:
    """A client that does everything right has its answer at once."""
    start = time.monotonic()
    assert server.complete(prompt="a dog", max_tokens=5)["usage"]["completion_tokens"] == 5
    assert time.monotonic() - start < 10  # one slow client after another would take 25 s


# -- too large -----------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_also_in_chunks(server: ServerProcess) -> None:
    body = json.dumps({"prompt": "a" * 50_000}).encode()

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for content in (body, chunks()):
        response = server.client.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "too_large"
    with connect(server) as client:  # before a byte of it is sent
        client.sendall(head(10**15, "Expect: 100-continue"))
        assert status_of(client.recv(4096)) == 413
    require_fast(server)


def test_a_header_that_is_too_large_is_refused(server: ServerProcess) -> None:
    response = server.client.get("/health", headers={"X-Large": "a" * 10_000})
    assert response.status_code == 431
    assert "4,096" in response.json()["error"]["message"]
    with connect(server) as client:  # one that never ends
        client.sendall(b"GET /" + b"a" * 10_000)
        assert status_of(read_all(client)) == 431


@pytest.mark.parametrize(
    "body",
    [{"max_tokens": 10**9}, {"n": 10**6}, {"prompt": ["a"] * 1000}, {"prompt": "a" * 5000}],
    ids=["max_tokens", "n", "prompts", "prompt"],
)
def test_a_request_for_too_much_is_refused_before_any_compute(
    server: ServerProcess, body: dict[str, Any]
) -> None:
    before = server.metric("glasslm_tokens_total")
    response = server.post("/v1/completions", **{"prompt": "a"} | body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(body))
    assert server.metric("glasslm_tokens_total") == before


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"xyz\r\n",
        head(0).replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        bytes(range(256)),
    ],
)
def test_malformed_requests_get_an_error_in_json(server: ServerProcess, data: bytes) -> None:
    with connect(server) as client:
        client.sendall(data)
        answer = read_all(client)
    assert status_of(answer) in (400, 501)
    assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
    require_fast(server)


# -- slow ----------------------------------------------------------------------------------------


def test_fifty_slow_clients_of_each_kind_delay_nobody_and_are_closed(
    server: ServerProcess,
) -> None:
    n = 50
    clients = []
    for data in (b"", b"POST /v1/comp", head(100) + b'{"prompt"'):
        for _ in range(n):
            clients.append(connect(server))
            clients[-1].sendall(data)
    for _ in range(3):
        require_fast(server)
    for client in clients:
        answer = read_all(client)
        assert not answer or status_of(answer) == 408


def test_fifty_slow_readers_are_closed_and_a_fast_one_gets_its_answer(
    server: ServerProcess,
) -> None:
    # 10 times 64 tokens with their log-probabilities: 100 kB, and little to compute
    body = {"prompt": "a" * 64, "max_tokens": 0, "echo": True, "logprobs": 5, "n": 10}
    readers = [connect(server, receive_bytes=2048) for _ in range(50)]
    for reader in readers:
        reader.sendall(request_bytes(stream=True, **body))
    server.complete(prompt="a dog", max_tokens=5)
    server.wait_until_idle(20)
    time.sleep(2 * WRITE_S)
    require_fast(server)
    answers = [read_all(reader) for reader in readers]
    assert not any(b"[DONE]" in answer for answer in answers)


def test_a_body_that_drips_is_closed_after_its_time(server: ServerProcess) -> None:
    with connect(server) as client:
        client.sendall(head(1000))
        start = time.monotonic()
        try:
            while time.monotonic() - start < 15:  # the default is 20
                client.sendall(b" ")
                time.sleep(0.05)
                client.settimeout(0.001)
                try:
                    answer = client.recv(4096)
                    break
                except TimeoutError:
                    pass
        except ConnectionError:
            answer = b"HTTP/1.1 408 "
        assert status_of(answer) == 408
        assert time.monotonic() - start > BODY_S * 0.9


# -- gone ----------------------------------------------------------------------------------------


def leave_while_streaming(server: ServerProcess) -> None:
    with connect(server) as client:
        client.sendall(request_bytes(stream=True, max_tokens=LONG))
        client.recv(4096)


def leave_while_waiting(server: ServerProcess) -> None:
    with connect(server) as client:
        client.sendall(request_bytes(max_tokens=LONG))
        time.sleep(0.1)


def leave_in_the_queue(server: ServerProcess) -> None:
    with connect(server) as client, connect(server) as other:
        client.sendall(request_bytes(max_tokens=LONG, n=40))
        other.sendall(request_bytes(max_tokens=LONG, n=5, stream=True))
        time.sleep(0.1)
        assert server.metric("glasslm_queued") >= 5


def leave_at_once(server: ServerProcess) -> None:
    with connect(server) as client:
        client.sendall(request_bytes(max_tokens=LONG, prompt="a" * 64))


def leave_with_another_request(server: ServerProcess) -> None:
    """A second request before the answer to the first: the end is noticed nevertheless."""
    with connect(server) as client:
        client.sendall(request_bytes(max_tokens=LONG) + request_bytes(max_tokens=LONG))
        time.sleep(0.1)


def leave_by_reset(server: ServerProcess) -> None:
    with connect(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(request_bytes(stream=True, max_tokens=LONG))
        client.recv(1)


@pytest.mark.parametrize(
    "leave",
    [
        leave_while_streaming,
        leave_while_waiting,
        leave_in_the_queue,
        leave_at_once,
        leave_with_another_request,
        leave_by_reset,
    ],
)
def test_a_client_that_leaves_frees_its_slot(
    server: ServerProcess, leave: Callable[[ServerProcess], None]
) -> None:
    body = {"prompt": "my sister", "max_tokens": 200, "seed": 6}
    expected = server.complete(**body)["choices"]
    cancelled = server.metric("glasslm_cancelled_total")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = pool.submit(server.complete, **body)
        leave(server)
        time.sleep(0.05)
        assert other.result()["choices"] == expected
    server.wait_until_idle(1.0)
    assert server.metric("glasslm_cancelled_total") > cancelled
    generated = server.metric("glasslm_tokens_total")
    time.sleep(0.1)
    assert server.metric("glasslm_tokens_total") == generated


def test_pipelined_requests_are_answered_in_order(server: ServerProcess) -> None:
    with connect(server) as client:
        client.sendall(b"".join(request_bytes(max_tokens=n) for n in (1, 2, 3)))
        time.sleep(0.2)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answers = read_all(client)
    places = [answers.index(f'"completion_tokens":{n}'.encode()) for n in (1, 2, 3)]
    assert places == sorted(places)
    assert answers.count(b"HTTP/1.1 200") == 4


# -- many ----------------------------------------------------------------------------------------


def test_requests_beyond_the_queue_are_refused_and_told_when_to_return(
    server: ServerProcess,
) -> None:
    blockers = [connect(server) for _ in range(5)]
    for blocker in blockers:
        blocker.sendall(request_bytes(max_tokens=LONG, n=115))
    time.sleep(0.3)
    response = server.post("/v1/completions", prompt="a", n=100)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "rate_limit_error"
    for blocker in blockers:
        blocker.close()
    server.wait_until_idle(2.0)
    require_fast(server)


def test_connections_beyond_the_limit_are_refused(server: ServerProcess) -> None:
    clients = [connect(server) for _ in range(320)]
    answers = []
    for client in clients[-10:]:
        answers.append(read_all(client))
    assert {status_of(answer) for answer in answers if answer} == {503}
    assert all(b"Retry-After" in answer for answer in answers if answer)
    for client in clients:
        client.close()
    time.sleep(0.1)
    require_fast(server)


# -- failing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [12, 13, 14])
def test_an_exception_fails_its_request_alone(server: ServerProcess, max_tokens: int) -> None:
    for stream in (False, True):
        response = server.post(
            "/v1/completions", prompt="the", max_tokens=max_tokens, stream=stream
        )
        assert response.status_code == 500
        error = response.json()["error"]
        assert error["type"] == "server_error"
        assert "planted" in error["message"]
    require_fast(server)


def test_a_failing_text_leaves_its_neighbours_alone(server: ServerProcess) -> None:
    body = {"prompt": "my sister", "max_tokens": 300, "seed": 6}
    expected = server.complete(**body)["choices"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        others = [pool.submit(server.complete, **body) for _ in range(3)]
        time.sleep(0.02)
        for max_tokens in (12, 13):
            response = server.post("/v1/completions", prompt="a", max_tokens=max_tokens)
            assert response.status_code == 500
        assert all(other.result()["choices"] == expected for other in others)


def test_a_stream_that_waits_gets_pings(server: ServerProcess) -> None:
    with connect(server) as blocker, connect(server) as client:
        blocker.sendall(request_bytes(max_tokens=LONG, n=40))
        time.sleep(0.1)
        client.sendall(request_bytes(stream=True, max_tokens=1))
        time.sleep(0.35)
        assert client.recv(65536).count(b": ping\n\n") >= 2
        blocker.close()
        answer = b""
        while b"[DONE]" not in answer:
            answer += client.recv(65536)
        assert b'"finish_reason":"length"' in answer


# -- the end -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_and_the_server(run: Path, number: int) -> None:
    with serving(run) as server:
        half, streaming, waiting = connect(server), connect(server), connect(server)
        half.sendall(head(100) + b"{")
        streaming.sendall(request_bytes(stream=True, max_tokens=LONG))
        waiting.sendall(request_bytes(max_tokens=LONG))
        streaming.recv(1024)
        start = time.monotonic()
        code = server.stop(number)
        assert time.monotonic() - start < 20
        assert code == 128 + number
        answer = read_all(streaming)
        lines = [line[6:] for line in answer.splitlines() if line.startswith(b"data: ")]
        *texts, last, error, done = lines
        assert done == b"[DONE]"
        assert json.loads(error)["error"]["code"] == "shutting_down"
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert all(json.loads(t)["choices"][0]["finish_reason"] is None for t in texts)
        assert answer.rstrip().endswith(b"0")  # the last chunk of a complete body
        for client in (waiting, half):
            answer = read_all(client)
            assert status_of(answer) == 503
            assert b"retry-after" in answer.lower()
        log = server.all_log()
        assert "Traceback" not in log
        with pytest.raises(ConnectionRefusedError):
            connect(server)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_signal_as_the_openai_client_meets_it(run: Path) -> None:
    """Each text gets its finish_reason, then the client raises the error."""
    openai = pytest.importorskip("openai")
    with (
        serving(run) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = client.completions.create(
            model=run.name, prompt="a", n=2, max_tokens=LONG, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server stops") as caught:
            chunks.extend(stream)
        assert caught.value.code == "shutting_down"
        finishes = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices}
        assert finishes == {0: "length", 1: "length"}
        assert chunks[-1].usage.completion_tokens > 0


# -- minutes -------------------------------------------------------------------------------------


has_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs resource limits")


@has_proc
@pytest.mark.slow
def test_a_thousand_requests_at_once_are_answered_or_refused(run: Path) -> None:
    with serving(run) as server:
        content = json.dumps({"prompt": "the cat", "max_tokens": 20}).encode()
        body = head(len(content), "Connection: close") + content
        clients = [connect(server) for _ in range(1000)]
        for client in clients:
            client.settimeout(60)
            client.sendall(
                body.replace(b"Host: localhost", b"Host: localhost\r\nConnection: close")
            )
        answers = [read_all(client) for client in clients]
        codes = [status_of(answer) for answer in answers]
        assert set(codes) <= {200, 429, 503}
        assert codes.count(200) >= 900
        for code, answer in zip(codes, answers):
            assert code == 200 or b"retry-after" in answer.lower()
        assert resident_bytes(server) < 600e6


@pytest.mark.slow
def test_a_thousand_clients_leave_and_no_request_is_lost(run: Path) -> None:
    body = {"prompt": "my sister", "max_tokens": 50, "seed": 6}
    leaving = (leave_while_streaming, leave_at_once, leave_by_reset)
    with serving(run) as server, concurrent.futures.ThreadPoolExecutor(12) as pool:
        expected = server.complete(**body)["choices"]
        aborts = [pool.submit(leaving[i % 3], server) for i in range(1000)]
        others = [pool.submit(server.complete, **body) for _ in range(200)]
        for abort in aborts:
            abort.result()
        assert all(other.result()["choices"] == expected for other in others)
        server.wait_until_idle(2.0)


@has_proc
@pytest.mark.slow
def test_memory_is_steady(run: Path) -> None:
    soak(run, seconds=30)


def soak(run: Path, seconds: float) -> list[float]:
    """Requests of all kinds for `seconds`; returns the memory (bytes) of each tenth."""
    sizes: list[float] = []
    with serving(run) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        end = time.monotonic() + seconds
        turn = 0
        while time.monotonic() < end:
            turn += 1
            body = {"prompt": "the cat", "max_tokens": 20, "seed": turn, "logprobs": turn % 3}
            assert client.post("/v1/completions", json=body).status_code == 200
            read_events(client.post("/v1/completions", json=body | {"stream": True, "n": 2}))
            assert client.post("/v1/completions", json={"prompt": 1}).status_code == 400
            leave_while_streaming(server)
            if len(sizes) < 10 * (1 - (end - time.monotonic()) / seconds):
                sizes.append(resident_bytes(server))
    assert max(sizes[5:]) < sizes[2] * 1.1, sizes
    return sizes


def resident_bytes(server: ServerProcess) -> float:
    """The resident memory of the server."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS"))
    return float(line.split()[1]) * 1024
