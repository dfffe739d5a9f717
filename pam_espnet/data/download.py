"""Files over HTTP: resumed where a transfer stopped, mirrors tried in order, checked before they get their name.

FOLDER/<name>         whole and checked
FOLDER/<name>.part    what has arrived so far; the next call continues it
"""

import hashlib
import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pam_espnet.errors import ConfigError, DataError, PamError
from pam_espnet.fileio import DISK_ERRORS, exclusive

CHUNK = 1 << 18  # bytes read at once
SPARE_BYTES = 1 << 28  # left free on the disk, for whatever else is written there
MAX_WAIT = 60.0  # seconds between two rounds over the mirrors
TIMEOUT = 60.0  # seconds without a byte after which a connection counts as lost
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may be gone in a while


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch."""

    name: str  # in the folder
    urls: Sequence[str]  # in the order in which they are tried
    checksum: str  # ``md5:<hex>`` or ``sha256:<hex>``
    size: int | None = None  # bytes, where they are known

    def __post_init__(self) -> None:
        """Raises ConfigError: no address, one that is not HTTP, or a checksum of an unknown kind."""
        if not self.urls:
            raise ConfigError(f"{self.name}: no address to fetch it from")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"{self.name}: {url!r} is not an http:// or https:// address")
        parse_checksum(self.checksum)


class _Refused(Exception):
    """A mirror's final answer: it is not tried again."""


def parse_checksum(checksum: str) -> tuple[str, str]:
    """``"md5:<hex>"`` as (algorithm, hex digits).
    Raises ConfigError: another algorithm than MD5 and SHA-256, or not their number of hex digits."""
    kind, _, digits = checksum.partition(":")
    if {"md5": 32, "sha256": 64}.get(kind) != len(digits) or set(digits) - set("0123456789abcdef"):
        raise ConfigError(f"{checksum!r} is no checksum; it looks like md5:<32 hex digits> or sha256:<64 hex digits>")
    return kind, digits


def check_file(path: str | Path, checksum: str, *, what: str = "", hint: str = "delete it and run this again") -> None:
    """Compare a file with its checksum, ``md5:<hex>`` or ``sha256:<hex>``.
    Raises DataError: they differ: the file is not ``what``; names what was expected and what was found."""
    kind, wanted = parse_checksum(checksum)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    if found != wanted:
        name = {"md5": "MD5", "sha256": "SHA-256"}[kind]
        size = Path(path).stat().st_size
        message = f"is not {what or 'the file that was asked for'}\n  expected {name} {wanted}\n"
        raise DataError(path, f"{message}  got      {name} {found} ({size} bytes)", hint=hint)


def check_space(folder: str | Path, needed: int, what: str) -> None:
    """Check that ``needed`` bytes (and a little more) are free where ``folder`` is or will be.
    Raises DataError: they are not."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed + SPARE_BYTES:
        message = f"{what} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise DataError(folder, message, hint="free some space, or name a folder on another disk")


def fetch(remote: RemoteFile, folder: str | Path, *, attempts: int = 6, wait: float = 2.0) -> Path:
    """Fetch a file into ``folder`` unless it is there; return its path. Either way it is checked.

    Args:
        remote: what to fetch.
        folder: made if it is not there.
        attempts: rounds over the mirrors; one that lost the connection continues where it stopped.
        wait: seconds before the second round; doubles from round to round, up to a minute.

    Raises:
        DataError: the file does not have its checksum, or too little disk space.
        PamError: no mirror delivered it; lists the answer of each.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    with exclusive(folder / f".{remote.name}.lock"):
        if target.exists():
            logging.info("%s is there; checking it", target)
            check_file(target, remote.checksum, what=remote.name)
            return target
        if remote.size is not None:
            there = part.stat().st_size if part.exists() else 0
            check_space(folder, max(0, remote.size - there), remote.name)
        _from_mirrors(remote, part, attempts, wait)
        os.replace(part, target)
    return target


def _from_mirrors(remote: RemoteFile, part: Path, attempts: int, wait: float) -> None:
    """Fill and check ``part``, asking one mirror after another, several times."""
    answers = dict.fromkeys(remote.urls, "not asked")
    mirrors, wrong = list(remote.urls), None
    for attempt in range(attempts):
        if attempt and mirrors:
            pause = min(wait * 2 ** (attempt - 1), MAX_WAIT)
            logging.info("%s: next attempt in %.0f s", remote.name, pause)
            time.sleep(pause)
        for url in list(mirrors):
            try:
                _transfer(url, part, remote)
                check_file(part, remote.checksum, what=remote.name, hint="try another mirror, or another day")
                return
            except DataError as error:  # whole, and another file: nothing of it is kept
                part.unlink(missing_ok=True)
                mirrors.remove(url)
                answers[url], wrong = "delivered another file", error
            except _Refused as error:
                mirrors.remove(url)
                answers[url] = str(error)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:  # no mirror can help
                    message = f"cannot be written: {error.strerror}"
                    raise DataError(part, message, hint="free some space, run the same command again") from error
                answers[url] = str(error) or type(error).__name__
            logging.warning("%s from %s: %s", remote.name, url, answers[url])
    if wrong is not None:
        raise wrong
    listed = "".join(f"\n  {url}: {answer}" for url, answer in answers.items())
    raise PamError(
        f"{remote.name} could not be fetched:{listed}\n  -> check the network and run the same command again: "
        f"it continues where it stopped. Or fetch the file in another way and put it at {part.with_suffix('')}"
    )


def _transfer(url: str, part: Path, remote: RemoteFile) -> None:
    """Append what ``part`` lacks; returns when it has as many bytes as the server states.
    Raises _Refused: a status or a size that waiting does not change; OSError: every other failure."""
    from tqdm import tqdm

    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "pam-espnet", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing follows: it is whole, or of another file
            if remote.size is not None and start == remote.size:
                return
            part.unlink()
            raise OSError("what was there does not fit; starting again") from error
        if error.code in AGAIN:
            raise OSError(f"HTTP status {error.code}") from error
        raise _Refused(f"HTTP status {error.code} ({error.reason})") from error
    with response:
        resumed = response.status == 206
        if resumed and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise OSError("the server sent another piece than the one asked for; starting again")
        start = start if resumed else 0  # a server that knows no ranges sends everything
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        if remote.size is not None and total is not None and total != remote.size:
            raise _Refused(f"offers {total} bytes, {remote.size} were expected")
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total or remote.size, initial=start, unit="B", unit_scale=True, desc=remote.name) as bar,
        ):
            while block := response.read(CHUNK):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise OSError(f"the connection was lost after {part.stat().st_size} of {total} bytes")
