"""A local server that imitates the Hugging Face hub for the libraries, and can misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """A dataset: its files, its parsed card, and whether access is gated."""

    files: dict[str, bytes]
    card: dict[str, Any] = field(default_factory=dict)
    gated: int = 0  # the HTTP status that refuses its files

    def entry(self, path: str) -> dict[str, Any]:
        oid = hashlib.sha1(self.files[path]).hexdigest()
        return {"type": "file", "path": path, "size": len(self.files[path]), "oid": oid}


@dataclass
class Hub:
    """Repositories by id, the requests so far, and `interfere`, which may answer instead."""

    repositories: dict[str, Repository]
    requests: list[str] = field(default_factory=list)
    interfere: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
    address: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not hub.interfere(self):
                self._answer()

        do_HEAD = do_POST = do_GET

        def _answer(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path == "/api/datasets":
                word = parse_qs(url.query)["search"][0]
                return self.send_json([{"id": name} for name in hub.repositories if word in name])
            match = re.fullmatch(
                r"/(api/)?datasets/([^/]+/[^/]+)(?:/(auth-check|revision|tree|paths-info|resolve)/?([^/]*)/?(.*))?",
                path,
            )
            if not match or match[2] not in hub.repositories:
                return self.send(404, {"X-Error-Code": "RepoNotFound"})
            name, endpoint, rest = match[2], match[3], match[5] or ""
            repository = hub.repositories[name]
            if endpoint == "auth-check" and repository.gated:
                return self.send(repository.gated, {"X-Error-Code": "GatedRepo"})
            if endpoint in (None, "revision"):
                return self.send_json(self._info(name, repository))
            if endpoint == "tree":
                return self._tree(repository, rest)
            if endpoint == "paths-info":
                paths = [path for path in self._paths() if path in repository.files]
                return self.send_json([repository.entry(path) for path in paths])
            if repository.gated:
                code = {"X-Error-Code": "GatedRepo"}
                return self.send(repository.gated, code)
            if rest not in repository.files:
                return self.send(404, {"X-Error-Code": "EntryNotFound"})
            return self.send_file(repository.files[rest])

        def _info(self, name: str, repository: Repository) -> dict[str, Any]:
            siblings = [
                {"rfilename": path, "size": len(body), "blobId": repository.entry(path)["oid"]}
                for path, body in repository.files.items()
            ]
            info = {
                "id": name,
                "sha": SHA,
                "cardData": repository.card,
                "siblings": siblings,
                "private": False,
            }
            return info | ({"gated": "manual"} if repository.gated else {})

        def _tree(self, repository: Repository, folder: str) -> None:
            inside = [
                path for path in repository.files if not folder or path.startswith(f"{folder}/")
            ]
            entries = {path: repository.entry(path) for path in inside}
            if "recursive=True" not in self.path and "recursive=true" not in self.path:
                depth = folder.count("/") + 1 if folder else 0
                for path in inside:
                    if path.count("/") > depth:
                        del entries[path]
                        above = "/".join(path.split("/")[: depth + 1])
                        entries[above] = {
                            "type": "directory",
                            "path": above,
                            "size": 0,
                            "oid": "0" * 40,
                        }
            if folder and not entries:
                return self.send(404, {"X-Error-Code": "EntryNotFound"})
            return self.send_json(list(entries.values()))

        def _paths(self) -> list[str]:
            body = self.body.decode()
            return (
                json.loads(body)["paths"]
                if body.startswith("{")
                else parse_qs(body).get("paths", [])
            )

        def send_file(self, body: bytes) -> None:
            tag = f'"{hashlib.sha1(body).hexdigest()}"'
            headers = {"ETag": tag, "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if not part:
                return self.send(200, headers, body)
            end = min(int(part[2] or len(body) - 1), len(body) - 1)
            piece = body[int(part[1]) : end + 1]
            return self.send(
                206, headers | {"Content-Range": f"bytes {part[1]}-{end}/{len(body)}"}, piece
            )

        def send_json(self, value: Any) -> None:
            self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

        def send(
            self, status: int, headers: dict[str, str], body: bytes = b"", length: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
