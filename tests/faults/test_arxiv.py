"""arXiv's API: its rules are obeyed, and a failure keeps the pages that have arrived.

A local server misbehaves on purpose, and the clock is simulated. Recorded responses are read where
the shared data folder has them.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from glasslm.config.schema import DataConfig
from glasslm.data.download import DownloadError
from glasslm.data.sources import arxiv, corpora
from glasslm.errors import InputError

RECORDED = Path(__file__).parents[3] / "shared" / "data" / "arxiv"
START = 1_700_000_000.0


class Clock:
    """A simulated clock, which only `sleep` moves."""

    def __init__(self) -> None:
        self.now, self.pauses = START, list[float]()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.pauses.append(seconds)
            self.now += seconds


Response = tuple[int, dict[str, str], bytes]
Respond = Callable[[int, int], Response]  # (number of the request, start) -> status, headers, body


def feed(total: int, start: int, count: int = arxiv.PAGE_PAPERS, shifted: int = 0) -> bytes:
    """A page of a category with `total` papers, after `shifted` new ones came in front."""
    entries = []
    for number in range(start, min(start + count, total)):
        paper = total - number + shifted
        entries.append(
            f"<entry><id>http://arxiv.org/abs/2401.{paper:05d}v{number % 3 + 1}</id>"
            f"<title>No. {paper}</title>"
            f"<summary>  The abstract of\n  paper {paper}, with a &lt; b. </summary></entry>"
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><feed xmlns="http://www.w3.org/2005/Atom" '
        'xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">'
        f"<opensearch:totalResults>{total}</opensearch:totalResults>{''.join(entries)}</feed>"
    ).encode()


def error_feed(reason: str) -> bytes:
    return (
        '<feed xmlns="http://www.w3.org/2005/Atom"><entry><id>http://arxiv.org/api/errors#bad</id>'
        f"<title>Error</title><summary>{reason}</summary></entry></feed>"
    ).encode()


def respond_well(total: int) -> Respond:
    return lambda number, start: (200, {}, feed(total, start))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    clock = Clock()
    monkeypatch.setattr(arxiv, "_now", lambda: clock.now)
    monkeypatch.setattr(arxiv, "_sleep", clock.sleep)
    return clock


@contextmanager
def serving(respond: Respond, clock: Clock | None = None) -> Iterator[list[dict[str, str]]]:
    """The query of each request, with its time and connection."""
    requests: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = {
                name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()
            }
            requests.append(
                query
                | {"at": str(clock.now if clock else 0), "port": str(self.client_address[1])}
                | {"agent": self.headers["User-Agent"], "path": urlsplit(self.path).path}
            )
            status, headers, body = respond(len(requests), int(query["start"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            if "Content-Length" in headers:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GLASSLM_MIRROR", f"http://127.0.0.1:{server.server_port}")
            yield requests
    finally:
        server.shutdown()
        server.server_close()


def fetch(
    max_results: int, messages: list[str] | None = None, category: str = "cs.RO"
) -> list[str]:
    """The abstracts."""
    notify = messages.append if messages is not None else lambda message: None
    source = corpora.find_source(
        DataConfig(corpus="arxiv", category=category, max_results=max_results), notify
    )
    return "".join(source.text()).split("\n\n")


def abstracts(total: int, count: int) -> list[str]:
    return [f"The abstract of paper {total - number}, with a < b." for number in range(count)]


def test_pages_are_asked_for_newest_first_over_one_connection_three_seconds_apart(
    clock: Clock,
) -> None:
    messages: list[str] = []
    with serving(respond_well(1000), clock) as requests:
        assert fetch(730, messages) == abstracts(1000, 730)
    assert [request["start"] for request in requests] == [
        str(start) for start in range(0, 800, 100)
    ]
    for request in requests:
        assert request["path"] == "/api/query"
        assert request["search_query"] == "cat:cs.RO"
        assert (request["sortBy"], request["sortOrder"]) == ("submittedDate", "descending")
        assert request["agent"].startswith("glasslm/")
    assert len({request["port"] for request in requests}) == 1
    times = [float(request["at"]) for request in requests]
    assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(times))
    assert any("of 730 abstracts" in message and "left" in message for message in messages)
    assert any("CC0" in message for message in messages)


def test_a_finished_download_is_not_repeated(clock: Clock) -> None:
    with serving(respond_well(300)) as requests:
        first = fetch(250)
        assert len(requests) == 3
        assert fetch(250) == first
        assert len(requests) == 3


def test_requests_of_two_processes_are_three_seconds_apart(clock: Clock) -> None:
    """The time of the last request is on the disk."""
    with serving(respond_well(100), clock) as requests:
        fetch(50)
        fetch(60)  # starts at once, with a session of its own
        clock.now -= 1000  # the clock was set back: the pause is still 3 seconds
        fetch(70)
    times = [float(request["at"]) for request in requests]
    assert times[1] - times[0] >= 3
    assert clock.pauses == [3.0, 3.0]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("retry_after", ["17", "date"])
def test_retry_after_is_obeyed(status: int, retry_after: str, clock: Clock) -> None:
    def respond(number: int, start: int) -> Response:
        if number in (2, 3):
            value = (
                retry_after if retry_after != "date" else formatdate(clock.now + 17, usegmt=True)
            )
            return status, {"Retry-After": value}, b"slow down"
        return 200, {}, feed(300, start)

    with serving(respond, clock) as requests:
        assert fetch(300) == abstracts(300, 300)
    times = [float(request["at"]) for request in requests]
    assert all(times[i + 1] - times[i] >= 16.99 for i in (1, 2))
    assert len(requests) == 5


def test_a_very_long_pause_is_an_error_and_the_pages_are_kept(clock: Clock) -> None:
    def respond(number: int, start: int) -> Response:
        return (503, {"Retry-After": "86400"}, b"") if number == 3 else (200, {}, feed(500, start))

    with (
        serving(respond) as requests,
        pytest.raises(DownloadError, match=r"asks to wait .*pages are kept: give the same command"),
    ):
        fetch(500)
    with serving(respond_well(500)) as requests:
        assert fetch(500) == abstracts(500, 500)
        assert [request["start"] for request in requests] == ["200", "300", "400"]


def test_empty_pages_come_now_and_then_and_are_asked_for_again(clock: Clock) -> None:
    with serving(
        lambda number, start: (200, {}, feed(300, start, count=0 if number in (1, 3, 4) else 100))
    ) as requests:
        assert fetch(300) == abstracts(300, 300)
    assert len(requests) == 6


@pytest.mark.parametrize(
    ("name", "response", "says"),
    [
        ("always empty", (200, {}, feed(300, 0, count=0)), "an empty page"),
        ("no feed", (200, {}, b"<html><p>Welcome to this hotel</html>"), "no feed"),
        ("cut", (200, {"Content-Length": "90000"}, feed(300, 0)), "Incomplete|bytes read"),
        ("broken", (500, {}, b"oops"), "answers 500"),
        ("too long", (200, {}, b" " * 300_000), "no feed"),
        ("not there", (404, {}, feed(300, 0)), "answers 404"),
        ("no total", (200, {}, feed(300, 0).replace(b"totalResults", b"total")), "how many papers"),
    ],
)
def test_a_bad_answer_is_asked_for_again_and_then_named(
    name: str,
    response: Response,
    says: str,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arxiv, "MAX_RESPONSE_BYTES", 200_000)
    with (
        serving(lambda number, start: response) as requests,
        pytest.raises(DownloadError, match=says),
    ):
        fetch(300)
    assert len(requests) == arxiv.MAX_ATTEMPTS
    assert not list((tmp_path / "cache").rglob("*.txt"))
    with serving(respond_well(300)):
        assert fetch(300) == abstracts(300, 300)


@pytest.mark.parametrize("status", [200, 400])
def test_an_error_feed_is_quoted_and_not_asked_for_again(status: int, clock: Clock) -> None:
    with (
        serving(
            lambda number, start: (status, {}, error_feed("start must be non-negative"))
        ) as requests,
        pytest.raises(InputError, match="start must be non-negative"),
    ):
        fetch(300)
    assert len(requests) == 1


def test_an_unknown_category_is_an_error(clock: Clock) -> None:
    with serving(respond_well(0)), pytest.raises(InputError, match="category_taxonomy"):
        fetch(300, category="cs.XX")
    with pytest.raises(InputError, match=r"such as cs\.RO"):
        DataConfig(corpus="arxiv", category="cs.RO OR all:x")
    with pytest.raises(InputError, match="30,000"):
        DataConfig(corpus="arxiv", max_results=40_000)


def test_fewer_papers_than_asked_for_are_enough(clock: Clock) -> None:
    messages: list[str] = []
    with serving(respond_well(140)):
        assert fetch(500, messages) == abstracts(140, 140)
    assert any("140 papers" in message for message in messages)


def test_new_papers_in_front_move_others_to_the_next_page_and_none_is_taken_twice(
    clock: Clock,
) -> None:
    def respond(number: int, start: int) -> Response:
        shifted = 3 * (number - 1)  # three new ones between two requests
        return 200, {}, feed(400 + shifted, start)

    with serving(respond):
        papers = fetch(300)
    assert len(papers) == len(set(papers)) == 300
    assert papers[:100] == abstracts(400, 100)


def test_an_interruption_keeps_the_pages_that_came(clock: Clock) -> None:
    def respond(number: int, start: int) -> Response:
        if number == 4:
            raise_here.set()
        return 200, {}, feed(600, start)

    raise_here = threading.Event()

    def sleep(seconds: float) -> None:
        if raise_here.is_set():
            raise KeyboardInterrupt
        clock.sleep(seconds)

    with pytest.MonkeyPatch.context() as patch, serving(respond):
        patch.setattr(arxiv, "_sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            fetch(600)
    with serving(respond_well(600)) as requests:
        assert fetch(600) == abstracts(600, 600)
    assert [request["start"] for request in requests] == ["400", "500"]


def test_a_page_damaged_on_the_disk_is_asked_for_again(clock: Clock, tmp_path: Path) -> None:
    stop = iter([False] * 3 + [True] * 99)
    with (
        serving(
            lambda n, start: (
                (503, {"Retry-After": "9999"}, b"") if next(stop) else (200, {}, feed(400, start))
            )
        ),
        pytest.raises(DownloadError),
    ):
        fetch(400)
    pages = sorted((tmp_path / "cache").rglob("*.json"))
    assert len(pages) == 3
    pages[1].write_bytes(pages[1].read_bytes()[:100])
    with serving(respond_well(400)) as requests:
        assert fetch(400) == abstracts(400, 400)
    assert [request["start"] for request in requests] == ["100", "300"]


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded answers are not here")
def test_recorded_answers_are_read(clock: Clock) -> None:
    n_papers = 0
    for path in sorted(RECORDED.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        body, status = record["body"].encode(), record["status_code"]
        expected = record["body"].count("<entry>")
        with serving(lambda number, start, b=body, s=status: (s, {}, b)):  # type: ignore[misc]
            import requests

            with requests.Session() as session:
                url = arxiv.mirror_url("https://export.arxiv.org/api/query?start=0")
                if status != 200:
                    with pytest.raises(InputError, match="incorrect id"):
                        arxiv._request_once(session, url)
                    continue
                page = arxiv._request_once(session, url)
        assert len(page.papers) == expected
        assert all("\n" not in abstract and abstract for _, abstract in page.papers)
        n_papers += len(page.papers)
    assert n_papers > 100
