"""Signal operations for clips made from recordings: levels, pauses, speed, fades, noise.

Shape letter: N samples, at ``SAMPLE_RATE``.
"""

import numpy as np

from pam_espnet.data.audio import resample

SAMPLE_RATE = 16000  # Hz
FRAME = SAMPLE_RATE // 50  # samples of a 20 ms frame


def frame_levels(wave: np.ndarray) -> np.ndarray:
    """Level of each 20 ms frame in dB relative to full scale; ``wave`` (N,)."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    return 10 * np.log10(np.mean(frames**2, axis=1) + 1e-10)


def speech_only(wave: np.ndarray, below_peak: float = 35.0) -> np.ndarray:
    """``wave`` (N,) without its pauses: frames ``below_peak`` dB quieter than the loudest one, save 0.1 s margins."""
    levels = frame_levels(wave)
    if not len(levels):
        return wave[:0]
    active = levels > levels.max() - below_peak
    keep = np.convolve(active, np.ones(11))[5 : 5 + len(active)] > 0.5  # and 5 frames on each side
    return wave[: len(keep) * FRAME][np.repeat(keep, FRAME)]


def trim_start(wave: np.ndarray, below_peak: float = 35.0) -> np.ndarray:
    """``wave`` (N,) from its first frame on that is at most ``below_peak`` dB quieter than the loudest one."""
    levels = frame_levels(wave)
    if not len(levels):
        return wave[:0]
    return wave[int(np.argmax(levels > levels.max() - below_peak)) * FRAME :]


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """``wave`` (N,) played ``factor`` times as fast: tempo and pitch change together."""
    return resample(wave, round(SAMPLE_RATE * factor), SAMPLE_RATE)


def set_level(wave: np.ndarray, level: float, peak: float = 0.97) -> np.ndarray:
    """``wave`` (N,) scaled to ``level`` dB RMS re full scale, or less where its peak would pass ``peak``."""
    rms = float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    highest = float(np.abs(wave).max(initial=0.0))
    if rms == 0.0:
        return wave
    return (wave * min(10 ** (level / 20) / rms, peak / highest)).astype(np.float32)


def fade(wave: np.ndarray, seconds: float = 0.01) -> np.ndarray:
    """``wave`` (N,) with linear fades at both ends, so that a cut does not click."""
    size = min(round(seconds * SAMPLE_RATE), len(wave) // 2)
    ramp = np.linspace(0.0, 1.0, size, endpoint=False, dtype=np.float32)
    return np.concatenate([wave[:size] * ramp, wave[size : len(wave) - size], wave[len(wave) - size :] * ramp[::-1]])


def coloured_noise(rng: np.random.Generator, samples: int, slope: float = 1.0) -> np.ndarray:
    """Noise (N,) whose power falls as 1 / f**slope above 50 Hz (1 is pink), RMS 1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum *= np.maximum(frequencies, 50.0) ** (-slope / 2)
    spectrum[0] = 0.0
    noise = np.fft.irfft(spectrum, samples)
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)
