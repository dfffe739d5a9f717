"""Recordings of any length as a stream of mono float32 blocks at one sample rate; memory does not grow with the length.

Shape letters: N samples, C channels.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from pam_espnet.data.audio import (
    QUALITY,
    check_channels,
    downmix,
    open_pyav,
    open_soundfile,
    pyav_blocks,
    pyav_seconds,
    soundfile_blocks,
    states_samples,
)
from pam_espnet.data.audio_header import REPAIR_HINT, ogg_streams, whole_file
from pam_espnet.errors import DataError

BLOCK_SECONDS = 5.0
JUDGED_SECONDS = 30.0  # before channels are said to cancel each other; a quiet beginning may do so


def stream_audio(path: str | Path, rate: int) -> Iterator[np.ndarray]:
    """Blocks (N,) float32 at ``rate`` Hz, the mean of the channels, about ``BLOCK_SECONDS`` each.

    Joined, they are what ``read_audio`` and ``resample`` make of the file, up to rounding.

    Raises DataError: as ``read_audio`` does, a damaged place when it is reached; samples that are NaN or infinite.
    """
    name = str(path)
    if not os.path.isfile(name):
        raise DataError(name, "no such audio file", hint="relative paths start at the current directory")
    try:
        with open(name, "rb", buffering=0) as file:
            runs = itertools.groupby(_blocks(name, file), key=lambda block: (block[0].shape[1], block[1]))
            for (_, found), blocks in runs:
                yield from _resampled(_mono(name, (samples for samples, _ in blocks), found), found, rate)
    except OSError as error:
        raise DataError(name, f"cannot be read: {error.strerror or error}", hint=REPAIR_HINT) from error


def stated_seconds(path: str | Path) -> float | None:
    """The duration that a file's header states or ffmpeg estimates, for progress bars; None: neither, or no audio."""
    import av

    try:
        with open(path, "rb", buffering=0) as file:
            try:
                with open_soundfile(str(path), file) as sound:
                    if states_samples(sound):
                        return float(sound.frames / sound.samplerate)
            except soundfile.LibsndfileError:
                pass  # one of ffmpeg's formats
            with open_pyav(str(path), file) as container:
                return (container.streams.audio and pyav_seconds(container)) or None
    except (OSError, ValueError, av.FFmpegError):
        return None


def longer_than(path: str | Path, seconds: float) -> bool:
    """Whether a recording goes on after ``seconds``; reads no more of it. Raises DataError: as ``stream_audio``."""
    rate, samples = 16000, 0
    return any((samples := samples + len(block)) > seconds * rate for block in stream_audio(path, rate))


def _blocks(name: str, file: BinaryIO) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks (n, C) float32 as they are decoded, and their sample rate in Hz."""
    magic, reason, begun = file.read(4), "", False
    streams = ogg_streams(name, file) if magic == b"OggS" else [whole_file(name, file)]
    try:
        for stream in streams:
            with open_soundfile(name, stream) as sound:
                if not states_samples(sound):
                    break
                size = round(BLOCK_SECONDS * sound.samplerate)
                for block in soundfile_blocks(name, sound, 0, sound.frames, size):
                    begun = True
                    yield block, sound.samplerate
        else:
            return
    except (soundfile.LibsndfileError, soundfile.SoundFileRuntimeError) as error:
        reason = str(getattr(error, "error_string", "") or error).rstrip(".")
        if begun or magic == b"fLaC":
            raise DataError(name, f"cannot be read: {reason}", hint=REPAIR_HINT) from error
    if begun:
        raise DataError(name, "cannot be read: one of its joined streams states no length", hint=REPAIR_HINT)
    yield from pyav_blocks(name, file, reason)


def _mono(name: str, blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """The mean (N,) of the channels of blocks (n, C), joined to blocks of at least ``BLOCK_SECONDS`` but the last."""
    held: list[np.ndarray] = []
    samples, energies = 0, np.zeros(1)
    for block in itertools.chain(blocks, [None]):
        held += [] if block is None else [block]
        size = sum(map(len, held))
        if size and (block is None or size >= BLOCK_SECONDS * rate):
            mean, found = downmix(np.concatenate(held))
            if not np.isfinite(found).all():
                when = f"between {samples / rate:.1f} and {(samples + size) / rate:.1f} s"
                raise DataError(name, f"not finite: samples {when} are NaN or infinite", hint=REPAIR_HINT)
            held, samples, energies = [], samples + size, energies + found
            if samples >= JUDGED_SECONDS * rate:
                check_channels(name, energies)
            yield mean
    if samples:
        check_channels(name, energies)


def _resampled(blocks: Iterator[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    """Blocks (N,) at ``rate`` Hz as such at ``wanted`` Hz."""
    if rate == wanted:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality=QUALITY)
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
