"""Audio as 16-bit samples: from float waves, to files, and what identifies it. N samples."""

import hashlib
import io
from pathlib import Path

import numpy as np
import soundfile

from pam_espnet.fileio import atomic_path


def to_pcm16(wave: np.ndarray) -> tuple[np.ndarray, int]:
    """``wave`` (N,) float in [-1, 1] as (int16 samples (N,), how many of them were clipped)."""
    scaled = np.round(wave.astype(np.float64) * 32768)
    clipped = int(np.count_nonzero((scaled < -32768) | (scaled > 32767)))
    return np.clip(scaled, -32768, 32767).astype("<i2"), clipped


def encode_audio(samples: np.ndarray, rate: int, audio_format: str) -> bytes:
    """The bytes of a "flac" or "wav" file with int16 ``samples`` (N,)."""
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, rate, subtype="PCM_16", format=audio_format.upper())
    return encoded.getvalue()


def write_audio(path: str | Path, samples: np.ndarray, rate: int, audio_format: str) -> None:
    """Write int16 ``samples`` (N,) as "flac" or "wav", a whole file or none.
    Raises OSError: a full disk among others, which libsndfile does not name, or not notice, where it writes the
    file.
    """
    with atomic_path(path) as tmp:
        tmp.write_bytes(encode_audio(samples, rate, audio_format))


def pcm16_sha256(samples: np.ndarray) -> str:
    """SHA-256 of int16 samples (N,) as little-endian bytes: the audio's identity, whatever file format holds it."""
    return hashlib.sha256(np.ascontiguousarray(samples, dtype="<i2").tobytes()).hexdigest()
