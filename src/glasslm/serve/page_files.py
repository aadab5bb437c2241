"""The files of the microscope's page, with headers that keep a browser at this origin.

The files are static: they hold nothing of a run, and need no key.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered by 304
}


def page_routes() -> list[BaseRoute]:
    """The routes of the page: `/`, and its modules and style under `/page/`."""
    return [
        Route("/", _send_index, methods=["GET"]),
        Route("/page/{name:path}", _send_file, methods=["GET"]),
    ]


@cache
def page_files() -> dict[str, bytes]:
    """The page's files by their path: `index.html`, `views/read.js`."""
    files: dict[str, bytes] = {}
    folders: list[tuple[str, Any]] = [("", resources.files("glasslm.serve") / "page")]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            elif entry.name.endswith(tuple(MEDIA_TYPES)):
                files[prefix + entry.name] = entry.read_bytes()
    return files


@cache
def compressed_file(name: str) -> bytes:
    """A file of the page as gzip: a quarter of its bytes."""
    return gzip.compress(page_files()[name], mtime=0)


async def _send_index(request: Request) -> Response:
    """GET /."""
    return _response(request, "index.html")


async def _send_file(request: Request) -> Response:
    """GET /page/NAME."""
    return _response(request, request.path_params["name"])


def _response(request: Request, name: str) -> Response:
    """The file, or 304 where the browser has it. Raises HTTPException 404."""
    if name not in page_files():
        raise HTTPException(404)
    is_compressed = "gzip" in request.headers.get("accept-encoding", "")
    content = compressed_file(name) if is_compressed else page_files()[name]
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": etag, "Vary": "Accept-Encoding"}
    if is_compressed:
        headers["Content-Encoding"] = "gzip"
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    media_type = MEDIA_TYPES[name[name.rindex(".") :]]
    return Response(content, media_type=media_type, headers=headers)
