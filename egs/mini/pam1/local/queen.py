"""Spoken lines and their texts in the archive of the game Flight of the Amazon Queen (ScummVM's compressed talkie).

The archive (``queen.1c``, big-endian throughout) begins with ``QTBL``, a version of 6 bytes, two flags, the compression
of the speech (1: MP3) and the number of files (u16); then per file a name of 12 bytes padded with zeros, the number of
the volume (u8), offset and size (u32 each). Speech is in ``*.SB``: MP3 at 11.025 kHz and a constant 16 kbit/s.

A dialogue file (``*.DOG``) has a header of 20 bytes; what follows begins with words of 16 bits. Word 0: number of
levels of the tree of choices (negative: it cannot be left), word 2: the dialogue's number, words 11 to 13: offsets of
the person's sentences, of their end and of two strings (person, hero) for a person who is met again. The hero's
sentences begin behind the tree: 32 bytes and 96 per level. A sentence is an identifier (u32) and a string (u8 length)
padded to 4 bytes; the two last strings are padded to 2 bytes. Sentences consist of segments: ``*`` and two characters,
an action, end one. A segment that has text was recorded as ``<dialogue %02d><sentence %04X><J hero or P person><segment
%X>.SB``, where sentence 0 of the hero is called SSSS, and those of a person who is met again XXXX.

What the hero says about things is in the lines of ``QUEEN2.JAS``: line n is ``JOE<n + 40, %04d><segment %X>.SB``, n
from 1; his 40 general replies, n from -39 to 0, come after the names of the verbs.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pam_espnet.errors import DataError

HINT = "delete the package's folder under downloads/ and run local/download.py again"
BYTES_PER_SECOND = 2000  # of the speech
REPLIES = 40  # of the hero, before his descriptions
ACTION = re.compile(r"\*(?:XY\d\d\(\d+,\d+\)|..)")  # also "go to a point of the screen"
HERO = "joe"


@dataclass(frozen=True)
class Line:
    """A recorded segment: ``name`` is its file's without ``.SB``; ``voice`` is the person's name, lower case."""

    name: str
    voice: str
    text: str


class QueenArchive:
    """The files of an archive; ``read`` gives their bytes.

    Raises:
        DataError: it is missing, no such archive, has another kind of speech, or is not as long as its table says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(path, "is missing", hint=HINT)
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(15)
            if len(head) < 15 or head[:4] != b"QTBL":
                raise DataError(path, "is not an archive of Flight of the Amazon Queen (no QTBL)", hint=HINT)
            if head[12] != 1:
                raise DataError(path, f"its speech has compression {head[12]}, not 1 (MP3)", hint=HINT)
            (count,) = struct.unpack(">H", head[13:])
            table = file.read(21 * count)
        if len(table) < 21 * count:
            raise DataError(path, f"is cut short within its table of {count} files", hint=HINT)
        self.files: dict[str, tuple[int, int]] = {}  # offset, bytes
        for name, _, offset, length in struct.iter_unpack(">12sBII", table):
            self.files[name.rstrip(b"\0").decode("latin-1")] = (offset, length)
        end = max((offset + length for offset, length in self.files.values()), default=0)
        if end != size:
            raise DataError(path, f"has {size} bytes where its table of files ends at {end}", hint=HINT)

    def read(self, name: str) -> bytes:
        """The content of a file."""
        if name not in self.files:
            raise DataError(self.path, f"has no file {name}", hint=HINT)
        offset, length = self.files[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def seconds(self, line: Line) -> float:
        """Duration of a spoken line."""
        return self.files[f"{line.name}.SB"][1] / BYTES_PER_SECOND

    def lines(self) -> list[Line]:
        """All lines with a text and a recording, by name."""
        found = list(self._descriptions())
        for name in self.files:
            if name.endswith(".DOG"):
                found += self._dialogue(name)
        return sorted((line for line in found if f"{line.name}.SB" in self.files), key=lambda line: line.name)

    def _descriptions(self) -> Iterator[Line]:
        """What the hero says about things, and his replies."""
        texts = self.read("QUEEN2.JAS").decode("latin-1").split("\r\n")
        verbs = ["walk to", "on", "to"]  # the last ones
        starts = [n for n in range(3, len(texts)) if texts[n - 3 : n] == verbs]
        if len(starts) != 1:
            raise DataError(self.path, "QUEEN2.JAS: the names of verbs were not found", hint=HINT)
        replies = texts[starts[0] : starts[0] + REPLIES]
        for number, text in enumerate(replies + texts, 1):
            yield from _segments(f"JOE{number:04d}", HERO, text)

    def _dialogue(self, name: str) -> Iterator[Line]:
        """The lines of one dialogue; its person is the file's name without number."""
        data = self.read(name)
        person = re.sub(r"\d*\.DOG$", "", name).lower()
        try:
            words = struct.unpack(">14h", data[20:48])
            number, base = words[2], 20
            hero, start, end, last = (base + at for at in (32 + 96 * abs(words[0]), *words[11:]))
            for voice, letter, first, stop in ((HERO, "J", hero, start), (person, "P", start, end)):
                for sentence, text in _sentences(data, first, stop):
                    if sentence or letter == "J":
                        key = f"{sentence:04X}" if sentence else "SSSS"
                        yield from _segments(f"{number:02d}{key}{letter}", voice, text)
            for voice, letter in ((person, "P"), (HERO, "J")):
                text, last = _string(data, last, 2)
                yield from _segments(f"{number:02d}XXXX{letter}", voice, text)
        except (struct.error, IndexError) as error:
            raise DataError(self.path, f"{name} is damaged", hint=HINT) from error


def _string(data: bytes, at: int, align: int) -> tuple[str, int]:
    """A string with its length in front, and where the next one begins."""
    length = data[at]
    text = data[at + 1 : at + 1 + length]
    if len(text) < length:
        raise IndexError(at)
    return text.decode("latin-1"), at + -(-(1 + length) // align) * align


def _sentences(data: bytes, at: int, end: int) -> Iterator[tuple[int, str]]:
    """(identifier, text) of the sentences between two offsets."""
    while at < end:
        (sentence,) = struct.unpack(">I", data[at : at + 4])
        text, at = _string(data, at + 4, 4)
        yield sentence, text


def _segments(prefix: str, voice: str, text: str) -> Iterator[Line]:
    """The segments of a sentence that have text."""
    for number, segment in enumerate(ACTION.split(text), 1):
        if segment.strip():
            yield Line(f"{prefix}{number:X}", voice, segment.strip())
