"""Bad files, a lying server, an interrupted or damaged cache: clear errors, and never a bad file in place."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glasslm.config.schema import DataConfig
from glasslm.data import download as downloads
from glasslm.data import shards, tokenizers
from glasslm.data.download import DownloadError, Remote, download
from glasslm.data.sources import corpora, shakespeare
from glasslm.data.sources.files import Source
from glasslm.errors import ExhaustedError, InputError

BODY = b"some text worth reading\n" * 1000
REMOTE = Remote("https://example.org/folder/text.txt", len(BODY), sha256(BODY).hexdigest())


def quiet(message: str) -> None:
    pass


# --- A server that lies -----------------------------------------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler], None]


def honest(
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
    honest(handler, BODY[:-1] + b"!")


def cut(handler: BaseHTTPRequestHandler) -> None:
    honest(handler, BODY[:1000], length=len(BODY))


def length_too_small(handler: BaseHTTPRequestHandler) -> None:
    honest(handler, length=1000)


def login_page(handler: BaseHTTPRequestHandler) -> None:
    honest(handler, b"<html>Welcome to this hotel</html>")


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10_000):  # 10 GB unless somebody hangs up
        handler.wfile.write(b"x" * 1_000_000)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    for i in range(len(BODY)):
        handler.wfile.write(BODY[i : i + 1])
        time.sleep(0.02)


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(6)


def round_in_circles(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.end_headers()


def away_from_http(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "file:///etc/passwd")
    handler.end_headers()


def not_found(handler: BaseHTTPRequestHandler) -> None:
    honest(handler, b"no such file", status=404)


@contextmanager
def serving(*answers: Answer) -> Iterator[list[str]]:
    """A server that gives `answers` in turn, the last one from then on; the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            try:
                answers[min(len(asked), len(answers)) - 1](self)
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
            patch.setattr(downloads, "PAUSE", 0.01)
            yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (wrong_hash, "the answer has sha256"),
        (cut, "bytes"),
        (length_too_small, "the answer has 1,000 bytes instead of 24,000"),
        (login_page, "34 bytes"),
        (endless, "more than 24,000"),
        (drip, "bytes came within"),
        (silent, "0 bytes came within"),
        (round_in_circles, "redirects"),
        (away_from_http, "file:///etc/passwd"),
        (not_found, "404"),
    ],
)
def test_a_bad_answer_leaves_nothing_and_says_how_to_supply_the_file(
    tmp_path: Path, answer: Answer, says: str
) -> None:
    target = tmp_path / "text.txt"
    started = time.monotonic()
    with serving(answer), pytest.raises(DownloadError, match=says) as caught:
        download(REMOTE, target, quiet, attempts=(0.5, 0.5))
    assert time.monotonic() - started < 3
    assert list(tmp_path.iterdir()) == []
    assert str(target) in str(caught.value)
    assert REMOTE.sha256 in str(caught.value)
    assert REMOTE.url in str(caught.value)


def test_a_bad_answer_is_asked_for_again_and_a_good_one_kept(tmp_path: Path) -> None:
    target = tmp_path / "text.txt"
    said: list[str] = []
    with serving(cut, not_found, honest) as asked:
        download(REMOTE, target, said.append)
        download(REMOTE, target, said.append)  # now from the disk
    assert target.read_bytes() == BODY
    assert asked == ["/folder/text.txt"] * 3
    assert sum("trying again" in message for message in said) == 2


def test_a_damaged_copy_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "text.txt"
    target.write_bytes(BODY[:-1] + b"?")
    said: list[str] = []
    with serving(honest):
        download(REMOTE, target, said.append)
    assert target.read_bytes() == BODY
    assert "damaged" in said[0]


def test_the_default_falls_back_loudly_within_five_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    said: list[str] = []
    started = time.monotonic()
    with serving(silent):
        source = corpora.find(DataConfig(), said.append)
    assert time.monotonic() - started < 5
    assert (source.name, source.fallback) == ("python", True)
    assert any(message.startswith("WARNING") and "falling back" in message for message in said)


def test_an_explicit_shakespeare_tries_again_and_then_fails_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    with (
        serving(not_found) as asked,
        pytest.raises(InputError, match=r"--text-file PATH") as caught,
    ):
        corpora.find(DataConfig(corpus="shakespeare"), quiet)
    assert len(asked) == 3
    assert str(tmp_path / "corpora" / "shakespeare.txt") in str(caught.value)
    assert asked[0] == "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def test_a_file_put_there_by_hand_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    monkeypatch.setattr(shakespeare, "REMOTE", REMOTE)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "shakespeare.txt").write_bytes(BODY)
    with serving(not_found) as asked:
        assert "".join(corpora.find(DataConfig(), quiet).text()) == BODY.decode()
    assert asked == []


def test_gpt2_without_network_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"vocab\.bpe could not be downloaded.*supply it by hand"):
        tokenizers.gpt2(quiet)


# --- Bad files --------------------------------------------------------------------------------------------------------


def find(*names: Path | str) -> Source:
    return corpora.find(DataConfig(text_file=tuple(map(str, names))), quiet)


