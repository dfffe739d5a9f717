"""Archives that others made: unpacked without a file outside the folder; a marker shows that all of it is there.

tar members go through Python's "data" filter (PEP 706), zip members through a check of their names; what would be
written or point outside is refused before it is written.
"""

import errno
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from pam_espnet.data.download import check_space
from pam_espnet.errors import DataError
from pam_espnet.fileio import whole_folder, write_text

MARKER = ".completed"
ANEW = "delete the file and run this again"
# What the standard library raises for an archive that ends too early or is damaged.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError)


def is_complete(folder: str | Path, key: str | None = None) -> bool:
    """Whether ``folder`` was unpacked to the end, from the archive that ``key`` stands for (None: from any)."""
    marker = Path(folder) / MARKER
    return marker.is_file() and (key is None or marker.read_text(encoding="utf-8").strip() == key)


def mark_complete(folder: str | Path, key: str) -> None:
    """Note that all of ``folder`` is there; ``key`` is what it was made from (a checksum)."""
    write_text(Path(folder) / MARKER, f"{key}\n")


@contextmanager
def fresh_folder(folder: str | Path, key: str) -> Iterator[Path]:
    """``fileio.whole_folder``, marked complete."""
    with whole_folder(folder) as tmp:
        yield tmp
        mark_complete(tmp, key)


def extract_tar(archive: str | Path, folder: str | Path, *, stream: IO[bytes] | None = None, limit: int = 0) -> None:
    """Unpack a tar archive, compressed or not, into ``folder``; files in it are overwritten.

    Args:
        archive: the file; with ``stream``, the name in error messages.
        stream: read the tar from here instead.
        limit: refuse an archive that unpacks to more bytes; 0 sets none.

    Raises DataError: an unsafe member, an archive that is damaged or cut short, or too little disk space.
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
        while tar.fileobj is not None and tar.fileobj.read(1 << 20):  # to the end, where gzip has its checksum
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
        file.extractall(folder)


def _check_limit(archive: str | Path, total: int, limit: int) -> None:
    if limit and total > limit:
        raise DataError(archive, f"unpacks to more than {limit:,} bytes", hint=ANEW)


@contextmanager
def _explained(archive: str | Path) -> Iterator[None]:
    """Turn the errors of tarfile and zipfile into a ``DataError`` about ``archive``."""
    try:
        yield
    except tarfile.FilterError as error:
        raise DataError(archive, f"cannot be unpacked safely: {error}", hint=ANEW) from error
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(archive, "the disk is full", hint="free some space, run the same command again") from error
        if isinstance(error, OSError) and error.errno is not None:  # gzip and bzip2 raise theirs without a number
            raise
        message = f"cannot be unpacked, it is damaged or cut short ({error or type(error).__name__})"
        raise DataError(archive, message, hint=ANEW) from error
