"""What servers on loopback have in common that speak parts of the Hugging Face hub's API."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """A server on a free port.

    Attributes:
        token: what opens what is private.
        requests: method, address and range of every request.
        breaks: bytes of files that pass, in either direction, before each break of a connection; then all pass.
    """

    daemon_threads = True
    token: str | None = None

    def __init__(self, handler: type[HubHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: list[str] = []
        self.breaks: list[int] = []

    @property
    def address(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away."""


class HubHandler(BaseHTTPRequestHandler):
    """Requests of a ``HubServer``; ``answer`` is a subclass's."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.begin(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.begin(self.rfile.read(int(self.headers["Content-Length"])))

    def begin(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        self.answer(path, body)

    def answer(self, path: str, body: bytes) -> None:
        raise NotImplementedError

    @property
    def knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def send_json(self, value: Any, status: int = 200, code: str = "", headers: dict[str, str] | None = None) -> None:
        """``code``: of the hub's error, for its client."""
        codes = {"X-Error-Code": code} if code else {}
        content = json.dumps(value).encode()
        self.send(content, status, {"Content-Type": "application/json", **codes, **(headers or {})}, len(content))

    def send_file(self, content: bytes, headers: dict[str, str], breaks: bool = True) -> None:
        """A file, or the range of it that is asked for; ``breaks``: the connection may."""
        status, size = 200, len(content)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or size - 1), size - 1)
            content, status = content[first : last + 1], 206
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        passing = self.passing(len(content)) if breaks and self.command != "HEAD" else len(content)
        self.send(content, status, {**headers, "Accept-Ranges": "bytes"}, passing)

    def send(self, content: bytes, status: int, headers: dict[str, str], passing: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:passing])
            if passing < len(content):
                self.hang_up()

    def passing(self, size: int) -> int:
        """How many of ``size`` bytes pass before the connection breaks."""
        if not self.server.breaks:
            return size
        passing = min(size, self.server.breaks[0])
        self.server.breaks[0] -= passing
        if passing < size:
            del self.server.breaks[0]
        return passing

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()


@contextmanager
def running[S: HubServer](server: S) -> Iterator[S]:
    """``server``, answering while the block runs."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