@pytest.mark.parametrize("body", [b"", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "empty.txt").write_bytes(body)
    with pytest.raises(InputError, match="empty"):
        shards.prepare(DataConfig(), find(tmp_path / "empty.txt"), quiet)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    (tmp_path / "nothing").mkdir()
    for name, says in {
        "shakespear.txt": r"no file or folder .*shakespear\.txt: did you mean .*shakespeare\.txt\?",
        "*.md": r"no file matches .*\*\.md",
        "nothing": "no text files in the folder",
        "no/such/folder/text": "no file or folder",
        "long" * 100: "no file or folder",
    }.items():
        with pytest.raises(InputError, match=says):
            find(tmp_path / name)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(InputError, match=r"secret\.txt cannot be read"):
        find(path)


def test_utf16_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(InputError, match="UTF-16"):
        shards.prepare(DataConfig(), find(tmp_path / "w.txt"), quiet)


def test_a_file_that_changes_under_our_hands_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("x" * 1000)
    source = find(path)
    path.write_text("y" * 1000)
    with pytest.raises(InputError, match="changed while"):
        shards.prepare(DataConfig(), source, quiet)


def test_nuls_are_kept_and_noted(tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_bytes(b"a\0b\0" * 50)
    said: list[str] = []
    dataset = shards.prepare(DataConfig(), find(tmp_path / "n.txt"), said.append)
    assert dataset.tokenizer.token_bytes == [b"\0", b"a", b"b"]
    assert any("100 NUL" in message for message in said)


def test_replaced_bytes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_bytes(b"a\xffb\xfe" * 50)
    said: list[str] = []
    data = DataConfig(tokenizer="byte", encoding_errors="replace")
    dataset = shards.prepare(data, find(tmp_path / "r.txt"), said.append)
    assert dataset.train.bytes + dataset.val.bytes == 50 * len("a\ufffdb\ufffd".encode())
    assert any("100 U+FFFD" in message for message in said)


# --- The cache --------------------------------------------------------------------------------------------------------

KILLED = textwrap.dedent("""
    import os, sys
    from glasslm.data.sources import corpora
    from glasslm import files
    from glasslm.data import shards
    from glasslm.config.schema import DataConfig

    where, count = sys.argv[2], int(sys.argv[3])
    owner, name = {"encode": (shards.tokenizers.CharTokenizer, "encode"), "write": (files, "_write"),
                   "rename": (files, "_rename")}[where]
    real, calls = getattr(owner, name), 0

    def killing(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os._exit(137)
        return real(*args, **kwargs)

    setattr(owner, name, killing)
    shards.PIECE = 1000
    data = DataConfig(text_file=(sys.argv[1],))
    shards.prepare(data, corpora.find(data, print), print)
""")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of many\n" for i in range(2000)), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Of the renames the first is that of the tokens, the second that of the recipe.
@pytest.mark.parametrize(
    ("where", "count"),
    [("encode", 1), ("encode", 20), ("write", 1), ("rename", 1), ("write", 30), ("rename", 2)],
)
def test_a_killed_tokenisation_is_redone(text: Path, cache: Path, where: str, count: int) -> None:
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(text), where, str(count)], capture_output=True
    )
    assert died.returncode == 137, died.stderr.decode()
    data = DataConfig(text_file=(str(text),))
    dataset = shards.prepare(data, corpora.find(data, quiet), quiet)
    both = dataset.tokenizer.decode([*dataset.train.tokens.tolist(), *dataset.val.tokens.tolist()])
    assert both == text.read_text(encoding="utf-8")
    recipe = shards._recipe(data, corpora.find(data, quiet))
    assert {path.name for path in cache.iterdir()} == {
        dataset.sha256,
        f"{recipe}.json",
        ".lock",
    }  # nothing half done


def test_any_damage_is_found_and_repaired(text: Path, cache: Path) -> None:
    data = DataConfig(text_file=(str(text),), tokenizer="bpe", vocab_size=300)
    source = corpora.find(data, quiet)
    folder = cache / shards.prepare(data, source, quiet).sha256
    whole = shard_bytes(folder)
    assert set(whole) == {"train.bin", "val.bin", "tokenizer.json", "facts.json", "manifest.json"}
    for name, body in whole.items():
        for damage in (body[:-1], body[:20] + bytes([body[20] ^ 1]) + body[21:], b"", None):
            if damage is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damage)
            assert shards.reopen(folder.name) is None
            shards.prepare(data, source, quiet)
            assert shard_bytes(folder) == whole


def test_two_processes_at_once_both_get_the_tokens(text: Path, cache: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(text), "encode", "-1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(30) for process in both] == [0, 0]
    for process in both:
        assert process.stdout is not None
        process.stdout.close()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_named(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(text))  # a file
    data = DataConfig(text_file=(str(text),))
    with pytest.raises(InputError, match=r"cache folder .* set GLASSLM_CACHE"):
        shards.prepare(data, corpora.find(data, quiet), quiet)


LIMITED = textwrap.dedent("""
    import resource, signal, sys
    from glasslm.data.sources import corpora
    from glasslm.data import shards
    from glasslm.config.schema import DataConfig
    from glasslm.errors import ExhaustedError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    data = DataConfig(text_file=(sys.argv[1],))
    try:
        shards.prepare(data, corpora.find(data, print), print)
    except ExhaustedError as error:
        print(error)
        sys.exit(error.exit_code)
""")


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_is_said(text: Path, cache: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(text)], capture_output=True, text=True
    )
    assert ended.returncode == ExhaustedError.exit_code, ended.stderr
    assert "is full" in ended.stdout
    assert "GLASSLM_CACHE" in ended.stdout
