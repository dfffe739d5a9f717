"""Reading audio in several formats, pieces of it, commands, and resampling."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from make_data import RATE, noise

from pam_espnet.data.audio import RESAMPLER, read_audio, resample, to_pcm16
from pam_espnet.errors import DataError


def encode(path: Path, wave: np.ndarray, codec: str, container_format: str) -> None:
    """Write ``wave`` (N,) through ffmpeg, as the formats libsndfile cannot write."""
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(to_pcm16(wave)[0][None], format="s16", layout="mono")
        frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
        convert = av.AudioResampler(stream.format.name, "mono", RATE, frame_size=stream.frame_size or None)
        for part in [*convert.resample(frame), *convert.resample(None), None]:
            container.mux(stream.encode(part))


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "PCM_16"), ("flac", "PCM_16"), ("wav", "PCM_24")])
def test_lossless_formats(tmp_path: Path, suffix: str, subtype: str) -> None:
    wave = to_pcm16(noise(0.2))[0] / np.float32(32768)
    soundfile.write(tmp_path / f"a.{suffix}", wave, RATE, subtype=subtype)
    read, rate = read_audio(tmp_path / f"a.{suffix}")
    assert rate == RATE and read.dtype == np.float32
    np.testing.assert_array_equal(read, wave)


@pytest.mark.parametrize(
    ("name", "codec", "container_format", "tolerance"),
    [("a.g722", "g722", "g722", 0.01), ("a.m4a", "aac", "mp4", 0.1), ("a.webm", "libopus", "webm", 0.2)],
)
def test_formats_of_ffmpeg(tmp_path: Path, name: str, codec: str, container_format: str, tolerance: float) -> None:
    wave = (0.3 * np.sin(2 * np.pi * 300 * np.arange(RATE) / RATE)).astype(np.float32)
    encode(tmp_path / name, wave, codec, container_format)
    read, rate = read_audio(tmp_path / name)
    assert abs(len(read) / rate - 1.0) < tolerance
    assert np.sqrt(np.mean(read**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)


def test_mp3_has_as_many_samples_as_were_decoded(tmp_path: Path) -> None:
    # libsndfile only estimates the length of an MP3 file; with an estimate a segment could be cut wrongly
    soundfile.write(tmp_path / "a.mp3", noise(1.0), RATE, format="MP3")
    with av.open(str(tmp_path / "a.mp3")) as container:
        decoded = sum(frame.samples for frame in container.decode(audio=0))
    assert len(read_audio(tmp_path / "a.mp3")[0]) == decoded
    assert len(read_audio(tmp_path / "a.mp3", start=0.25, end=0.5)[0]) == RATE // 4


def test_channels_are_averaged(tmp_path: Path) -> None:
    stereo = np.stack([noise(0.1, seed=1), noise(0.1, seed=2)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav")[0], stereo.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("suffix", ["wav", "flac", "g722"])
def test_segment_is_a_piece_of_the_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "g722":
        encode(path, noise(0.5), "g722", "g722")
    else:
        soundfile.write(path, noise(0.5), RATE)
    whole, piece = read_audio(path)[0], read_audio(path, start=0.1, end=0.25)[0]
    np.testing.assert_array_equal(piece, whole[1600:4000])


def test_segment_may_end_a_little_late_but_not_outside(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(0.5), RATE)
    assert len(read_audio(tmp_path / "a.wav", start=0.25, end=0.6)[0]) == 4000
    for start, end in [(0.25, 2.0), (0.5, 0.6)]:
        with pytest.raises(DataError, match="outside the recording"):
            read_audio(tmp_path / "a.wav", start=start, end=end)


def test_bad_files(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "good.flac", noise(2.0), RATE)
    content = (tmp_path / "good.flac").read_bytes()
    cases = {
        "text.wav": (b"this is not audio at all", "Format not recognised"),
        "empty.wav": (b"", "cannot be read"),
        "empty.g722": (b"", "there is no audio in it"),
        "text.m4a": (b"neither is this" * 20, "Invalid data"),
        "short.flac": (content[: len(content) // 2], "short.flac"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            read_audio(tmp_path / name)
        assert caught.value.hint is not None
    with pytest.raises(DataError, match="no such audio file"):
        read_audio(tmp_path / "nowhere.wav")


def test_a_command_is_run_without_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "with space.wav"
    soundfile.write(path, noise(0.2), RATE, subtype="FLOAT")
    read = read_audio(f"cat '{path}' |", allow_pipes=True)[0]
    np.testing.assert_array_equal(read, noise(0.2))
    marker = tmp_path / "marker"
    with pytest.raises(DataError):
        read_audio(f"cat {path} ; touch {marker} |", allow_pipes=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat a.wav | sox - |", "put the commands into an executable script"),
        ("cat a.wav|sox - |", "put the commands into an executable script"),
        ("|", "is an empty command"),
        ("cat 'a.wav |", "repair the quotes"),
        ("no-such-program-here a.wav |", "install the program"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"out of tape\")' |", "status 1: out of tape"),
        ("echo hello |", "cannot be read"),
    ],
)
def test_bad_commands(command: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_audio(command, allow_pipes=True)
    with pytest.raises(DataError, match="pass --allow-pipes"):
        read_audio(command)


def test_resample() -> None:
    wave = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000).astype(np.float32)
    twice = resample(wave, 8000, 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert twice.shape == (16000,) and twice.dtype == np.float32
    np.testing.assert_allclose(twice[500:-500], expected[500:-500], atol=2e-3)
    assert resample(wave, 8000, 8000) is wave
    assert RESAMPLER.startswith("soxr ")


def test_clipping_is_counted() -> None:
    samples, clipped = to_pcm16(np.array([0.0, 1.0, -1.0, 1.5, -2.0, 0.5], dtype=np.float32))
    assert samples.tolist() == [0, 32767, -32768, 32767, -32768, 16384]
    assert clipped == 3  # +1.0 has no int16 value, -1.0 has


def test_a_wav_that_was_cut_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    whole = tmp_path / "whole.wav"
    soundfile.write(whole, np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    data = whole.read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[:9000])
    with pytest.raises(DataError, match="cut short: it has 8956 of the 16000 bytes"):
        read_audio(tmp_path / "cut.wav")
    at = data.index(b"data") + 4  # a program that writes into a pipe cannot know the length
    (tmp_path / "streamed.wav").write_bytes(data[:4] + b"\xff" * 4 + data[8:at] + b"\xff" * 4 + data[at + 4 :])
    assert len(read_audio(tmp_path / "streamed.wav")[0]) == 8000
