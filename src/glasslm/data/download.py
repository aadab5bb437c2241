"""Fetching from the web: bounded in bytes and in time; and files of known size and hash, never a bad one in place.

Every download goes through here, so that GLASSLM_MIRROR can stand in for the servers of all of them.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from glasslm.data.cache import keep
from glasslm.errors import InputError
from glasslm.text import Say

if TYPE_CHECKING:
    from requests import Session

# Seconds that each attempt may take before it has to be faster than SLOWEST bytes a second; between attempts, the pause
# doubles from PAUSE seconds. HURRIED is for a download that nobody asked for by name.
PATIENT: Sequence[float] = (15.0, 15.0, 30.0)
HURRIED: Sequence[float] = (4.0,)
PAUSE = 1.0
SLOWEST = 20_000


class DownloadError(InputError):
    """Something could not be downloaded; the message ends in how to supply it by hand."""


@dataclass(frozen=True)
class Remote:
    """A file on the web, its size in bytes and its hash."""

    url: str
    size: int
    sha256: str

    def matches(self, body: bytes) -> bool:
        return len(body) == self.size and hashlib.sha256(body).hexdigest() == self.sha256

    @property
    def address(self) -> str:
        """Where to ask for it: the same path on GLASSLM_MIRROR, where that is set."""
        return mirrored(self.url)


class Answer(NamedTuple):
    """What a server says: at most a little more of the body than was wanted."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def mirrored(url: str) -> str:
    """`url`, or the same path and query on GLASSLM_MIRROR, where that is set."""
    mirror = os.environ.get("GLASSLM_MIRROR")
    return (
        mirror.rstrip("/") + urlsplit(url)._replace(scheme="", netloc="").geturl()
        if mirror
        else url
    )


def download(remote: Remote, target: Path, say: Say, attempts: Sequence[float] = PATIENT) -> None:
    """Make `target` hold `remote`, asking for it only if it does not yet. Raises DownloadError after `attempts`."""
    if target.is_file():
        if target.stat().st_size == remote.size and remote.matches(target.read_bytes()):
            return
        say(
            f"{target} is damaged (its sha256 is not {remote.sha256[:12]}...): downloading it again"
        )
    say(f"downloading {remote.address} ({remote.size / 1e6:.1f} MB)")
    reason = ""
    for i, patience in enumerate(attempts):
        if i:
            pause = PAUSE * 2 ** (i - 1)
            say(f"{reason}; trying again in {pause:.0f} s")
            time.sleep(pause)
        try:
            status, _, body = receive(remote.address, remote.size, patience)
            if status >= 400:
                raise OSError(f"the server answers {status}")
        except OSError as error:
            reason = str(error)
            continue
        if remote.matches(body):
            keep(target, body)
            return
        reason = _mismatch(remote, body)
    raise DownloadError(
        f"{remote.address} could not be downloaded: {reason}. To supply it by hand, put the file of {remote.url} "
        f"({remote.size:,} bytes, sha256 {remote.sha256}) at {target}"
    )


def _mismatch(remote: Remote, body: bytes) -> str:
    if len(body) != remote.size:
        size = f"more than {remote.size:,}" if len(body) > remote.size else f"{len(body):,}"
        return f"the answer has {size} bytes instead of {remote.size:,}"
    return f"the answer has sha256 {hashlib.sha256(body).hexdigest()} instead of {remote.sha256}"


def receive(
    url: str,
    most: int,
    patience: float,
    session: Session | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """The answer to a GET, of at most a little over `most` bytes; OSError when it fails or is slow.

    In a thread, because no time-out of a socket bounds the sum of name lookup, every address tried, and a body that
    comes byte by byte. The thread is left behind when it is too slow, and ends by its own time-out.
    """
    body = bytearray()
    done: Future[tuple[int, Mapping[str, str]]] = Future()
    given_up = threading.Event()

    def work() -> None:
        try:
            done.set_result(_read_into(body, url, most, patience, given_up, session, headers or {}))
        except Exception as error:  # handed to the caller's thread
            done.set_exception(error)

    started = time.monotonic()
    threading.Thread(target=work, daemon=True, name="download").start()
    while True:
        try:
            error = done.exception(timeout=0.1)
        except TimeoutError:  # of waiting
            elapsed = time.monotonic() - started
            if elapsed >= patience and len(body) < SLOWEST * elapsed:
                given_up.set()
                raise OSError(f"{len(body):,} bytes came within {elapsed:.0f} s") from None
            continue
        if error:
            raise error
        return Answer(*done.result(), bytes(body))


def _read_into(
    body: bytearray,
    url: str,
    most: int,
    patience: float,
    given_up: threading.Event,
    session: Session | None,
    headers: Mapping[str, str],
) -> tuple[int, Mapping[str, str]]:
    """Status and headers; the body goes where the caller can see how much has come."""
    import requests

    with nullcontext(session) if session else requests.Session() as opened:
        opened.max_redirects = 5
        headers = {
            "Accept-Encoding": "identity",
            **headers,
        }  # a compressed answer could grow without bound
        try:
            with opened.get(url, stream=True, timeout=patience + 1, headers=headers) as answer:
                for block in answer.iter_content(8192):
                    body += block
                    if len(body) > most or given_up.is_set():
                        break
                return answer.status_code, answer.headers
        except requests.RequestException as error:
            raise OSError(_plainly(error)) from error


def _plainly(error: Exception) -> str:
    """The innermost reason of a requests error, without its object addresses."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return str(error) or type(error).__name__
