"""Reading audio: one utterance as a mono float32 wave, and resampling it.

libsndfile (soundfile) reads what it can; PyAV (ffmpeg) reads MP3 and what libsndfile cannot. Suffixes do not
matter. Shape letters: N samples, C channels.
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import soundfile
import soxr

from pam_espnet.data.audio_ark import locate, read_record
from pam_espnet.data.audio_header import REPAIR_HINT, counts_mp3_frames, cut_short, ogg_streams, whole_file
from pam_espnet.errors import DataError

if TYPE_CHECKING:
    import av

QUALITY = "HQ"
RESAMPLER = f"soxr {soxr.__version__} {QUALITY}"
MAX_OVERSHOOT = 0.5  # seconds a segment may end after its recording; rounded time stamps often do
MAX_MISSING = 0.25  # seconds that compressed audio may end before the duration in its header; encoders pad
CANCELLED = 0.1  # the sum of the channels relative to the loudest one (RMS): less means that they cancel each other
MOST_SAMPLES = 8 * 192_000  # in a second, over all channels, of what strangers send
BLOCK = 1 << 20  # samples read at once, so that a damaged header cannot take all memory
# Formats that ffmpeg may try, and those whose header states a duration. It has others, which open further files.
STATING = ("aiff", "ape", "asf", "caf", "flv", "matroska", "mov", "rm", "tak", "tta", "wv")
OTHERS = ("aac", "ac3", "amr", "amrnb", "amrwb", "avi", "dts", "eac3", "flac", "g722", "gsm", "loas", "mp3", "mpeg")
FFMPEG_FORMATS = (*STATING, *OTHERS, "mpegts", "nistsphere", "nut", "ogg", "wav")


def read_audio(
    path: str | Path,
    *,
    start: float | None = None,
    end: float | None = None,
    allow_pipes: bool = False,
    key: str | None = None,
) -> tuple[np.ndarray, int]:
    """Read a recording or a piece of it.

    Args:
        path: an audio file, ``"<archive>.ark:<offset>"`` (see ``audio_ark``), or (with ``allow_pipes``)
            ``"command arguments |"`` whose output is an audio file. The command is split as a shell would but run
            without one: no second pipe, no redirection, no variables.
        start, end: the piece in seconds; None for the beginning and the end of the recording.
        key: the key that it must have in the archive; None: any.

    Returns:
        (wave (N,) float32, mean of the channels, [-1, 1] for integer formats; sample rate in Hz, the first one where
        it changes within the recording).

    Raises DataError: missing, unreadable or truncated file, channels that cancel each other, a segment outside the
    recording, a pipe that is not allowed or fails; contains the library's own message.
    """
    name = str(path)
    file_name, offset = locate(name)
    if not name.endswith("|") and not os.path.isfile(file_name):  # also what is too long
        raise DataError(name, "no such audio file", hint="relative paths start at the current directory")
    try:
        if offset is not None:
            return _read(name, io.BytesIO(read_record(name, key)), start, end)
        with io.BytesIO(_run_pipe(name, allow_pipes)) if name.endswith("|") else open(name, "rb", buffering=0) as file:
            return _read(name, file, start, end)
    except OSError as error:
        raise DataError(name, f"cannot be read: {error.strerror or error}", hint=REPAIR_HINT) from error


def read_upload(content: bytes, name: str, max_seconds: float) -> tuple[np.ndarray, int]:
    """Read a file that a stranger sent; formats without a signature are refused.

    Args:
        content: of the file.
        name: what to call it in messages; not the stranger's word, since a suffix chooses how it is read.
        max_seconds: longest recording; a longer one is refused by its header, or when that much was decoded.

    Returns: as ``read_audio``.
    Raises TooLong; DataError: as ``read_audio``, or more samples than usual formats have.
    """
    return _read(name, io.BytesIO(content), None, None, max_seconds)


class TooLong(DataError):
    """A recording that lasts longer than allowed."""

    def __init__(self, path: str | Path, seconds: float, most: float) -> None:
        super().__init__(path, f"too long: {seconds:.2f} s is more than {most:g} s", hint="send a shorter recording")


def _check_size(name: str, seconds: float, samples: float, most: float | None) -> None:
    """Raises TooLong: more than ``most`` seconds; DataError: more samples over all channels than usual formats have."""
    if most is not None and seconds > most:
        raise TooLong(name, seconds, most)
    if most is not None and samples > most * MOST_SAMPLES:
        message = f"too large: {samples:.0f} samples over all channels"
        raise DataError(name, message, hint="convert it to one channel at 16 kHz")


def _read(
    name: str, file: BinaryIO, start: float | None, end: float | None, most: float | None = None
) -> tuple[np.ndarray, int]:
    magic, reason = file.read(4), ""
    streams = ogg_streams(name, file) if magic == b"OggS" else [whole_file(name, file)]
    try:
        if len(streams) > 1:
            runs = []
            for stream in streams:
                if run := _read_soundfile(name, stream, most=most):
                    runs.append(run)
                    _check_size(name, sum(len(wave) / rate for wave, rate in runs), 0, most)
            return _cut(name, *_join(runs), start, end)
        if piece := _read_soundfile(name, streams[0], start, end, most):
            return piece
    except (soundfile.LibsndfileError, soundfile.SoundFileRuntimeError) as error:
        reason = str(getattr(error, "error_string", "") or error).rstrip(".")  # without the path
        if magic == b"fLaC":  # ffmpeg would decode it up to the damage without an error
            raise DataError(name, f"cannot be read: {reason}", hint=REPAIR_HINT) from error
    return _cut(name, *_read_pyav(name, file, reason, most), start, end)


def _read_soundfile(
    name: str, file: BinaryIO, start: float | None = None, end: float | None = None, most: float | None = None
) -> tuple[np.ndarray, int] | None:
    """(N,) float32 and the sample rate in Hz; None where libsndfile has no number of samples."""
    with open_soundfile(name, file) as sound:
        if not states_samples(sound):
            return None
        _check_size(name, sound.frames / sound.samplerate, sound.frames * sound.channels, most)
        first, last = _bounds(name, sound.frames, sound.samplerate, start, end)
        blocks = [np.zeros((0, sound.channels), dtype=np.float32), *soundfile_blocks(name, sound, first, last)]
        return _mono(name, np.concatenate(blocks)), sound.samplerate


def open_soundfile(name: str, file: BinaryIO) -> soundfile.SoundFile:
    """``file`` from its beginning, through libsndfile; ``file`` stays open when what is returned is closed."""
    file.seek(0)
    # by its descriptor, or soundfile takes a format from the suffix; raw GSM and VOX have no other sign
    source: io.BytesIO | int | bytes = file if isinstance(file, io.BytesIO) else file.fileno()
    if name.lower().endswith((".gsm", ".vox")):
        source = os.fsencode(name)
    return soundfile.SoundFile(source, closefd=False)


def states_samples(sound: soundfile.SoundFile) -> bool:
    """False: libsndfile only estimates their number, or has none (a FLAC stream that states none)."""
    return sound.format not in ("MP3", "MPEG") and sound.frames < 1 << 48


def soundfile_blocks(
    name: str, sound: soundfile.SoundFile, first: int, last: int, size: int = BLOCK
) -> Iterator[np.ndarray]:
    """Samples ``first`` to ``last`` (exclusive) in blocks (n, C) float32 of ``size``, the last one of what is left."""
    if first:
        sound.seek(first)
    left = last - first
    while left > 0 and len(block := sound.read(min(left, size), dtype="float32", always_2d=True)):
        left -= len(block)
        yield block
    if left > 0:
        raise cut_short(name, f"{last - first - left} of {last - first} samples could be read")


def _read_pyav(name: str, file: BinaryIO, reason: str, most: float | None) -> tuple[np.ndarray, int]:
    """(N,) float32 and the sample rate in Hz, through ffmpeg's decoders; ``reason``: why libsndfile did not read it."""
    runs: list[tuple[int, int, list[np.ndarray]]] = []  # (channels, Hz, pieces (n, C)) that follow each other
    seconds, count = 0.0, 0  # so far; samples over all channels
    for samples, rate in pyav_blocks(name, file, reason):
        seconds, count = seconds + len(samples) / rate, count + samples.size
        _check_size(name, seconds, count, most)
        if not runs or runs[-1][:2] != (samples.shape[1], rate):
            runs.append((samples.shape[1], rate, []))
        runs[-1][2].append(samples)
    return _join([(_mono(name, np.concatenate(pieces)), rate) for _, rate, pieces in runs])


