"""Abstracts of arXiv, newest first, joined by blank lines: by its API, https://info.arxiv.org/help/api/user-manual.html.

The API asks for one connection and three seconds between requests, whoever makes them on this machine. Each page is
kept as it comes, so that what was interrupted goes on where it stopped; papers that move from page to page because new
ones came in front of them are taken once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode
from xml.etree import ElementTree

from glasslm import files
from glasslm.data.cache import cache_dir, keep, writing
from glasslm.data.download import DownloadError, mirrored, receive
from glasslm.data.sources.files import Source, source_file
from glasslm.data.sources.texts import SEPARATOR
from glasslm.errors import InputError
from glasslm.text import Say, duration

if TYPE_CHECKING:
    import requests

FACTS = (
    "6 MB for 5,000 abstracts",
    "CC0 (metadata of arXiv)",
    "https://export.arxiv.org, newest first; --category, --max-results",
)

ADDRESS = "https://export.arxiv.org/api/query"
PAGE = 100  # papers of one request
APART_S = 3.0  # seconds between two requests
ATTEMPTS = 5  # for one page; without an order of the server, the pause doubles from APART_S
LONGEST_S = 600.0  # that we wait because the server says so
PATIENCE_S = 30.0  # for an answer
ABSTRACT_BYTES = 1300  # on average
MOST_BYTES = 10_000_000  # of an answer
GO_ON = "What has come is kept: the same command goes on where it stopped. Or use a text of your own: --text-file PATH"
BUSY = {429, 500, 502, 503, 504}
ATOM, SEARCH = "{http://www.w3.org/2005/Atom}", "{http://a9.com/-/spec/opensearch/1.1/}"


@dataclass(frozen=True)
class Page:
    """An answer: how many papers there are in all, and the id and abstract of those on this page."""

    total: int
    papers: list[tuple[str, str]]


class BusyError(OSError):
    """The server wants to be left alone for `seconds` (None: it did not say how long)."""

    def __init__(self, reason: str, seconds: float | None) -> None:
        super().__init__(reason)
        self.seconds = seconds


def find(category: str, max_results: int, say: Say) -> Source:
    """The abstracts, from the cache or the web. Raises DownloadError when neither has them."""
    folder = cache_dir("corpora", "arxiv")
    path = folder / f"{category}-{max_results}.txt"
    if not path.is_file():
        pages = folder / f"{category}-{max_results}.pages"
        size = f"about {max_results * ABSTRACT_BYTES / 1e6:.1f} MB, metadata is CC0"
        say(f"arXiv {category}: asking for {max_results:,} abstracts ({size})")
        papers: dict[str, str] = {}
        for page in _pages(category, max_results, pages, say):
            papers |= {paper: abstract for paper, abstract in page.papers if paper not in papers}
        if not papers:
            raise InputError(
                f"arXiv has no papers in '{category}': its categories are at https://arxiv.org/category_taxonomy"
            )
        texts = list(papers.values())[:max_results]
        if len(texts) < max_results:
            say(
                f"note: arXiv has {len(texts):,} papers in {category}, fewer than --max-results {max_results:,}"
            )
        keep(path, SEPARATOR.join(texts).encode())
        shutil.rmtree(pages, ignore_errors=True)
    return Source("arxiv", (source_file(path, f"{ADDRESS}?search_query=cat:{category}"),))


def _pages(category: str, max_results: int, kept: Path, say: Say) -> Iterator[Page]:
    """All pages, those that are kept already and the others as they come."""
    import requests

    began, asked = time.monotonic(), 0
    seen: set[str] = set()
    start, total = 0, max_results
    with requests.Session() as session:
        while start < total and len(seen) < max_results:
            path = kept / f"{start:06d}.json"
            page = _read(path)
            if page is None:
                page = _ask(session, category, start, say)
                keep(path, json.dumps([page.total, page.papers]).encode())
                asked += 1
            seen |= {paper for paper, _ in page.papers}
            start, total = start + PAGE, page.total
            if asked and asked % 5 == 0:
                wanted = min(max_results, total)
                left = max(0.0, (wanted - len(seen)) / PAGE * (time.monotonic() - began) / asked)
                say(
                    f"arXiv {category}: {len(seen):,} of {wanted:,} abstracts, about {duration(left)} left"
                )
            yield page


def _read(path: Path) -> Page | None:
    """A page that was kept; None where there is none, or it is damaged."""
    try:
        total, papers = files.parse_json(path.read_bytes())
        return Page(int(total), [(str(paper), str(abstract)) for paper, abstract in papers])
    except (OSError, ValueError, TypeError):
        return None


def _ask(session: requests.Session, category: str, start: int, say: Say) -> Page:
    """One page, asked for until it comes."""
    query = {
        "search_query": f"cat:{category}",
        "sortBy": "submittedDate",
        "sortOrder": "descending",
    }
    url = mirrored(f"{ADDRESS}?{urlencode(query | {'start': start, 'max_results': PAGE})}")
    reason = ""
    for attempt in range(ATTEMPTS):
        pause = APART_S * 2**attempt
        try:
            page = _answer(session, url)
            if page.papers or start >= page.total:
                return page
            reason = f"an empty page, though there are {page.total:,} papers"  # as the API gives now and then
        except BusyError as error:
            reason = str(error)
            if error.seconds is not None:
                pause = error.seconds
            if pause > LONGEST_S:
                raise DownloadError(
                    f"arXiv asks to be left alone for {duration(pause)}: {GO_ON}"
                ) from None
        except OSError as error:
            reason = str(error)
        if attempt + 1 < ATTEMPTS:
            say(f"arXiv, papers from {start}: {reason}; trying again in {pause:.0f} s")
            _sleep(pause)
    raise DownloadError(f"{url} could not be downloaded: {reason}. {GO_ON}")


def _answer(session: requests.Session, url: str) -> Page:
    """What the server says to one request. Raises BusyError, OSError, or InputError for an error of the query."""
    from importlib.metadata import version

    headers = {
        "User-Agent": f"glasslm/{version('glasslm')} (trains small language models on abstracts)"
    }
    with _alone():
        status, told, body = receive(url, MOST_BYTES, PATIENCE_S, session, headers)
    if status in BUSY:
        raise BusyError(f"the server answers {status}", _retry_after(told.get("Retry-After")))
    try:
        feed = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise OSError(f"the answer ({status}) is no feed: {error}") from None
    entries = [(_text(entry, "id"), _text(entry, "summary")) for entry in feed.iter(f"{ATOM}entry")]
    for paper, abstract in entries:
        if "/api/errors" in paper:
            raise InputError(f"arXiv refuses the query: {abstract}")
    if status != 200:
        raise OSError(f"the server answers {status}")
    total = feed.findtext(f"{SEARCH}totalResults", "")
    if not (total.isascii() and total.isdigit()):
        raise OSError("the answer does not say how many papers there are")
    versionless = [
        (re.sub(r"v\d+$", "", paper), abstract) for paper, abstract in entries if abstract
    ]
    return Page(int(total), versionless)


def _text(entry: ElementTree.Element, name: str) -> str:
    """A child's text in one line: the API wraps abstracts."""
    return " ".join((entry.findtext(f"{ATOM}{name}") or "").split())


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date (RFC 9110, section 10.2.3); None where it is neither."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(
        0.0,
        (
            when.replace(tzinfo=when.tzinfo or UTC) - datetime.fromtimestamp(_now(), UTC)
        ).total_seconds(),
    )


@contextmanager
def _alone() -> Iterator[None]:
    """One request at a time on this machine, and none within three seconds of the one before, whoever made it."""
    from filelock import FileLock

    folder = cache_dir("corpora", "arxiv")
    last, lock = folder / "last-request", FileLock(folder / "request.lock")
    with writing(folder):
        lock.acquire()
    try:
        if last.exists():
            since = _now() - last.stat().st_mtime
            _sleep(APART_S if since < 0 else APART_S - since)  # below 0, the clock was set back
        with writing(folder):
            last.touch()
        yield
    finally:
        if last.exists():
            os.utime(last, (_now(), _now()))
        lock.release()


def _now() -> float:
    return time.time()


def _sleep(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)
