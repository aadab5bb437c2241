"""A server that answers as the hub of Hugging Face does, as far as the libraries ask, and that can lie."""

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
    """A data set: its files, what the hub makes of its card, and who is let in."""

    files: dict[str, bytes]
    card: dict[str, Any] = field(default_factory=dict)
    gated: int = 0  # the status with which its files are refused

    def entry(self, path: str) -> dict[str, Any]:
        oid = hashlib.sha1(self.files[path]).hexdigest()
        return {"type": "file", "path": path, "size": len(self.files[path]), "oid": oid}


@dataclass
class Hub:
    """The repositories by id, what was asked for, and `trouble`, which may answer in place of the server."""

    repositories: dict[str, Repository]
    asked: list[str] = field(default_factory=list)
    trouble: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
    address: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not hub.trouble(self):
                self._answer()

        do_HEAD = do_POST = do_GET

        def _answer(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path == "/api/datasets":
                word = parse_qs(url.query)["search"][0]
                return self.send_json([{"id": name} for name in hub.repositories if word in name])
            found = re.fullmatch(
                r"/(api/)?datasets/([^/]+/[^/]+)(?:/(auth-check|revision|tree|paths-info|resolve)/?([^/]*)/?(.*))?",
                path,
            )
            if not found or found[2] not in hub.repositories:
                return self.send(404, {"X-Error-Code": "RepoNotFound"})
            name, repository, what, rest = (
                found[2],
                hub.repositories[found[2]],
                found[3],
                found[5] or "",
            )
            if what == "auth-check" and repository.gated:
                return self.send(repository.gated, {"X-Error-Code": "GatedRepo"})
            if what in (None, "revision"):
                return self.send_json(self._info(name, repository))
            if what == "tree":
                return self._tree(repository, rest)
            if what == "paths-info":
                wanted = self._paths()
                return self.send_json(
                    [repository.entry(path) for path in wanted if path in repository.files]
                )
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
