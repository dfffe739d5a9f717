"""Clips in which several people talk at once, after LibriCount (Stöter, Chakrabarty, Edler and Habets: CountNet, 2018).

All voices of a clip have the same power (0 dB), so the number of voices is not the level of one of them. Shape
letters: N samples, K voices.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pam_espnet.data.signals import FRAME, coloured_noise, fade, frame_levels, set_level

MIX_LEVEL = (-26.0, -20.0)  # dB RMS of a clip with voices
EMPTY_LEVEL = (-50.0, -30.0)  # dB RMS of a clip without
VOICE_LEVEL = -23.0  # dB RMS of each voice before they are added


def choose_voices(rng: np.random.Generator, voices: Mapping[str, str], number: int) -> list[str]:
    """``number`` voices of ``voices`` {voice: group}, no two of one group, every voice equally likely to come first.
    Raises ValueError: there are fewer groups."""
    chosen: list[str] = []
    for voice in rng.permutation(sorted(voices)).tolist():
        if len(chosen) < number and voices[voice] not in {voices[other] for other in chosen}:
            chosen.append(voice)
    if len(chosen) < number:
        raise ValueError(f"{number} voices wanted, {len(chosen)} groups are there")
    return chosen


def add_voices(streams: Sequence[np.ndarray]) -> np.ndarray:
    """K streams (N,), each brought to the same RMS, added, and the sum brought to 0 dB RMS: (N,) float32."""
    equal = [set_level(stream, VOICE_LEVEL, peak=np.inf) for stream in streams]
    return set_level(np.sum(equal, axis=0), 0.0, peak=np.inf)


def at_random_level(rng: np.random.Generator, wave: np.ndarray, levels: tuple[float, float] = MIX_LEVEL) -> np.ndarray:
    """``wave`` (N,) at a level drawn from ``levels`` (dB RMS), so that it does not depend on the number of voices."""
    return set_level(wave, rng.uniform(*levels))


def background(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Coloured noise (N,) of random slope, RMS 1."""
    return coloured_noise(rng, samples, slope=rng.uniform(0.5, 1.5))


def over_noise(recording: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """A recording of any length, repeated or cut to the length of ``noise`` (N,), with that noise 20 dB below."""
    return set_level(np.resize(fade(recording, 0.05), len(noise)), 0.0, peak=np.inf) + 0.1 * noise


def empty_clip(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """A clip without a voice: ``sound`` (N,), soft, with faded ends."""
    return fade(at_random_level(rng, sound, EMPTY_LEVEL))


def most_at_once(streams: Sequence[np.ndarray], below_peak: float = 35.0) -> int:
    """The largest number of streams (N,) that are active in one 20 ms frame: LibriCount's label.

    A frame of a stream is active within ``below_peak`` dB of the stream's loudest frame.
    """
    if not streams or len(streams[0]) < FRAME:
        return 0
    levels = [frame_levels(stream) for stream in streams]
    active = np.stack([level > level.max() - below_peak for level in levels])  # (K, frames)
    return int(active.sum(axis=0).max())
