"""Unpacking archives that come from elsewhere: nothing lands outside the folder, and a marker says when all is there.

tar members go through Python's "data" filter (PEP 706), zip members through a check of their names; what would land or
point outside is refused before it is written.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from pam_espnet.data.download import check_space
from pam_espnet.errors import DataError
from pam_espnet.fileio import write_text

MARKER = ".completed"
ANEW = "delete the file and run this again"
# How the standard library says that an archive ends too early or is damaged.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError)


def is_complete(folder: str | Path, key: str | None = None) -> bool:
    """Whether ``folder`` was unpacked to the end, from the archive that ``key`` stands for (None: from any)."""
    marker = Path(folder) / MARKER
    return marker.is_file() and (key is None or marker.read_text(encoding="utf-8").strip() == key)


def mark_complete(folder: str | Path, key: str) -> None:
    """Note that all of ``folder`` is there; ``key`` tells what it was made from (a checksum)."""
    write_text(Path(folder) / MARKER, f"{key}\n")


@contextmanager
def fresh_folder(folder: str | Path, key: str) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``; when the block ends well, mark it complete and put it in its place.

    What a killed run left behind is removed; an older ``folder`` is replaced at the very end.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(stale)
    tmp = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    tmp.mkdir()
    try:
        yield tmp
        mark_complete(tmp, key)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def extract_tar(archive: str | Path, folder: str | Path, *, stream: IO[bytes] | None = None, limit: int = 0) -> None:
    """Unpack a tar archive, compressed or not, into ``folder``.

    Args:
        archive: the file; with ``stream``, the name that errors give.
        folder: made if it is not there; files in it are overwritten.
        stream: read the tar from here instead.
        limit: refuse an archive that unpacks to more bytes; 0 sets none.

    Raises:
        DataError: an unsafe member, an archive that is damaged or cut short, or no room.
    """
    from tqdm import tqdm

    if stream is not None:
        with _explained(archive), tarfile.open(fileobj=stream, mode="r|*") as tar:
            _extract_members(archive, tar, folder, limit)
        return
    size = Path(archive).stat().st_size
    check_space(folder, size, f"what is in {archive}")  # at least: audio does not grow much
    with (
        _explained(archive),
        open(archive, "rb") as file,
        tqdm.wrapattr(file, "read", total=size, desc=f"unpack {Path(archive).name}") as watched,
        tarfile.open(fileobj=cast(IO[bytes], watched), mode="r:*") as tar,
    ):
        _extract_members(archive, tar, folder, limit)
        while tar.fileobj is not None and tar.fileobj.read(1 << 20):  # to the end: the checksum of gzip stands there
            pass


def _extract_members(archive: str | Path, tar: tarfile.TarFile, folder: str | Path, limit: int) -> None:
    total = 0
    for member in tar:
        total += member.size
        _check_limit(archive, total, limit)
        tar.extract(member, folder, filter="data")


def extract_zip(archive: str | Path, folder: str | Path, *, limit: int = 0) -> None:
    """Unpack a zip archive into ``folder``; arguments and errors as of ``extract_tar``."""
    with _explained(archive), zipfile.ZipFile(archive) as file:
        members = file.infolist()
        total = sum(member.file_size for member in members)
        _check_limit(archive, total, limit)
        check_space(folder, total, f"what is in {archive}")
        for member in members:
            name = PurePosixPath(member.filename)
            outside = name.is_absolute() or ".." in name.parts or "\\" in member.filename
            if outside or stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(archive, f"unsafe member {member.filename!r}", hint=ANEW)
            if member.flag_bits & 1:
                raise DataError(archive, f"member {member.filename!r} is encrypted", hint=ANEW)
        for member in members:
            file.extract(member, folder)


def _check_limit(archive: str | Path, total: int, limit: int) -> None:
    if limit and total > limit:
        raise DataError(archive, f"unpacks to more than {limit:,} bytes", hint="this is another archive; delete it")


@contextmanager
def _explained(archive: str | Path) -> Iterator[Any]:
    """Turn the errors of tarfile and zipfile into a ``DataError`` about ``archive``."""
    try:
        yield
    except tarfile.FilterError as error:
        raise DataError(archive, f"cannot be unpacked safely: {error}", hint=ANEW) from error
    except _DAMAGED as error:
        message = f"cannot be unpacked, it is damaged or cut short ({error or type(error).__name__})"
        raise DataError(archive, message, hint=ANEW) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(archive, "the disk is full", hint="make room, and run the same command again") from error
        if error.errno is None:  # gzip and bzip2 complain without a number
            raise DataError(archive, f"cannot be unpacked, it is damaged ({error})", hint=ANEW) from error
        raise
