"""A server on loopback that speaks the part of the Hugging Face hub's API that reading a dataset repository takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1" * 40


class DatasetHub(ThreadingHTTPServer):
    """One repository, ``me/mine``, with the files of a folder at one commit.

    Attributes:
        requests: method and path of every request.
        budget: bytes of files that are sent before the connection breaks; None: all.
        token: what a request must bring, or None.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.budget: int | None = None
        self.token: str | None = None

    @property
    def address(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def entry(self, path: Path) -> dict[str, Any]:
        """A file or folder as the API lists it."""
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
        content = path.read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    server: DatasetHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes = b"") -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.send_json({"error": "Invalid username or password."}, 401)
        elif found := re.fullmatch(r"/datasets/me/mine/resolve/([^/]+)/(.+)", path):
            self.send_file(self.server.folder / found[2], found[1])
        elif not path.startswith("/api/datasets/me/mine"):
            self.send_json({"error": "Repository not found"}, 404, "RepoNotFound")
        elif (found := re.search(r"/revision/([^/]+)", path)) and found[1] not in ("main", COMMIT):
            self.send_json({"error": f"Invalid rev id: {found[1]}"}, 404, "RevisionNotFound")
        elif "/paths-info/" in path:
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            files = [self.server.folder / name for name in wanted]
            self.send_json([self.server.entry(file) for file in files if file.exists()])
        elif "/tree/" in path:
            folder = self.server.folder / re.sub(r".*/tree/[^/]+/?", "", path)
            recursive = parse_qs(url.query).get("recursive") == ["true"]
            there = sorted(folder.rglob("*") if recursive else folder.glob("*"))
            self.send_json(
                [self.server.entry(file) for file in there], 200 if folder.is_dir() else 404, "EntryNotFound"
            )
        else:
            siblings = [{"rfilename": entry.relative_to(self.server.folder).as_posix()} for entry in self.files()]
            self.send_json(
                {
                    "id": "me/mine",
                    "sha": COMMIT,
                    "private": False,
                    "gated": False,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "disabled": False,
                }
            )

    def files(self) -> list[Path]:
        return sorted(file for file in self.server.folder.rglob("*") if file.is_file())

    def send_json(self, value: Any, status: int = 200, code: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code and status >= 400:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, file: Path, revision: str) -> None:
        if not file.is_file():
            self.send_json({"error": "Entry not found"}, 404, "EntryNotFound")
            return
        content, status = file.read_bytes(), 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            where = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", where)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.budget is not None:
            content = content[: self.server.budget]
            self.server.budget -= len(content)
        self.wfile.write(content)
        if self.server.budget == 0:
            self.close_connection = True
            self.connection.close()


@contextmanager
def dataset_hub(folder: Path) -> Iterator[DatasetHub]:
    """The server, while the block runs."""
    with DatasetHub(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
