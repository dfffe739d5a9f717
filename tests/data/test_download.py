"""Fetching files, against a server on this machine that cuts connections, states wrong sizes and ignores ranges."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pam_espnet.data import download
from pam_espnet.data.download import RemoteFile, check_file, check_space, fetch, parse_checksum
from pam_espnet.errors import ConfigError, DataError, PamError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``CONTENT``; the first word of a path chooses how.

    ``good``; ``cut``: every answer ends after 400,000 bytes; ``plain``: no ranges; ``other``: other bytes of the same
    size; ``busy``: status 503 once, then good; anything else: 404.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []  # (first word of the path, Range header)

    def url(self, how: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{how}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        how, wanted = self.path.split("/")[1], self.headers.get("Range", "")
        again = ("busy", wanted) in self.server.asked
        self.server.asked.append((how, wanted))
        if how not in ("good", "cut", "plain", "other", "busy") or (how == "busy" and not again):
            self.send_error(503 if how == "busy" else 404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and how != "plain" else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = (CONTENT[::-1] if how == "other" else CONTENT)[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        with suppress(BrokenPipeError):  # some clients have seen enough
            self.wfile.write(body[:400_000] if how == "cut" else body)
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def remote(*urls: str, size: int | None = len(CONTENT)) -> RemoteFile:
    return RemoteFile("file.bin", urls, MD5, size)


def test_fetched_checked_and_kept(server: Server, tmp_path: Path) -> None:
    path = fetch(remote(server.url("good")), tmp_path / "new/folder")
    assert path == tmp_path / "new/folder/file.bin" and path.read_bytes() == CONTENT
    assert fetch(remote(server.url("good")), tmp_path / "new/folder") == path
    assert server.asked == [("good", "")] and not list(path.parent.glob("*.part"))


def test_lost_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    path = fetch(remote(server.url("cut")), tmp_path, wait=0.0)
    assert path.read_bytes() == CONTENT
    assert server.asked == [("cut", ""), ("cut", "bytes=400000-"), ("cut", "bytes=800000-")]


def test_killed_run_is_resumed_from_another_mirror(server: Server, tmp_path: Path) -> None:
    with pytest.raises(PamError, match="the connection was lost after 400000 of 1048576 bytes"):
        fetch(remote(server.url("cut")), tmp_path, attempts=1)
    assert (tmp_path / "file.bin.part").stat().st_size == 400_000 and not (tmp_path / "file.bin").exists()
    assert fetch(remote(server.url("good")), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("good", "bytes=400000-")


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(remote(server.url("plain")), tmp_path).read_bytes() == CONTENT


def test_a_whole_part_needs_its_name_only(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(remote(server.url("good")), tmp_path).read_bytes() == CONTENT


def test_too_long_a_part_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(remote(server.url("good")), tmp_path, wait=0.0).read_bytes() == CONTENT


def test_mirrors_in_order_and_a_busy_one_is_tried_again(server: Server, tmp_path: Path) -> None:
    path = fetch(remote(server.url("gone"), server.url("busy")), tmp_path, wait=0.0)
    assert path.read_bytes() == CONTENT
    assert [how for how, _ in server.asked] == ["gone", "busy", "busy"]


def test_mirror_with_another_file_is_skipped(server: Server, tmp_path: Path) -> None:
    assert fetch(remote(server.url("other"), server.url("good")), tmp_path).read_bytes() == CONTENT


def test_wrong_file_everywhere_names_both_checksums(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fetch(remote(server.url("other")), tmp_path)
    assert MD5[4:] in str(caught.value) and hashlib.md5(CONTENT[::-1]).hexdigest() in str(caught.value)
    assert list(tmp_path.glob("file*")) == []


def test_wrong_size_is_refused_before_it_is_fetched(server: Server, tmp_path: Path) -> None:
    with pytest.raises(PamError, match="offers 1048576 bytes, 7 were expected"):
        fetch(remote(server.url("good"), size=7), tmp_path)


def test_a_damaged_file_that_is_there_is_not_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="delete it"):
        fetch(remote(server.url("good")), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine" and not server.asked


def test_nobody_there_lists_every_mirror(server: Server, tmp_path: Path) -> None:
    urls = (server.url("gone"), "http://127.0.0.1:9/file.bin")
    with pytest.raises(PamError) as caught:
        fetch(remote(*urls), tmp_path, attempts=2, wait=0.0)
    assert all(url in str(caught.value) for url in urls) and "404" in str(caught.value)


def test_too_little_space(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(DataError, match=r"needs .* GB are free"):
        fetch(remote(server.url("good")), tmp_path)
    with pytest.raises(DataError, match="free some space"):
        check_space(tmp_path / "not/yet", 5 << 30, "it")
    assert not server.asked


@pytest.mark.parametrize("checksum", ["md5:12", "sha1:" + "0" * 40, "0" * 32, "md5:" + "G" * 32])
def test_what_is_no_checksum(checksum: str) -> None:
    with pytest.raises(ConfigError, match="is no checksum"):
        parse_checksum(checksum)


def test_addresses_are_http() -> None:
    with pytest.raises(ConfigError, match="http"):
        RemoteFile("x", ("file:///etc/passwd",), MD5)
    with pytest.raises(ConfigError, match="no address"):
        RemoteFile("x", (), MD5)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    check_file(tmp_path / "x", "sha256:" + hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(DataError, match="SHA-256"):
        check_file(tmp_path / "x", "sha256:" + "0" * 64)
