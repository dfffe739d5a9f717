"""Archives of the format of Flight of the Amazon Queen, for tests of the mini recipe's reader."""

import io
import struct
from pathlib import Path

import numpy as np

RATE = 11025
# Levels of the tree of choices; its contents do not matter here.
LEVELS = 2


def mp3(wave: np.ndarray) -> bytes:
    """(N,) float at ``RATE`` as bare MP3 frames of 16 kbit/s."""
    import av

    file = io.BytesIO()
    options = {"write_xing": "0", "id3v2_version": "0"}
    with av.open(file, "w", format="mp3", options=options) as container:
        stream = container.add_stream("libmp3lame", rate=RATE, layout="mono")
        stream.bit_rate = 16000
        frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16p", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def _string(text: str, align: int) -> bytes:
    data = bytes([len(text)]) + text.encode("latin-1")
    return data + b"\0" * (-len(data) % align)


def _sentences(texts: dict[int, str]) -> bytes:
    return b"".join(struct.pack(">I", number) + _string(text, 4) for number, text in texts.items())


def dialogue(number: int, hero: dict[int, str], person: dict[int, str], again: tuple[str, str]) -> bytes:
    """A dialogue file: sentences by identifier, and what (person, hero) say when they meet again."""
    first = 32 + 96 * LEVELS
    start = first + len(hero_bytes := _sentences(hero))
    end = start + len(person_bytes := _sentences(person))
    words = struct.pack(">14h", -LEVELS, 1, number, *[0] * 8, start, end, end)
    body = words.ljust(first, b"\0") + hero_bytes + person_bytes + b"".join(_string(text, 2) for text in again)
    return b"AmBk".ljust(20, b"\0") + body


def descriptions(texts: list[str], replies: list[str]) -> bytes:
    """QUEEN2.JAS: what the hero says about things, the names of verbs, his replies."""
    return "\r\n".join([*texts, "look at", "walk to", "on", "to", *replies, *["-"] * (40 - len(replies))]).encode()


def write_archive(path: Path, files: dict[str, bytes], compression: int = 1) -> None:
    """An archive with ``files`` {name: content}."""
    at = 15 + 21 * len(files)
    table, data = b"", b""
    for name, content in files.items():
        table += struct.pack(">12sBII", name.encode(), 1, at + len(data), len(content))
        data += content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"QTBL" + b"CEM10\0" + struct.pack(">BBBH", 0, 0, compression, len(files)) + table + data)
