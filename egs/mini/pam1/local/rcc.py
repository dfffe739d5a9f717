"""Read Qt's binary resource files (.rcc, versions 1 to 3) without Qt.

All numbers are big-endian, (32) is a number of 32 bits. Header: b"qres", version, offsets of the tree, the data and the
names (32 each; version 3 adds flags). A node of the tree is 14 bytes, from version 2 on 22: offset of its name (32),
flags (16), then for a folder number and index of its children (32, 32), for a file territory and language (16, 16) and
the offset of its data (32); the last 8 bytes of a long node are a time. A name is its length in UTF-16 units (16), a
hash (32), the units. Data is its length (32), then the bytes; compressed ones begin with their unpacked length (32)
before the zlib stream.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from pam_espnet.errors import DataError

ZLIB, FOLDER, ZSTANDARD = 1, 2, 4  # flags of a node


def read_rcc(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield (path inside the resource, content) of every file whose name ends with one of ``suffixes``.

    Raises:
        DataError: not an .rcc file, of an unknown version, damaged, or a wanted file is compressed with Zstandard.
    """
    content = path.read_bytes()
    if content[:4] != b"qres":
        raise DataError(path, "is not a Qt resource file (it does not begin with 'qres')", hint="unpack it again")
    try:
        version, tree, data, names = struct.unpack_from(">4I", content, 4)
        if not 1 <= version <= 3:
            raise DataError(path, f"resource format version {version} is not known (1 to 3 are)")
        yield from _walk(content, (tree, data, names), 22 if version >= 2 else 14, suffixes, path)
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise DataError(path, f"is damaged: {error}", hint="delete the unpacked package, run stage 1 again") from error


def _walk(
    content: bytes, offsets: tuple[int, int, int], node_size: int, suffixes: tuple[str, ...], path: Path
) -> Iterator[tuple[str, bytes]]:
    tree, data, names = offsets
    todo, seen = [(0, "")], set()
    while todo:
        index, parent = todo.pop()
        if index in seen:  # a folder that contains itself would never end
            raise DataError(path, f"is damaged: node {index} is listed twice")
        seen.add(index)
        at = tree + index * node_size
        name_at, flags = struct.unpack_from(">IH", content, at)
        name = f"{parent}/{_name(content, names + name_at)}" if index else ""
        if flags & FOLDER:
            count, first = struct.unpack_from(">II", content, at + 6)
            todo.extend((first + child, name) for child in reversed(range(count)))
        elif name.endswith(suffixes):
            (data_at,) = struct.unpack_from(">I", content, at + 10)
            yield name.removeprefix("/"), _unpacked(content, data + data_at, flags, path, name)


def _name(content: bytes, at: int) -> str:
    (units,) = struct.unpack_from(">H", content, at)
    return content[at + 6 : at + 6 + 2 * units].decode("utf-16-be")


def _unpacked(content: bytes, at: int, flags: int, path: Path, name: str) -> bytes:
    (size,) = struct.unpack_from(">I", content, at)
    payload = content[at + 4 : at + 4 + size]
    if len(payload) < size:
        raise DataError(path, f"is cut short inside {name!r}", hint="delete the unpacked package, run stage 1 again")
    if flags & ZSTANDARD:
        raise DataError(path, f"{name!r} is compressed with Zstandard, which is not supported here")
    return zlib.decompress(payload[4:]) if flags & ZLIB else payload
