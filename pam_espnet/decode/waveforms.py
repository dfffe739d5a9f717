"""Waveforms that programs hand in: checked, and brought to float32 at full scale 1."""

from typing import Any

import numpy as np

from pam_espnet.errors import ConfigError

SAMPLE_FORMATS = ("int16", "int32", "uint8")  # of WAV files; 24 bits are read as the upper ones of int32
MAX_PEAK = 8.0  # 18 dB above full scale: no mixture gets there, integers that were cast to float do


def as_waveform(wave: Any, name: str) -> np.ndarray:
    """``wave`` (N,) as float32 in [-1, 1]; integers are scaled by the range of their type.

    Args:
        wave: an array, or what numpy makes one of: a list, a tensor on the CPU.
        name: what to call it in messages.

    Raises ConfigError: not (N,), no samples, another type, NaN or infinite, or float samples far beyond full scale.
    """
    try:
        wave = np.asarray(wave)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths, a tensor on a GPU
        raise ConfigError(f"{name}: is no array of samples: {error}") from error
    if wave.ndim != 1:
        mono = "wave[0]" if wave.ndim == 2 and len(wave) == 1 else "wave.mean(axis=...) over the channels"
        raise ConfigError(f"{name}: has shape {wave.shape}; must be mono, of shape (N,)\n  -> hand in {mono}")
    if len(wave) == 0:
        raise ConfigError(f"{name}: has no samples")
    if wave.dtype.name in SAMPLE_FORMATS:
        half = 2.0 ** (8 * wave.dtype.itemsize - 1)
        return ((wave - (half if wave.dtype.kind == "u" else 0.0)) / half).astype(np.float32)
    if wave.dtype.kind != "f":
        formats = ", ".join(SAMPLE_FORMATS)
        raise ConfigError(f"{name}: samples are {wave.dtype}; must be float in [-1, 1], or one of {formats}")
    if bad := int(np.count_nonzero(~np.isfinite(wave))):
        raise ConfigError(f"{name}: {bad} of {len(wave)} samples are NaN or infinite")
    if (peak := float(np.abs(wave).max())) > MAX_PEAK:
        raise ConfigError(
            f"{name}: its peak is {peak:g}; float samples must be within [-1, 1]\n"
            "  -> divide by the full scale of the file's format: 32768 for 16 bits"
        )
    return wave.astype(np.float32, copy=False)
