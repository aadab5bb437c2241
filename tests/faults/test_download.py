"""Downloads from a server that misbehaves: clear errors, and no bad file under the final name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glasslm.config.schema import DataConfig
from glasslm.data import download, tokenizers
from glasslm.data.download import DownloadError, RemoteFile, download_file
from glasslm.data.sources import corpora, shakespeare
from glasslm.errors import InputError

BODY = b"some text worth reading\n" * 1000
REMOTE = RemoteFile("https://example.org/folder/text.txt", len(BODY), sha256(BODY).hexdigest())


def quiet(message: str) -> None:
    pass


Respond = Callable[[BaseHTTPRequestHandler], None]


def send_body(
    handler: BaseHTTPRequestHandler,
    body: bytes = BODY,
    length: int | None = None,
    status: int = 200,
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def wrong_hash(handler: BaseHTTPRequestHandler) -> None:
    send_body(handler, BODY[:-1] + b"!")


def cut_body(handler: BaseHTTPRequestHandler) -> None:
    send_body(handler, BODY[:1000], length=len(BODY))


def length_too_small(handler: BaseHTTPRequestHandler) -> None:
    send_body(handler, length=1000)


def login_page(handler: BaseHTTPRequestHandler) -> None:
    send_body(handler, b"<html>Welcome to this hotel</html>")


def endless_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10_000):  # 10 GB unless the client hangs up
        handler.wfile.write(b"x" * 1_000_000)


def slow_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    for i in range(len(BODY)):
        handler.wfile.write(BODY[i : i + 1])
        time.sleep(0.02)


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(6)


def redirect_loop(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.end_headers()


def redirect_to_file(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "file:///etc/passwd")
    handler.end_headers()


def not_found(handler: BaseHTTPRequestHandler) -> None:
    send_body(handler, b"no such file", status=404)


@contextmanager
def serving(*answers: Respond) -> Iterator[list[str]]:
    """A server with `answers` in turn, the last one repeated; yields the requested paths."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            try:
                answers[min(len(paths), len(answers)) - 1](self)
            except OSError:
                self.close_connection = True  # the client hung up

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GLASSLM_MIRROR", f"http://127.0.0.1:{server.server_port}/")
            patch.setattr(download, "RETRY_PAUSE_S", 0.01)
            yield paths
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (wrong_hash, "the answer has sha256"),
        (cut_body, "bytes"),
        (length_too_small, "the answer has 1,000 bytes instead of 24,000"),
        (login_page, "34 bytes"),
        (endless_body, "more than 24,000"),
        (slow_body, "bytes came within"),
        (silent, "0 bytes came within"),
        (redirect_loop, "redirects"),
        (redirect_to_file, "file:///etc/passwd"),
        (not_found, "404"),
    ],
)
def test_a_bad_answer_leaves_nothing_and_says_how_to_supply_the_file(
    tmp_path: Path, answer: Respond, says: str
) -> None:
    target = tmp_path / "text.txt"
    started = time.monotonic()
    with serving(answer), pytest.raises(DownloadError, match=says) as caught:
        download_file(REMOTE, target, quiet, timeouts_s=(0.5, 0.5))
    assert time.monotonic() - started < 3
    assert list(tmp_path.iterdir()) == []
    assert str(target) in str(caught.value)
    assert REMOTE.sha256 in str(caught.value)
    assert REMOTE.url in str(caught.value)


def test_a_bad_answer_is_asked_for_again_and_a_good_one_kept(tmp_path: Path) -> None:
    target = tmp_path / "text.txt"
    messages: list[str] = []
    with serving(cut_body, not_found, send_body) as paths:
        download_file(REMOTE, target, messages.append)
        download_file(REMOTE, target, messages.append)  # now from the disk
    assert target.read_bytes() == BODY
    assert paths == ["/folder/text.txt"] * 3
    assert sum("trying again" in message for message in messages) == 2


def test_a_damaged_copy_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "text.txt"
    target.write_bytes(BODY[:-1] + b"?")
    messages: list[str] = []
    with serving(send_body):
        download_file(REMOTE, target, messages.append)
    assert target.read_bytes() == BODY
    assert "damaged" in messages[0]


def test_the_default_falls_back_loudly_within_five_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    messages: list[str] = []
    started = time.monotonic()
    with serving(silent):
        source = corpora.find_source(DataConfig(), messages.append)
    assert time.monotonic() - started < 5
    assert (source.name, source.fallback) == ("python", True)
    assert any(message.startswith("warning") and "falling back" in message for message in messages)


def test_an_explicit_shakespeare_tries_again_and_then_fails_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    with (
        serving(not_found) as paths,
        pytest.raises(InputError, match=r"--text-file PATH") as caught,
    ):
        corpora.find_source(DataConfig(corpus="shakespeare"), quiet)
    assert len(paths) == 3
    assert str(tmp_path / "corpora" / "shakespeare.txt") in str(caught.value)
    assert paths[0] == "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def test_a_file_put_there_by_hand_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    monkeypatch.setattr(shakespeare, "REMOTE", REMOTE)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "shakespeare.txt").write_bytes(BODY)
    with serving(not_found) as paths:
        assert "".join(corpora.find_source(DataConfig(), quiet).text()) == BODY.decode()
    assert paths == []


def test_gpt2_without_network_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(download, "RETRY_PAUSE_S", 0.01)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"vocab\.bpe could not be downloaded.*supply it by hand"):
        tokenizers.load_gpt2(quiet)