def pyav_blocks(name: str, file: BinaryIO, reason: str = "") -> Iterator[tuple[np.ndarray, int]]:
    """Frames (n, C) float32 and their sample rate in Hz, as ffmpeg decodes them; both may change within a recording."""
    import av

    states = (*STATING, "mp3") if counts_mp3_frames(file) else STATING
    stated = reached = 0.0  # seconds
    first: np.ndarray | None = None  # frame
    last_rate = 0
    try:
        with open_pyav(name, file) as container:
            if not container.streams.audio:
                raise DataError(name, "has no audio stream", hint="list another file")
            audio = container.streams.audio[0]
            if not set(states).isdisjoint(container.format.name.split(",")):
                stated = pyav_seconds(container)
            for packet in container.demux():
                counts = packet.stream is audio or not audio.duration
                if counts and packet.pts is not None and packet.dts is not None:
                    reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                for frame in packet.decode() if packet.stream is audio else ():
                    assert isinstance(frame, av.AudioFrame)
                    samples = _samples(frame)
                    if not last_rate:
                        first = samples
                    else:
                        if first is not None:  # ffmpeg may give it the rate that it saw last in probing
                            yield first, frame.sample_rate
                            first = None
                        yield samples, frame.sample_rate
                    last_rate = frame.sample_rate
    except (av.FFmpegError, OSError, ValueError) as error:
        message = str(getattr(error, "strerror", None) or error)
        message = f"{reason}; ffmpeg: {message}" if reason else message
        raise DataError(name, f"cannot be read: {message}", hint=REPAIR_HINT) from error
    if stated - reached > MAX_MISSING:
        raise cut_short(name, f"it has {reached:.2f} of the {stated:.2f} s that its header states")
    if not last_rate:
        raise DataError(name, "cannot be read: there is no audio in it", hint=REPAIR_HINT)
    if first is not None:
        yield first, last_rate


