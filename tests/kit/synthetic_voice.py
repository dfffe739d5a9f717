"""Vowels in a row, which the voice activity model takes for speech."""

from pathlib import Path

import numpy as np
import soundfile

from pam_espnet.data.audio import resample

RATE = 16000
FORMANTS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))  # Hz
SYLLABLE = 0.22  # seconds


def voice(seconds: float, pitch: float = 120.0) -> np.ndarray:
    """Random vowels at a wavering pitch (N,), float32."""
    rng = np.random.default_rng(0)
    time = np.arange(round(seconds * RATE)) / RATE
    turns = np.arange(0, seconds + 1, 0.3)
    wavering = np.interp(time, turns, pitch * rng.uniform(0.8, 1.3, len(turns)))
    phase = 2 * np.pi * np.cumsum(wavering) / RATE
    vowels = rng.integers(len(FORMANTS), size=int(seconds / SYLLABLE) + 1)
    wave = np.zeros(len(time))
    for k in range(1, 31):
        near = [sum(np.exp(-(((k * pitch - f) / 120) ** 2)) for f in formants) for formants in FORMANTS]
        wave += (np.array(near)[vowels] / k**0.5)[(time / SYLLABLE).astype(int)] * np.sin(k * phase)
    wave *= np.sin(np.pi * (time / SYLLABLE % 1)) ** 0.7
    wave += 0.02 * rng.standard_normal(len(time))
    return (0.5 * wave / max(1.0, np.abs(wave).max())).astype(np.float32)


def hiss(seconds: float) -> np.ndarray:
    """Quiet noise (N,), float32."""
    return (0.003 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)


def write_talk(folder: Path, count: int) -> Path:
    """``count`` voices of one to two seconds between noise and digital silence, 22050 Hz, stereo; a pause ends it."""
    parts = [hiss(3.0)]
    for number in range(count):
        parts += [voice(1.0 + number / count, 90 + 8 * number), hiss(2.0) if number % 2 else np.zeros(4 * RATE, "f4")]
    wave = resample(np.concatenate(parts), RATE, 22050)
    soundfile.write(folder / "talk.flac", np.stack([wave, wave], axis=1), 22050)
    return folder / "talk.flac"
