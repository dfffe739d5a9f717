"""Audio files in Kaldi archives: thousands of them in one file, each found by its offset in bytes.

A record is ``<key> AUDIO``, one byte that counts the bytes of a length, the length (little end first) and that many
bytes of a FLAC or WAV file, as kaldiio and ESPnet (type ``kaldi_ark``) write and read it; in archives of Kaldi itself a
WAV file follows the key. ``<archive>.ark:<offset>`` in ``wav.scp`` has the offset of what follows the key's blank.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from pam_espnet.errors import DataError
from pam_espnet.fileio import atomic_path

ARCHIVES = "audio.*.ark"  # those that ``pack`` writes
ARCHIVED_SOUND = "archived_sound"  # this project's type of data in ESPnet: a wav.scp with archives (train.iterator)
_MARK = b"AUDIO"


def locate(value: str) -> tuple[str, int | None]:
    """The file that a value of ``wav.scp`` names; the offset in bytes where it is an archive."""
    match = re.fullmatch(r"(.+\.ark):(\d+)", value)
    return (match[1], int(match[2])) if match else (value, None)


def read_record(value: str, key: str | None = None) -> bytes:
    """The bytes of the audio file at ``value``, whose record must have ``key`` unless that is None.
    Raises DataError: there is no audio, not all of it or that of another key. OSError: there is no such archive."""
    with open(locate(value)[0], "rb") as file:
        return file.read(_find(file, value, key))


def check_record(value: str) -> None:
    """Raises as ``read_record``, without reading the audio file."""
    with open(locate(value)[0], "rb") as file:
        _find(file, value, None)


def _find(file: BinaryIO, value: str, key: str | None) -> int:
    """Go to the audio file of a record; its length in bytes."""
    offset, size = locate(value)[1] or 0, os.fstat(file.fileno()).st_size
    lead = b"" if key is None else f"{key} ".encode()
    file.seek(max(0, offset - len(lead)))
    found, head = file.read(len(lead)) == lead and offset >= len(lead), file.read(len(_MARK) + 9)
    problem = "" if found else f"the offset is wrong: the audio there is not that of {key!r}"
    first = length = 0  # bytes before the audio file, and of it
    if head.startswith(_MARK) and len(head) > len(_MARK):
        first = len(_MARK) + 1 + head[len(_MARK)]
        length = int.from_bytes(head[len(_MARK) + 1 : first], "little")
    elif head.startswith(b"RIFF"):
        length = 8 + int.from_bytes(head[4:8], "little")
    else:
        problem = "the archive was cut or the offset is wrong: no audio begins there"
    if offset + first + length > size:
        problem = f"the archive was cut: it has {size} bytes, too few for this offset and its audio"
    if problem:
        raise DataError(value, problem, hint="from stage 2: remove it and run stage 2 again; else: copy it again")
    file.seek(offset + first)
    return length


def pack(records: Iterable[dict[str, Any]], folder: Path, limit: float) -> Iterator[dict[str, Any]]:
    """Put what records have as ``audio`` (bytes of a file; skipped ones have none) into ``<folder>/audio.<n>.ark`` of
    about ``limit`` bytes, under the key ``utt``; they come out with ``ark``, ``audio.<n>.ark:<offset>``, in its place.
    Archives that were there stay as they are; a new one gets its name when it is whole and its records came out."""
    number = max((int(path.name.split(".")[1]) for path in folder.glob(ARCHIVES)), default=0)
    with ExitStack() as stack:
        file: BinaryIO | None = None
        for record in records:
            if audio := record.pop("audio", b""):
                if file is None or file.tell() >= limit:
                    stack.close()
                    number += 1
                    path = stack.enter_context(atomic_path(folder / f"audio.{number}.ark"))
                    file = stack.enter_context(open(path, "wb"))
                file.write(f"{record['utt']} ".encode())
                record["ark"] = f"audio.{number}.ark:{file.tell()}"
                length = len(audio).to_bytes((len(audio).bit_length() + 7) // 8, "little")
                file.write(b"%s%c%s%s" % (_MARK, len(length), length, audio))
            yield record
