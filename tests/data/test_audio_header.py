"""Lengths in headers that are not known or more than there is; a cut file is never read as a shorter recording."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from make_data import BARE_MP3, RATE, encode, noise, sine

from pam_espnet.data.audio import read_audio
from pam_espnet.errors import DataError

U32, U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def written(container_format: str, wave: np.ndarray) -> bytes:
    """``wave`` (N,) as 16-bit samples in a container that libsndfile writes."""
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format=container_format, subtype="PCM_16")
    return file.getvalue()


def patched(content: bytes, marker: bytes, offset: int, form: str, *values: int) -> bytes:
    """``content`` with other numbers ``offset`` bytes behind the beginning of ``marker``."""
    new = bytearray(content)
    struct.pack_into(form, new, content.index(marker) + offset, *values)
    return bytes(new)


def unknown(container_format: str, content: bytes, value: int) -> bytes:
    """``content`` as a program writes it that does not know the length and states ``value`` bytes."""
    outer = (value + 36) & U32
    if container_format == "WAV":
        return patched(patched(content, b"RIFF", 4, "<I", outer), b"data", 4, "<I", value)
    if container_format == "AIFF":
        frames = patched(patched(content, b"FORM", 4, ">I", outer), b"COMM", 10, ">I", max(0, value - 8) // 2)
        return patched(frames, b"SSND", 4, ">I", value)
    if container_format == "AU":
        return patched(content, b".snd", 8, ">I", value)
    if container_format == "W64":
        return patched(patched(content, b"riff", 16, "<Q", value), b"data", 16, "<Q", value)
    if container_format == "RF64":
        return patched(content, b"ds64", 8, "<QQQ", value, value, value)
    if container_format == "CAF":
        return patched(content, b"data", 4, ">Q", value)
    if container_format == "NIST":
        return content.replace(b"-i 8000", b"-i %-4d" % value)
    return content[:21] + bytes([content[21] & 0xF0, 0, 0, 0, 0]) + content[26:]  # FLAC


@pytest.mark.parametrize(
    ("container_format", "value"),
    [
        *(("WAV", value) for value in (0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, U32 - 36, U32)),
        *(("AIFF", value) for value in (0, 0x7F000000, 0x7F000008, U32)),
        *(("AU", value) for value in (0, 0x7FFFF000, U32)),
        *((long, value) for long in ("W64", "RF64", "CAF") for value in (0, U64 >> 1, U64)),
        *(("NIST", value) for value in (0, -1)),
        ("FLAC", 0),
    ],
)
def test_length_that_is_not_known(tmp_path: Path, container_format: str, value: int) -> None:
    wave = noise(0.5)
    path = tmp_path / "stream"
    path.write_bytes(unknown(container_format, written(container_format, wave), value))
    for source in (str(path), f"cat {path} |"):
        read, rate = read_audio(source, allow_pipes=True)
        assert rate == RATE
        np.testing.assert_allclose(read, wave, atol=1 / 32768)
        np.testing.assert_array_equal(read_audio(source, start=0.1, end=0.2, allow_pipes=True)[0], read[1600:3200])


@pytest.mark.parametrize("container_format", ["WAV", "AIFF", "AU", "W64", "RF64", "CAF", "NIST"])
def test_empty_file_is_empty(tmp_path: Path, container_format: str) -> None:
    path = tmp_path / "empty"
    path.write_bytes(written(container_format, np.zeros(0)))
    assert len(read_audio(path)[0]) == 0
    if container_format == "WAV":  # what follows is a chunk, no samples
        content = path.read_bytes() + b"LIST" + struct.pack("<I", 4) + b"INFO"
        path.write_bytes(patched(content, b"RIFF", 4, "<I", len(content) - 8))
        assert len(read_audio(path)[0]) == 0


@pytest.mark.parametrize("container_format", ["WAV", "WAVEX", "FLAC", "AIFF", "AU", "W64", "RF64", "CAF", "NIST"])
@pytest.mark.parametrize("part", [0.5, 0.97])
def test_cut_file_that_libsndfile_reads(tmp_path: Path, container_format: str, part: float) -> None:
    content = written(container_format, noise(0.5))
    path = tmp_path / "cut"
    path.write_bytes(content)
    assert len(read_audio(path)[0]) == RATE // 2
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match=r"is cut short|cannot be read") as caught:
        read_audio(path)
    assert caught.value.hint is not None
    if container_format == "WAV":
        with pytest.raises(DataError, match=r"is cut short: it has [0-9]+ of the 16000 bytes"):
            read_audio(path, start=0.0, end=0.1)


@pytest.mark.parametrize(
    ("codec", "container_format", "options"),
    [
        ("libmp3lame", "mp3", {}),
        ("aac", "ipod", {"movflags": "+faststart"}),
        ("aac", "ipod", {}),
        ("alac", "mov", {"movflags": "+faststart"}),
        ("aac", "mp4", {"movflags": "frag_keyframe+empty_moov", "frag_duration": "300000"}),
        ("libopus", "webm", {}),
        ("aac", "matroska", {}),
        ("aac", "flv", {}),
        ("wavpack", "wv", {}),
        ("tta", "tta", {}),
        ("alac", "caf", {}),
        ("libopus", "ogg", {}),
    ],
)
@pytest.mark.parametrize("part", [0.5, 0.8])
def test_cut_file_of_a_compressed_format(
    tmp_path: Path, codec: str, container_format: str, options: dict[str, str], part: float
) -> None:
    path, rate = tmp_path / "cut", 48000 if codec == "libopus" else 44100
    content = encode(path, sine(2.0, rate), codec, container_format, rate=rate, options=options)
    assert len(read_audio(path)[0]) / rate == pytest.approx(2.0, abs=0.1)
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match=r"is cut short|cannot be read"):
        read_audio(path)


def test_estimated_duration_is_no_promise(tmp_path: Path) -> None:
    """Without a count of frames ffmpeg guesses the duration of an MP3 from the bit rate of its beginning."""
    parts = [
        encode(tmp_path / "part", sine(2.0), "libmp3lame", "mp3", bit_rate=bit_rate, options=BARE_MP3)
        for bit_rate in (16000, 128000)
    ]
    (tmp_path / "a.mp3").write_bytes(b"".join(parts))
    assert len(read_audio(tmp_path / "a.mp3")[0]) / RATE == pytest.approx(4.0, abs=0.2)


def test_ogg_file_whose_end_is_not_marked_is_read(tmp_path: Path) -> None:
    """Phones write such files, so only a page that is not whole tells of a cut."""
    content = encode(tmp_path / "a.ogg", noise(3.0, 48000), "libopus", "ogg", rate=48000)
    last = content.rindex(b"OggS")
    (tmp_path / "a.ogg").write_bytes(content[:last])
    assert 1.0 < len(read_audio(tmp_path / "a.ogg")[0]) / 48000 < 3.0
    for end in (last + 10, last + 30, len(content) - 1):
        (tmp_path / "a.ogg").write_bytes(content[:end])
        with pytest.raises(DataError, match="is cut short: its last page is not whole"):
            read_audio(tmp_path / "a.ogg")
