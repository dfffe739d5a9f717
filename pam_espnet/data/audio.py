"""Reading audio: one utterance as a mono float32 wave, and resampling it.

libsndfile (soundfile) reads what it can; PyAV (ffmpeg) the formats it does not know, and MP3. Shape letter: N samples.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import soxr

from pam_espnet.errors import DataError

_QUALITY = "HQ"
RESAMPLER = f"soxr {soxr.__version__} {_QUALITY}"
# PyAV is asked for these only: ffmpeg would decode a damaged FLAC or WAV up to the damage without an error.
PYAV_SUFFIXES = frozenset((".g722", ".m4a", ".mp3", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".wma", ".amr", ".opus"))
STREAMED = 0x7FFFFF00  # bytes; a program that writes into a pipe promises so many, or more, and knows no better
REPAIR_HINT = "copy, download or convert it again (FLAC and WAV always work), or remove the utterance"
MAX_OVERSHOOT = 0.5  # seconds a segment may end after its recording; rounded time stamps often do


def read_audio(
    path: str | Path, *, start: float | None = None, end: float | None = None, allow_pipes: bool = False
) -> tuple[np.ndarray, int]:
    """Read a recording or a piece of it.

    Args:
        path: an audio file, or (with ``allow_pipes``) ``"command arguments |"`` whose output is an audio file. The
            command is split as a shell would but run without one: no second pipe, no redirection, no variables.
        start: first second of the piece; None for the beginning.
        end: last second of the piece; None for the end.

    Returns:
        (wave (N,) float32, mean of the channels, [-1, 1] for integer formats; sample rate in Hz).

    Raises:
        DataError: missing, unreadable or truncated file, a segment outside the recording, a pipe that is not
            allowed or fails; carries the library's own message.
    """
    name = str(path)
    if name.endswith("|"):
        source: str | io.BytesIO = io.BytesIO(_run_pipe(name, allow_pipes))
    elif Path(name).is_file():
        source = name
    else:
        raise DataError(name, "no such audio file", hint="relative paths start at the current directory")
    try:
        piece = _read_soundfile(name, source, start, end)
    except (soundfile.LibsndfileError, soundfile.SoundFileRuntimeError) as error:
        if Path(name).suffix.lower() not in PYAV_SUFFIXES:
            reason = str(getattr(error, "error_string", "") or error)  # without the path, which is named already
            raise DataError(name, f"cannot be read: {reason}", hint=REPAIR_HINT) from error
        piece = None
    if piece is None:
        wave, rate = _read_pyav(name, source)
        first, last = _bounds(name, len(wave), rate, start, end)
        piece = wave[first:last], rate
    wave, rate = piece
    return np.ascontiguousarray(wave.mean(axis=1, dtype=np.float32)), rate


def _read_soundfile(
    name: str, source: str | io.BytesIO, start: float | None, end: float | None
) -> tuple[np.ndarray, int] | None:
    """(N, channels) float32 and the sample rate in Hz; None for MP3, whose number of samples libsndfile guesses."""
    with soundfile.SoundFile(os.fsencode(source) if isinstance(source, str) else source) as file:
        if file.format in ("MP3", "MPEG"):
            return None
        # libsndfile mends the length in a WAV header and says so only there.
        mended = re.search(r"^\s*data\s*:\s*(\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        if mended and int(mended[2]) < int(mended[1]) < STREAMED:
            message = f"is cut short: it has {mended[2]} of the {mended[1]} bytes that its header promises"
            raise DataError(name, message, hint=REPAIR_HINT)
        first, last = _bounds(name, file.frames, file.samplerate, start, end)
        if first:
            file.seek(first)
        wave = file.read(last - first, dtype="float32", always_2d=True)
        if len(wave) < last - first:
            message = f"is cut short: {len(wave)} of {last - first} samples could be read"
            raise DataError(name, message, hint=REPAIR_HINT)
        return wave, file.samplerate


def _bounds(name: str, frames: int, rate: int, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last sample (exclusive) of a segment given in seconds."""
    first = 0 if start is None else round(start * rate)
    last = frames if end is None else round(end * rate)
    if first >= frames > 0 or last - frames > MAX_OVERSHOOT * rate:
        message = f"the segment {start} to {end} s is outside the recording ({frames / rate:.3f} s)"
        raise DataError(name, message, hint="correct start and end in segments")
    return first, min(last, frames)


def _read_pyav(name: str, source: str | io.BytesIO) -> tuple[np.ndarray, int]:
    """(N, channels) float32 and the sample rate in Hz, through ffmpeg's decoders."""
    import av

    if isinstance(source, io.BytesIO):
        source.seek(0)
    # raw G.722 has no header to recognise it by, so its format is named
    container_format = "g722" if name.lower().endswith(".g722") else None
    pieces: list[np.ndarray] = []
    rate = 0
    try:
        with av.open(source, mode="r", format=container_format) as container:
            if not container.streams.audio:
                raise DataError(name, "has no audio stream", hint="list another file")
            # planar float: one row per channel, whatever the codec gives
            to_float = av.AudioResampler(format="fltp")
            for frame in container.decode(audio=0):
                rate = frame.sample_rate
                pieces.extend(part.to_ndarray() for part in to_float.resample(frame))
            if rate:
                pieces.extend(part.to_ndarray() for part in to_float.resample(None))
    except (av.FFmpegError, OSError) as error:
        raise DataError(name, f"cannot be read: {error}", hint=REPAIR_HINT) from error
    if not pieces:
        raise DataError(name, "cannot be read: there is no audio in it", hint=REPAIR_HINT)
    return np.concatenate(pieces, axis=1).T, rate


def _run_pipe(value: str, allow_pipes: bool) -> bytes:
    """The output of the command in a ``wav.scp`` value that ends in ``|``."""
    if not allow_pipes:
        raise DataError(value, "is a command, and commands are refused", hint="pass --allow-pipes if you trust it")
    try:
        command = shlex.split(value[:-1])
    except ValueError as error:
        raise DataError(value, f"cannot be split into words ({error})", hint="repair the quotes") from error
    if not command:
        raise DataError(value, "is an empty command", hint="write the command before the '|'")
    if any("|" in word for word in command):
        hint = "put the commands into an executable script and list '<script> <arguments> |'"
        raise DataError(value, "is a pipeline of several commands", hint=hint)
    try:
        result = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise DataError(value, f"cannot be run ({error.strerror})", hint="install the program") from error
    if result.returncode != 0:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        message = f"exited with status {result.returncode}: {lines[-1] if lines else 'no message'}"
        raise DataError(value, message, hint="run the command by hand and repair it")
    return result.stdout


def to_pcm16(wave: np.ndarray) -> tuple[np.ndarray, int]:
    """``wave`` (N,) float in [-1, 1] as (int16 samples (N,), how many of them were clipped)."""
    scaled = np.round(wave.astype(np.float64) * 32768)
    clipped = int(np.count_nonzero((scaled < -32768) | (scaled > 32767)))
    return np.clip(scaled, -32768, 32767).astype("<i2"), clipped


def pcm16_sha256(samples: np.ndarray) -> str:
    """SHA-256 of int16 samples (N,) as little-endian bytes: the audio's identity, whatever file format holds it."""
    return hashlib.sha256(np.ascontiguousarray(samples, dtype="<i2").tobytes()).hexdigest()


def resample(wave: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample ``wave`` (N,) from ``from_hz`` to ``to_hz`` with ``RESAMPLER``; the same array when they are equal."""
    if from_hz == to_hz:
        return wave
    return soxr.resample(wave, from_hz, to_hz, quality=_QUALITY).astype(np.float32, copy=False)
