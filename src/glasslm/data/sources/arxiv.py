"""Abstracts of arXiv, newest first, joined by blank lines.

They come from the API, https://info.arxiv.org/help/api/user-manual.html, which asks for one
connection at a time and three seconds between requests from one machine. Each page is kept as it
comes, so an interrupted download continues where it stopped. New papers shift the others to later
pages; a paper that comes twice is taken once.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode
from xml.etree import ElementTree

from glasslm import files, strict_json
from glasslm.data.cache import cache_dir, explain_write_errors, write_cached
from glasslm.data.download import DownloadError, fetch_url, mirror_url
from glasslm.data.sources.text_files import Source, source_file
from glasslm.data.sources.texts import SEPARATOR
from glasslm.errors import InputError, raise_if_exhausted
from glasslm.text import Notify, format_duration

if TYPE_CHECKING:
    import requests

FACTS = (
    "6 MB for 5,000 abstracts",
    "CC0 (metadata of arXiv)",
    "https://export.arxiv.org, newest first; --category, --max-results",
)

API_URL = "https://export.arxiv.org/api/query"
PAGE_PAPERS = 100  # of one request
REQUEST_INTERVAL_S = 3.0
MAX_ATTEMPTS = 5  # for one page; the pause doubles from REQUEST_INTERVAL_S
MAX_RETRY_AFTER_S = 600.0  # that a server may ask to wait
RESPONSE_TIMEOUT_S = 30.0
MEAN_ABSTRACT_BYTES = 1300
MAX_RESPONSE_BYTES = 10_000_000
RESUME_HINT = (
    "The downloaded pages are kept: give the same command to continue. "
    "Or use a text of your own: --text-file PATH"
)
BUSY_STATUSES = {429, 500, 502, 503, 504}
ATOM, SEARCH = "{http://www.w3.org/2005/Atom}", "{http://a9.com/-/spec/opensearch/1.1/}"


@dataclass(frozen=True)
class Page:
    """One page of results: the total number of papers, and (id, abstract) of each on this page."""

    total: int
    papers: list[tuple[str, str]]


class BusyError(OSError):
    """The server asks to wait for `retry_after_s` seconds; None if it names no time."""

    def __init__(self, reason: str, retry_after_s: float | None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def find_source(category: str, max_results: int, notify: Notify) -> Source:
    """The abstracts, from the cache or the web. Raises DownloadError when neither has them."""
    folder = cache_dir("corpora", "arxiv")
    path = folder / f"{category}-{max_results}.txt"
    if not path.is_file():
        pages = folder / f"{category}-{max_results}.pages"
        size = f"about {max_results * MEAN_ABSTRACT_BYTES / 1e6:.1f} MB, metadata is CC0"
        notify(f"arXiv {category}: asking for {max_results:,} abstracts ({size})")
        papers: dict[str, str] = {}
        for page in _load_pages(category, max_results, pages, notify):
            papers |= {paper: abstract for paper, abstract in page.papers if paper not in papers}
        if not papers:
            raise InputError(
                f"arXiv has no papers in '{category}': "
                "its categories are at https://arxiv.org/category_taxonomy"
            )
        abstracts = list(papers.values())[:max_results]
        if len(abstracts) < max_results:
            notify(
                f"note: arXiv has {len(abstracts):,} papers in {category}, "
                f"fewer than --max-results {max_results:,}"
            )
        write_cached(path, SEPARATOR.join(abstracts).encode())
        with suppress(OSError):  # the abstracts are complete
            files.remove(pages)
    return Source("arxiv", (source_file(path, f"{API_URL}?search_query=cat:{category}"),))


def _load_pages(category: str, max_results: int, folder: Path, notify: Notify) -> Iterator[Page]:
    """All pages: from `folder` where it has them, else from the server."""
    import requests

    started_s, n_requested = time.monotonic(), 0
    papers: set[str] = set()
    start, total = 0, max_results
    with requests.Session() as session:
        while start < total and len(papers) < max_results:
            path = folder / f"{start:06d}.json"
            page = _read_page(path)
            if page is None:
                page = _request_page(session, category, start, notify)
                write_cached(path, json.dumps([page.total, page.papers]).encode())
                n_requested += 1
            papers |= {paper for paper, _ in page.papers}
            start, total = start + PAGE_PAPERS, page.total
            if n_requested and n_requested % 5 == 0:
                n_requested_papers = min(max_results, total)
                pages_left = max(0.0, (n_requested_papers - len(papers)) / PAGE_PAPERS)
                left_s = pages_left * (time.monotonic() - started_s) / n_requested
                notify(
                    f"arXiv {category}: {len(papers):,} of {n_requested_papers:,} abstracts, "
                    f"about {format_duration(left_s)} left"
                )
            yield page


def _read_page(path: Path) -> Page | None:
    """A page from the disk; None if it is missing or damaged."""
    try:
        total, papers = strict_json.parse_json(path.read_bytes())
        return Page(int(total), [(str(paper), str(abstract)) for paper, abstract in papers])
    except (OSError, ValueError, TypeError) as error:
        raise_if_exhausted(error, path)
        return None


def _request_page(session: requests.Session, category: str, start: int, notify: Notify) -> Page:
    """One page, requested at most MAX_ATTEMPTS times. Raises DownloadError."""
    query = {
        "search_query": f"cat:{category}",
        "sortBy": "submittedDate",
        "sortOrder": "descending",
    }
    url = mirror_url(f"{API_URL}?{urlencode(query | {'start': start, 'max_results': PAGE_PAPERS})}")
    reason = ""
    for attempt in range(MAX_ATTEMPTS):
        pause_s = REQUEST_INTERVAL_S * 2**attempt
        try:
            page = _request_once(session, url)
            if page.papers or start >= page.total:
                return page
            # The API returns an empty page now and then.
            reason = f"an empty page, though there are {page.total:,} papers"
        except BusyError as error:
            reason = str(error)
            if error.retry_after_s is not None:
                pause_s = error.retry_after_s
            if pause_s > MAX_RETRY_AFTER_S:
                raise DownloadError(
                    f"arXiv asks to wait {format_duration(pause_s)} before the next request: "
                    f"{RESUME_HINT}"
                ) from None
        except OSError as error:
            raise_if_exhausted(error, url)
            reason = str(error)
        if attempt + 1 < MAX_ATTEMPTS:
            notify(f"arXiv, papers from {start}: {reason}; trying again in {pause_s:.0f} s")
            _sleep(pause_s)
    raise DownloadError(f"{url} could not be downloaded: {reason}. {RESUME_HINT}")


def _request_once(session: requests.Session, url: str) -> Page:
    """The response to one request.

    Raises BusyError, OSError for a bad response, or InputError for an error in the query.
    """
    from importlib.metadata import version

    agent = f"glasslm/{version('glasslm')} (trains small language models on abstracts)"
    with _request_slot():
        status, response_headers, body = fetch_url(
            url, MAX_RESPONSE_BYTES, RESPONSE_TIMEOUT_S, session, {"User-Agent": agent}
        )
    if status in BUSY_STATUSES:
        retry_after_s = _parse_retry_after(response_headers.get("Retry-After"))
        raise BusyError(f"the server answers {status}", retry_after_s)
    try:
        feed = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise OSError(f"the answer ({status}) is no feed: {error}") from None
    entries = [
        (_child_text(entry, "id"), _child_text(entry, "summary"))
        for entry in feed.iter(f"{ATOM}entry")
    ]
    for paper, abstract in entries:
        if "/api/errors" in paper:
            raise InputError(f"arXiv refuses the query: {abstract}")
    if status != 200:
        raise OSError(f"the server answers {status}")
    total = feed.findtext(f"{SEARCH}totalResults", "")
    if not (total.isascii() and total.isdigit()):
        raise OSError("the answer does not say how many papers there are")
    papers = [(re.sub(r"v\d+$", "", paper), abstract) for paper, abstract in entries if abstract]
    return Page(int(total), papers)


def _child_text(entry: ElementTree.Element, name: str) -> str:
    """Text of a child element in one line; the API wraps abstracts."""
    return " ".join((entry.findtext(f"{ATOM}{name}") or "").split())


def _parse_retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date (RFC 9110, section 10.2.3); None if it is neither."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    now = datetime.fromtimestamp(_now(), UTC)
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())


@contextmanager
def _request_slot() -> Iterator[None]:
    """Wait until a request is allowed: one at a time on this machine, three seconds apart.

    A lock file and the time of the last request are shared by all processes.
    """
    from filelock import FileLock

    folder = cache_dir("corpora", "arxiv")
    last_request, lock = folder / "last-request", FileLock(folder / "request.lock")
    with explain_write_errors(folder):
        lock.acquire()
    try:
        if last_request.exists():
            elapsed_s = _now() - last_request.stat().st_mtime
            # A negative time means that the clock was set back.
            _sleep(REQUEST_INTERVAL_S if elapsed_s < 0 else REQUEST_INTERVAL_S - elapsed_s)
        with explain_write_errors(folder):
            last_request.touch()
        yield
    finally:
        if last_request.exists():
            os.utime(last_request, (_now(), _now()))
        lock.release()


def _now() -> float:
    return time.time()


def _sleep(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)
