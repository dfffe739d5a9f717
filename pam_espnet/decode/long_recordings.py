"""Recordings of any length through a ``SpeechLLM``: cut, answered in batches, yielded in their order with their times.

Memory does not grow with the length: at most one batch's pieces are held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pam_espnet.config import check_number
from pam_espnet.data.audio_stream import stream_audio
from pam_espnet.data.format import SILENCE_PEAK, Settings, as_formatted
from pam_espnet.decode.batches import CPU_BATCH, MOST_UTTERANCES, in_batches, plan_batches, split
from pam_espnet.decode.segments import Piece, cut_at_pauses, cut_into_windows
from pam_espnet.decode.voice_activity import RATE, VoiceActivity
from pam_espnet.errors import ConfigError

if TYPE_CHECKING:
    from pam_espnet.decode.answers import Answer
    from pam_espnet.decode.speech_llm import SpeechLLM

MAX_SECONDS = 30.0  # of a piece
MIN_SECONDS = 0.1  # of a piece, as of a recording in stage 2


@dataclass(frozen=True)
class Segment:
    """The answer about a part of a recording."""

    start: float  # seconds
    end: float
    text: str  # "" where it is silent
    answer: Answer | None  # with its n-best; None: silent, not decoded


def answer_pieces(
    speech: SpeechLLM, pieces: Iterable[Piece], prompt: str, task: str | None, name: str = "recording"
) -> Iterator[Segment]:
    """Answers about ``pieces`` in their order; a batch of them is read, then yielded.

    Args:
        name: of the recording, for messages.

    Raises DataError: samples far beyond full scale; ConfigError, PamError: as ``SpeechLLM.answer``, ``in_batches``.
    """
    for group in batched(pieces, MOST_UTTERANCES if speech.on_gpu else CPU_BATCH):
        waves = {index: wave for index, piece in enumerate(group) if len(wave := formatted_piece(speech, piece, name))}
        order = sorted(waves, key=lambda index: -len(waves[index]))
        seconds = [len(waves[index]) / speech.model.frontend.sample_rate for index in order]
        sizes = plan_batches(speech, [prompt] * len(order), seconds) if order else []

        def answers(batch: list[int], waves: dict[int, np.ndarray] = waves) -> list[Answer]:
            tasks = None if task is None else [task] * len(batch)
            return speech.answer([waves[index] for index in batch], [prompt] * len(batch), tasks)

        found: dict[int, Answer] = {}
        for batch, some in in_batches(speech, split(order, sizes), answers, lambda _: None, lambda _: name):
            found.update(zip(batch, some, strict=True))
        for index, piece in enumerate(group):
            answer = found.get(index)
            yield Segment(piece.start, piece.end, answer.texts[0] if answer else "", answer)


def cut_recording(speech: SpeechLLM, path: str | Path, window: float | None, max_seconds: float) -> Iterator[Piece]:
    """Pieces of a recording: see ``cut_blocks``. Raises DataError: as ``stream_audio``."""
    return cut_blocks(speech, stream_audio(path, speech.model.frontend.sample_rate), window, max_seconds)


def cut_blocks(
    speech: SpeechLLM, blocks: Iterable[np.ndarray], window: float | None, max_seconds: float
) -> Iterator[Piece]:
    """Pieces of a recording: windows of ``window`` seconds, or, where that is None, what lies between pauses, at most
    ``max_seconds`` each.

    Args:
        blocks: waves (N,) that follow each other, float32 at the frontend's sample rate.

    Raises ConfigError: lengths that cannot be, a sample rate that the voice activity model does not know.
    """
    rate = speech.model.frontend.sample_rate
    if window is not None:
        check_number(window, "window", at_least=MIN_SECONDS)
        return cut_into_windows(blocks, rate, window, MIN_SECONDS)
    check_number(max_seconds, "max_seconds", at_least=1)
    if rate != RATE:
        raise ConfigError(f"pauses are found at {RATE} Hz, and this model works at {rate} Hz\n  -> give a window")
    activity = VoiceActivity()
    return cut_at_pauses(blocks, rate, lambda frames: activity(frames) > 0.5, max_seconds)


def formatted_piece(speech: SpeechLLM, piece: Piece, name: str) -> np.ndarray:
    """The piece's wave (N,) with the 16 bits of stage 2; (0,) where it is silent."""
    if np.abs(piece.wave).max() < SILENCE_PEAK:
        return piece.wave[:0]
    rate = speech.model.frontend.sample_rate
    part = f"{name}: {piece.start:.1f} to {piece.end:.1f} s"
    return as_formatted(part, piece.wave, rate, Settings(rate, "flac", np.inf, 0))
