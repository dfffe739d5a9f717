"""The length that an audio file's header states, against the bytes that are there.

libsndfile shortens a file that was cut without an error, and reads nothing where the header states no length, as
programs that write into a pipe and recorders that crash leave it. Decodes nothing.
"""

import io
import itertools
import mmap
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from pam_espnet.errors import DataError

REPAIR_HINT = "copy, download or convert it again (FLAC and WAV always work), or remove the utterance"
# Bytes or more mean "not known": SoX states 0x7FFFF000 in WAV, a little less than 0x7F000000 in AIFF; many state -1.
UNKNOWN = 0x7EFFF000
MAX_CHUNKS = 1000  # before the samples; more of them are no chunks


@dataclass(frozen=True)
class _Layout:
    """A container made of chunks, each an id, a size and that many bytes; offsets and sizes in bytes."""

    first: int  # offset of the first chunk
    ids: str  # the id, as struct reads it with the byte order
    size: str  # the size, which follows it
    padding: int = 1  # a chunk begins at a multiple of this
    own: int = 0  # bytes of the chunk's id and size that its size counts
    data: bytes = b"data"
    prefix: int = 0  # bytes before the first sample that the size of the data chunk counts


_LAYOUTS = {
    b"RIFF": _Layout(12, "<4s", "I", 2),
    b"RIFX": _Layout(12, ">4s", "I", 2),
    b"RF64": _Layout(12, "<4s", "I", 2),
    b"BW64": _Layout(12, "<4s", "I", 2),
    b"FORM": _Layout(12, ">4s", "I", 2, data=b"SSND", prefix=8),
    b"riff": _Layout(40, "<4s12x", "Q", 8, own=24),  # Wave64: ids of 16 bytes that begin with the letters of WAV
    b"caff": _Layout(8, ">4s", "Q", prefix=4),
}


@dataclass(frozen=True)
class _Stated:
    """Where a header states the length of its samples, in bytes."""

    offset: int  # of the field
    form: str  # of the field, as struct reads it
    size: int  # what the field states
    present: int  # bytes that follow the header
    extra: int = 0  # what the field counts besides samples
    empty: bool = False  # whether the rest of the header agrees with a length of zero


def whole_file(name: str, file: BinaryIO) -> BinaryIO:
    """``file`` at its beginning, or where its header states no length a copy in memory whose header does.
    Raises DataError: fewer bytes follow the header than it states; ``name`` is the file's in the message."""
    stated = _find_stated(file)
    file.seek(0)
    if stated is None:
        return file
    samples, width = stated.size - stated.extra, struct.calcsize(stated.form)
    if samples > stated.present and stated.size < UNKNOWN:
        raise cut_short(name, f"it has {stated.present} of the {samples} bytes that its header states")
    if samples <= 0 and (stated.empty or not stated.present):
        return file
    if samples > 0 and (samples <= stated.present or width < 8):
        return file  # libsndfile reads to the end where a field of 32 bits states too much
    content = bytearray(file.read())
    struct.pack_into(stated.form, content, stated.offset, min(stated.present + stated.extra, 256**width - 1))
    return io.BytesIO(content)


def cut_short(name: str, message: str) -> DataError:
    """The error of a file of which the end is missing."""
    return DataError(name, f"is cut short: {message}", hint=REPAIR_HINT)


def _find_stated(file: BinaryIO) -> _Stated | None:
    """The stated length of uncompressed samples; None where the container is another or has no samples."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(1024)
    magic = start[:4]
    if magic in (b".snd", b"dns.") and len(start) >= 24:  # Sun AU
        form = ">I" if magic == b".snd" else "<I"
        offset, size = (struct.unpack_from(form, start, at)[0] for at in (4, 8))
        return _Stated(8, form, size, length - offset)
    if magic == b"NIST":  # SPHERE, whose length libsndfile does not read: there is nothing to correct
        fields = dict(re.findall(rb"^(\w+) -\w+ (\S+)", start, re.MULTILINE))
        keys = (b"sample_count", b"sample_n_bytes", b"channel_count")
        numbers = [fields.get(key, b"") for key in keys] + [start[8:16].strip()]
        if b"shorten" in fields.get(b"sample_coding", b"") or not all(number.isdigit() for number in numbers):
            return None
        count, width, channels, header = map(int, numbers)
        return _Stated(0, "<I", count * width * channels, length - header, empty=True)
    return _find_chunk(file, _LAYOUTS[magic], start, length) if magic in _LAYOUTS else None


def _find_chunk(file: BinaryIO, layout: _Layout, start: bytes, length: int) -> _Stated | None:
    """The data chunk's stated length; ``start``: the file's first bytes, ``length``: all its bytes."""
    head = struct.Struct(layout.ids + layout.size)
    field = layout.ids[0] + layout.size
    extra = layout.own + layout.prefix
    ds64 = 0  # RF64: offset of a chunk that states the length instead
    at = layout.first
    for _ in range(MAX_CHUNKS):
        if at + head.size > length:
            break
        file.seek(at)
        name, size = head.unpack(file.read(head.size))
        body = at + head.size
        if name == b"ds64":
            ds64 = body
        if name == layout.data:
            present = length - body - layout.prefix
            if ds64:
                file.seek(ds64 + 8)
                return _Stated(ds64 + 8, "<Q", int.from_bytes(file.read(8), "little"), present)
            whole = 8 + struct.unpack_from(layout.ids[0] + "I", start, 4)[0]  # as the container states it
            return _Stated(body - struct.calcsize(field), field, size, present, extra, whole == length)
        at = body + max(0, size - layout.own)
        at += -at % layout.padding
    return None


def ogg_streams(name: str, file: BinaryIO) -> list[BinaryIO]:
    """The streams of an Ogg file that follow each other (joined files, radio), each as a file in memory, or the only
    one as it is.
    Raises DataError: the last page is not whole. Whole pages of which none is marked as the last one are accepted:
    phones write such files.
    """
    # mapped, so that a long file takes no memory
    content = file.getvalue() if isinstance(file, io.BytesIO) else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    starts, first_page, at = [0], True, 0
    while (at := content.find(b"OggS", at)) >= 0:
        head = content[at : at + 27]
        table = content[at + 27 : at + 27 + head[26]] if len(head) == 27 else b""
        end = at + 27 + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or len(content) < end:
            raise cut_short(name, "its last page is not whole")
        begins = bool(head[5] & 2)
        if begins and not first_page:
            starts.append(at)
        first_page, at = begins, end
    if len(starts) == 1:
        return [file]
    return [io.BytesIO(content[start:end]) for start, end in itertools.pairwise([*starts, len(content)])]


def counts_mp3_frames(file: BinaryIO) -> bool:
    """Whether an MP3 file states its number of frames (Xing, Info or VBRI), so that its duration is no estimate."""
    file.seek(0)
    tag = file.read(10)
    if tag[:3] == b"ID3":
        file.seek(10 + sum(byte << shift for byte, shift in zip(tag[6:10], (21, 14, 7, 0), strict=True)))
    else:
        file.seek(0)
    found = re.search(rb"(?:Xing|Info)\0\0\0(.)|VBRI", file.read(4096), re.DOTALL)
    return found is not None and (found[1] is None or bool(found[1][0] & 1))
