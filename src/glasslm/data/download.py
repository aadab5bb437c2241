"""Download files of known size and hash, within bounds on bytes and time.

A file gets its name only when its size and hash are right. Every download goes through this module,
so GLASSLM_MIRROR can replace all servers.
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

from glasslm.data.cache import write_cached
from glasslm.errors import InputError, raise_if_exhausted
from glasslm.text import Notify

if TYPE_CHECKING:
    from requests import Session

# Each entry is one attempt: the seconds after which it fails if it is slower than
# MIN_BYTES_PER_S. The pause between attempts doubles from RETRY_PAUSE_S.
PATIENT_TIMEOUTS_S: Sequence[float] = (15.0, 15.0, 30.0)
HURRIED_TIMEOUTS_S: Sequence[float] = (4.0,)  # for a download that was not requested by name
RETRY_PAUSE_S = 1.0
MIN_BYTES_PER_S = 20_000


class DownloadError(InputError):
    """A download failed; the message ends with how to supply the file by hand."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the web: address, size in bytes, hash."""

    url: str
    size: int
    sha256: str

    def matches(self, body: bytes) -> bool:
        return len(body) == self.size and hashlib.sha256(body).hexdigest() == self.sha256

    @property
    def address(self) -> str:
        """The address to request: the same path on GLASSLM_MIRROR, where that is set."""
        return mirror_url(self.url)


class Response(NamedTuple):
    """Response of a server; the body is cut a little above the requested maximum."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def mirror_url(url: str) -> str:
    """`url`, or the same path and query on GLASSLM_MIRROR, where that is set."""
    mirror = os.environ.get("GLASSLM_MIRROR")
    if not mirror:
        return url
    return mirror.rstrip("/") + urlsplit(url)._replace(scheme="", netloc="").geturl()


def download_file(
    remote: RemoteFile,
    target: Path,
    notify: Notify,
    timeouts_s: Sequence[float] = PATIENT_TIMEOUTS_S,
) -> None:
    """Make `target` hold `remote`; downloads only if it does not yet.

    There is one attempt for each of `timeouts_s`. Raises DownloadError after the last one.
    """
    if target.is_file():
        if target.stat().st_size == remote.size and remote.matches(target.read_bytes()):
            return
        notify(
            f"{target} is damaged (its sha256 is not {remote.sha256[:12]}...): downloading it again"
        )
    notify(f"downloading {remote.address} ({remote.size / 1e6:.1f} MB)")
    reason = ""
    for attempt, timeout_s in enumerate(timeouts_s):
        if attempt:
            pause_s = RETRY_PAUSE_S * 2 ** (attempt - 1)
            notify(f"{reason}; trying again in {pause_s:.0f} s")
            time.sleep(pause_s)
        try:
            status, _, body = fetch_url(remote.address, remote.size, timeout_s)
            if status >= 400:
                raise OSError(f"the server answers {status}")
        except OSError as error:
            raise_if_exhausted(error, remote.address)
            reason = str(error)
            continue
        if remote.matches(body):
            write_cached(target, body)
            return
        reason = _describe_mismatch(remote, body)
    raise DownloadError(
        f"{remote.address} could not be downloaded: {reason}. To supply it by hand, put the file "
        f"of {remote.url} ({remote.size:,} bytes, sha256 {remote.sha256}) at {target}"
    )


def _describe_mismatch(remote: RemoteFile, body: bytes) -> str:
    if len(body) != remote.size:
        size = f"more than {remote.size:,}" if len(body) > remote.size else f"{len(body):,}"
        return f"the answer has {size} bytes instead of {remote.size:,}"
    return f"the answer has sha256 {hashlib.sha256(body).hexdigest()} instead of {remote.sha256}"


def fetch_url(
    url: str,
    max_bytes: int,
    timeout_s: float,
    session: Session | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response to a GET, with a body of little more than `max_bytes` bytes at most.

    Raises OSError when the request fails or is slow. The request runs in a thread, because the
    timeout of a socket does not bound the sum of name lookup, every address tried, and a body that
    comes byte by byte. A thread that is too slow is abandoned and ends at its own timeout.
    """
    body = bytearray()
    result: Future[tuple[int, Mapping[str, str]]] = Future()
    cancelled = threading.Event()

    def work() -> None:
        try:
            result.set_result(
                _read_into(body, url, max_bytes, timeout_s, cancelled, session, headers or {})
            )
        except Exception as error:  # It is raised again in the thread of the caller.
            result.set_exception(error)

    started_s = time.monotonic()
    threading.Thread(target=work, daemon=True, name="download").start()
    while True:
        try:
            error = result.exception(timeout=0.1)
        except TimeoutError:  # of waiting for the result
            elapsed_s = time.monotonic() - started_s
            if elapsed_s >= timeout_s and len(body) < MIN_BYTES_PER_S * elapsed_s:
                cancelled.set()
                raise OSError(f"{len(body):,} bytes came within {elapsed_s:.0f} s") from None
            continue
        if error:
            raise error
        return Response(*result.result(), bytes(body))


def _read_into(
    body: bytearray,
    url: str,
    max_bytes: int,
    timeout_s: float,
    cancelled: threading.Event,
    session: Session | None,
    headers: Mapping[str, str],
) -> tuple[int, Mapping[str, str]]:
    """Status and headers; appends the response to `body`, whose length the caller watches."""
    import requests

    with nullcontext(session) if session else requests.Session() as opened:
        opened.max_redirects = 5
        # A compressed response could grow without bound.
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            with opened.get(url, stream=True, timeout=timeout_s + 1, headers=headers) as response:
                for block in response.iter_content(8192):
                    body += block
                    if len(body) > max_bytes or cancelled.is_set():
                        break
                return response.status_code, response.headers
        except requests.RequestException as error:
            raise OSError(_innermost_reason(error)) from error


def _innermost_reason(error: Exception) -> str:
    """The first cause of an error of requests: its message has no object addresses."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return str(error) or type(error).__name__
