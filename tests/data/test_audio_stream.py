"""Recordings read block by block: the samples of reading them whole, in memory that does not grow."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from make_data import RATE, encode, noise, sine

from pam_espnet.data.audio import read_audio, resample
from pam_espnet.data.audio_stream import stated_seconds, stream_audio
from pam_espnet.errors import DataError


@pytest.mark.parametrize(
    ("name", "rate"),
    [("a.wav", 16000), ("a.wav", 44100), ("a.flac", 8000), ("a.ogg", 44100), ("a.mp3", 16000), ("a.mp3", 44100)],
)
def test_the_samples_of_reading_it_whole(tmp_path: Path, name: str, rate: int) -> None:
    soundfile.write(tmp_path / name, np.stack([noise(13.0, rate), sine(13.0, rate)], axis=1), rate)
    check(tmp_path / name)


@pytest.mark.parametrize(("codec", "container_format"), [("aac", "mp4"), ("libopus", "webm")])
def test_the_samples_of_reading_formats_of_ffmpeg_whole(tmp_path: Path, codec: str, container_format: str) -> None:
    wave = np.stack([noise(13.0, 48000), sine(13.0, 48000)])
    encode(tmp_path / "a", wave, codec, container_format, rate=48000)
    check(tmp_path / "a")


def check(path: Path) -> None:
    blocks = list(stream_audio(path, RATE))
    assert len(blocks) >= 3 and max(map(len, blocks)) < 8 * RATE
    np.testing.assert_allclose(np.concatenate(blocks), resample(*read_audio(path), RATE), atol=1e-5)
    assert stated_seconds(path) == pytest.approx(13.0, abs=0.3)


def test_channels_and_rate_may_change(tmp_path: Path) -> None:
    first = encode(tmp_path / "1", sine(6.0, 44100), "aac", "adts", rate=44100)
    second = encode(tmp_path / "2", np.stack([sine(6.0, 24000)] * 2), "aac", "adts", rate=24000)
    (tmp_path / "joined").write_bytes(first + second)
    streamed, whole = np.concatenate(list(stream_audio(tmp_path / "joined", RATE))), read_audio(tmp_path / "joined")
    assert len(streamed) == pytest.approx(len(whole[0]) * RATE / whole[1], abs=10)
    for half in (streamed[: 5 * RATE], streamed[-5 * RATE :]):
        assert np.sqrt(np.mean(half**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)


@pytest.mark.parametrize("name", ["a.wav", "a.ogg", "a.mp3"])
def test_memory_does_not_grow_with_the_length(tmp_path: Path, name: str) -> None:
    peaks = []
    for seconds in (40, 400):
        with soundfile.SoundFile(tmp_path / name, "w", 22050, 2) as file:
            for second in range(seconds):  # libsndfile's Vorbis encoder crashes on more at once
                file.write(np.stack([noise(1, 22050, second)] * 2, axis=1))
        tracemalloc.start()
        total = sum(map(len, stream_audio(tmp_path / name, RATE)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == pytest.approx(seconds * RATE, abs=RATE / 5)
    assert peaks[1] < 1.1 * peaks[0] < 16e6  # bytes; all samples of the longer one are 70 MB


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.stack([sine(40.0), -sine(40.0)], axis=1), "the channels cancel each other"),
        (np.stack([sine(2.0), -sine(2.0)], axis=1), "the channels cancel each other"),
        (np.where(np.arange(20 * RATE) == 7 * RATE, np.nan, noise(20.0)), "samples between 5.0 and 10.0 s are NaN"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, wave: np.ndarray, message: str) -> None:
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    with pytest.raises(DataError, match=message):
        list(stream_audio(tmp_path / "a.wav", RATE))


def test_a_quiet_beginning_may_have_opposite_channels(tmp_path: Path) -> None:
    quiet = 1e-3 * sine(8.0)
    wave = np.stack([np.append(quiet, sine(30.0)), np.append(-quiet, sine(30.0))], axis=1)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    assert sum(map(len, stream_audio(tmp_path / "a.wav", RATE))) == 38 * RATE


def test_a_damaged_place_is_an_error_when_it_is_reached(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", noise(60.0), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40000] = bytes(40000)
    (tmp_path / "a.flac").write_bytes(content)
    blocks = stream_audio(tmp_path / "a.flac", RATE)
    assert len(next(blocks)) == 5 * RATE
    with pytest.raises(DataError, match=r"a\.flac: "):
        list(blocks)


def test_what_is_no_audio(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("not audio")
    for name, message in (("a.wav", "cannot be read"), ("b.wav", "no such audio file")):
        with pytest.raises(DataError, match=message):
            list(stream_audio(tmp_path / name, RATE))
        assert stated_seconds(tmp_path / name) is None
