"""Where a recording is cut: at pauses between speech, or into windows of one length. Pieces never overlap.

Dimension letters: N samples, T frames of ``FRAME`` samples.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pam_espnet.decode.voice_activity import FRAME

PAUSE = 0.5  # seconds without speech at which a piece ends
MARGIN = 0.2  # seconds of the pause that stay on each side of a piece: the model may find speech a little late
MIN_SPEECH = 0.12  # seconds; less in a whole piece is a click
QUIET = 5  # frames over which the level is averaged where speech without a pause is cut


@dataclass(frozen=True)
class Piece:
    """A part of a recording."""

    wave: np.ndarray  # (N,)
    start: float  # seconds
    end: float


def cut_at_pauses(
    blocks: Iterable[np.ndarray], rate: int, has_speech: Callable[[np.ndarray], np.ndarray], max_seconds: float
) -> Iterator[Piece]:
    """The parts of a recording that have speech, one between two pauses.

    Speech that lasts longer than ``max_seconds`` is cut where it is quietest in the second half of that time.

    Args:
        blocks: waves (N,) that follow each other, float32 at ``rate`` Hz.
        has_speech: frames (T, FRAME) that follow each other to bool (T,).
    """
    pause, margin, least = (max(1, round(seconds * rate / FRAME)) for seconds in (PAUSE, MARGIN, MIN_SPEECH))
    most = int(max_seconds * rate / FRAME)
    held, speech, first = np.zeros((0, FRAME), dtype=np.float32), np.zeros(0, dtype=bool), 0  # frames from ``first`` on
    begin: int | None = None  # of the piece that is not done
    done, last = -1, 0  # end of the last piece, last frame with speech
    total = 0  # samples so far

    def piece(start: int, end: int) -> Iterator[Piece]:
        # the rest of speech that was cut is no click, however short
        if start == done or np.count_nonzero(speech[start - first : end - first]) >= least:
            wave = held[start - first : end - first].reshape(-1)[: total - start * FRAME]
            yield Piece(wave, start * FRAME / rate, (start * FRAME + len(wave)) / rate)

    for frames, samples in _frames(blocks):
        total += samples
        found = has_speech(frames)
        held, speech = np.concatenate([held, frames]), np.concatenate([speech, found])
        end = first + len(held)
        for at in range(end - len(frames), end):
            if speech[at - first]:
                begin, last = max(0, done, at - margin) if begin is None else begin, at
            if begin is None or (at - last < pause and at + 1 - begin < most):
                continue
            finish = last + 1 + margin
            if at - last < pause:  # the rest is long enough to be encoded
                half = begin + most // 2
                finish = half + _quietest(held[half - first : at + 1 - least - first])
            yield from piece(begin, finish)
            begin, done = finish if last >= finish else None, finish
        kept = end - margin if begin is None else begin
        held, speech, first = held[max(0, kept - first) :], speech[max(0, kept - first) :], max(first, kept)
    if begin is not None:
        yield from piece(begin, min(last + 1 + margin, first + len(held)))


def cut_into_windows(blocks: Iterable[np.ndarray], rate: int, seconds: float, least: float = 0.1) -> Iterator[Piece]:
    """Windows of ``seconds``, one after the other; the last one of what is left, if that is ``least`` seconds."""
    size, start, held = round(seconds * rate), 0, np.zeros(0, dtype=np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= size:
            yield Piece(held[:size], start / rate, (start + size) / rate)
            held, start = held[size:], start + size
    if len(held) >= least * rate:
        yield Piece(held, start / rate, (start + len(held)) / rate)


def _frames(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Frames (T, FRAME), the very last one filled up with zeros, and the number of samples in them."""
    rest = np.zeros(0, dtype=np.float32)
    for block in blocks:
        wave = np.concatenate([rest, block])
        whole = len(wave) // FRAME * FRAME
        rest = wave[whole:]
        if whole:
            yield wave[:whole].reshape(-1, FRAME), whole
    if len(rest):
        yield np.pad(rest, (0, FRAME - len(rest)))[None], len(rest)


def _quietest(frames: np.ndarray) -> int:
    """The index of the frame (T, FRAME) around which the level is lowest."""
    energies = np.square(frames, dtype=np.float64).mean(axis=1)
    around = np.convolve(energies, np.ones(QUIET), "same") / np.convolve(np.ones(len(energies)), np.ones(QUIET), "same")
    return int(np.argmin(around))
