"""Reading audio in several formats, pieces of it, commands, and resampling."""

import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from make_data import BARE_MP3, RATE, encode, noise, sine

from pam_espnet.data.audio import RESAMPLER, read_audio, read_upload, resample
from pam_espnet.data.pcm import to_pcm16
from pam_espnet.errors import DataError


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
    for name in ("nowhere.wav", 300 * "x"):
        with pytest.raises(DataError, match="no such audio file"):
            read_audio(tmp_path / name)


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
        ("|", "is not one command"),
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


@pytest.mark.parametrize("name", ["a.m4b", "a.mov", "a.3gp", "no-suffix", "named.wav", "named.raw", "named.mp3"])
def test_suffix_does_not_matter(tmp_path: Path, name: str) -> None:
    encode(tmp_path / "a.m4a", sine(1.0), "aac", "ipod")
    expected = read_audio(tmp_path / "a.m4a")[0]
    (tmp_path / "a.m4a").rename(tmp_path / name)
    np.testing.assert_array_equal(read_audio(tmp_path / name)[0], expected)
    soundfile.write(tmp_path / name, sine(0.5), RATE, format="WAV")
    assert len(read_audio(tmp_path / name)[0]) == RATE // 2


def test_file_names_and_tags_that_are_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    soundfile.write(tmp_path / "a.wav", sine(0.5), RATE)
    (tmp_path / "a.wav").rename(path)
    assert len(read_audio(path)[0]) == RATE // 2
    encode(tmp_path / "a.mp3", sine(0.5), "libmp3lame", "mp3")
    tagged = path.with_suffix(".mp3")
    tagged.write_bytes((tmp_path / "a.mp3").read_bytes() + b"TAG" + b"caf\xe9".ljust(125, b"\0"))
    assert len(read_audio(tagged)[0]) == pytest.approx(RATE // 2, abs=200)


def test_lists_of_files_are_not_followed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(0.5), RATE)
    (tmp_path / "list.mp3").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.wav\n#EXT-X-ENDLIST\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_audio(tmp_path / "list.mp3")


@pytest.mark.parametrize(
    ("codec", "container_format", "second"),
    [
        ("libmp3lame", "mp3", (1, 44100)),
        ("libmp3lame", "mp3", (2, 44100)),
        ("libmp3lame", "mp3", (1, 22050)),
        ("aac", "adts", (2, 44100)),
        ("aac", "adts", (1, 24000)),
        ("libopus", "ogg", (2, 48000)),
    ],
)
def test_channels_and_rate_may_change_within_a_stream(
    tmp_path: Path, codec: str, container_format: str, second: tuple[int, int]
) -> None:
    bare = BARE_MP3 if codec == "libmp3lame" else {}
    rate = 48000 if codec == "libopus" else 44100
    first = encode(tmp_path / "1", sine(1.0, rate), codec, container_format, rate=rate, options=bare)
    channels, other = second
    wave = np.stack([sine(1.0, other)] * channels)
    joined = tmp_path / "joined"
    joined.write_bytes(first + encode(tmp_path / "2", wave, codec, container_format, rate=other, options=bare))
    read, found = read_audio(joined)
    assert found == rate and len(read) / rate == pytest.approx(2.0, abs=0.2)
    for half in (read[: rate // 2], read[-rate // 2 :]):
        assert np.sqrt(np.mean(half**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)
    assert len(read_audio(joined, start=0.5, end=1.5)[0]) == rate


@pytest.mark.parametrize("gain", [1.0, 0.95])
def test_channels_that_cancel_are_refused(tmp_path: Path, gain: float) -> None:
    wave = sine(0.5)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, -gain * wave], axis=1), RATE)
    with pytest.raises(DataError, match="the channels cancel each other"):
        read_audio(tmp_path / "a.wav")
    for other in (np.zeros_like(wave), -0.5 * wave, noise(0.5)):
        soundfile.write(tmp_path / "a.wav", np.stack([wave, other], axis=1), RATE)
        assert np.abs(read_audio(tmp_path / "a.wav")[0]).max() > 0.05
    soundfile.write(tmp_path / "a.wav", np.eye(8)[np.zeros(8000, int)] * wave[:, None], RATE)  # one of eight in use
    assert len(read_audio(tmp_path / "a.wav")[0]) == 8000


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.webm"])
def test_an_upload_is_read_like_a_file_if_it_is_short(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith((".m4a", ".webm")):
        encode(path, sine(1.0), *(("aac", "mp4") if name == "a.m4a" else ("libopus", "webm")))
    else:
        soundfile.write(path, sine(1.0), RATE)
    wave, rate = read_audio(path)
    read, found = read_upload(path.read_bytes(), "file", 1.2)
    assert found == rate and np.array_equal(read, wave)
    with pytest.raises(DataError, match=r"file: too long: \S+ s is more than 0.5 s"):
        read_upload(path.read_bytes(), "file", 0.5)


def test_a_long_upload_is_refused_by_its_header(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", sine(1.0), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] |= 0xF  # the upper bits of the number of samples
    del content[100:]  # nothing that could be decoded
    with pytest.raises(DataError, match="too long"):
        read_upload(bytes(content), "file", 30.0)


def test_a_long_upload_of_many_streams_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.ogg", sine(1.0), RATE)
    with pytest.raises(DataError, match="too long: 3"):
        read_upload(9 * (tmp_path / "a.ogg").read_bytes(), "file", 2.5)


def test_an_upload_of_many_channels_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full((40000, 200), 0.1), 200_000, subtype="PCM_U8")
    assert len(read_audio(tmp_path / "a.wav")[0]) == 40000
    with pytest.raises(DataError, match="too large: 8000000 samples"):
        read_upload((tmp_path / "a.wav").read_bytes(), "file", 5.0)