def open_pyav(name: str, file: BinaryIO) -> av.container.InputContainer:
    """``file`` from its beginning, through ffmpeg's demuxers."""
    import av

    file.seek(0)
    return av.open(
        file if isinstance(file, io.BytesIO) else name,
        "r",
        # raw G.722 has no header to recognise it by
        format="g722" if name.lower().endswith(".g722") else None,
        container_options={"format_whitelist": ",".join(FFMPEG_FORMATS)},
    )


def pyav_seconds(container: av.container.InputContainer) -> float:
    """Duration that the container states or ffmpeg estimates, of the longest stream where the audio has none; or 0."""
    import av

    audio = container.streams.audio[0]
    if audio.duration and audio.time_base:
        return float(audio.duration * audio.time_base)
    return (container.duration or 0) / av.time_base


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """A decoded frame (n, C) float32, integers scaled to [-1, 1]."""
    samples: np.ndarray = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32, copy=False)


def _mono(name: str, wave: np.ndarray) -> np.ndarray:
    """The mean (N,) of the channels (N, C)."""
    if wave.shape[1] == 1:
        return wave[:, 0]
    mean, energies = downmix(wave)
    check_channels(name, energies)
    return mean


def downmix(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (N,) of the channels (N, C), and the energies of each channel and of the mean, float64 (C + 1,)."""
    with np.errstate(invalid="ignore", over="ignore"):  # samples that are not finite are looked for later
        mean: np.ndarray = wave.mean(axis=1, dtype=np.float32)
        energies = [np.square(one, dtype=np.float64).sum() for one in (*wave.T, mean)]
    return mean, np.array(energies)


def check_channels(name: str, energies: np.ndarray) -> None:
    """Raises DataError: by the ``energies`` that ``downmix`` returned, their mean is nearly silent and they are not."""
    channels = len(energies) - 1
    if channels * np.sqrt(energies[-1]) < CANCELLED * np.sqrt(energies[:-1].max()):
        hint = "list a copy with one of the channels: some cables and players invert the other one"
        raise DataError(name, "the channels cancel each other: their mean is nearly silent", hint=hint)


def _join(runs: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    """Waves (n,) that follow each other as one (N,) at the rate of the first."""
    rate = runs[0][1]
    return np.concatenate([resample(wave, found, rate) for wave, found in runs]), rate


def _cut(name: str, wave: np.ndarray, rate: int, start: float | None, end: float | None) -> tuple[np.ndarray, int]:
    """A segment, given in seconds, of a whole recording (N,)."""
    first, last = _bounds(name, len(wave), rate, start, end)
    return wave[first:last], rate


def _bounds(name: str, frames: int, rate: int, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last sample (exclusive) of a segment given in seconds."""
    first = 0 if start is None else round(start * rate)
    last = frames if end is None else round(end * rate)
    if first >= frames > 0 or last - frames > MAX_OVERSHOOT * rate:
        message = f"the segment {start} to {end} s is outside the recording ({frames / rate:.3f} s)"
        raise DataError(name, message, hint="correct start and end in segments")
    return first, min(last, frames)


def _run_pipe(value: str, allow_pipes: bool) -> bytes:
    """The output of the command in a ``wav.scp`` value that ends in ``|``."""
    if not allow_pipes:
        raise DataError(value, "is a command, and commands are refused", hint="pass --allow-pipes if you trust it")
    try:
        command = shlex.split(value[:-1])
    except ValueError as error:
        raise DataError(value, f"cannot be split into words ({error})", hint="repair the quotes") from error
    if not command or any("|" in word for word in command):
        hint = "put the commands into an executable script and list '<script> <arguments> |'"
        raise DataError(value, "is not one command", hint=hint)
    try:
        result = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise DataError(value, f"cannot be run ({error.strerror})", hint="install the program") from error
    if result.returncode != 0:
        lines = result.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        message = f"exited with status {result.returncode}: {lines[-1]}"
        raise DataError(value, message, hint="run the command by hand and repair it")
    return result.stdout


def resample(wave: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample ``wave`` (N,) from ``from_hz`` to ``to_hz`` with ``RESAMPLER``; the same array when they are equal."""
    if from_hz == to_hz:
        return wave
    return soxr.resample(wave, from_hz, to_hz, quality=QUALITY).astype(np.float32, copy=False)
