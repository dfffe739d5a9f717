"""Mixtures: equal power, the label, and generators that belong to keys."""

import numpy as np
import pytest

from pam_espnet.data.mixtures import add_voices, choose_voices, most_at_once
from pam_espnet.data.rendering import seeded
from pam_espnet.data.signals import FRAME, SAMPLE_RATE, trim_start


def tone(hz: float, level: float, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """One second (N,) with a tone from ``start`` to ``end``, over a whisper of noise."""
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    noise = 1e-5 * seeded(0, str(hz)).standard_normal(SAMPLE_RATE)
    return (level * np.sin(2 * np.pi * hz * time) * ((time >= start) & (time < end)) + noise).astype(np.float32)


def power(wave: np.ndarray, hz: float) -> float:
    return float(np.abs(np.fft.rfft(wave))[round(hz)] ** 2)


def test_voices_have_equal_power_whatever_they_had_before() -> None:
    mix = add_voices([tone(200, 0.9), tone(330, 0.001), tone(470, 0.1)])
    powers = [power(mix, hz) for hz in (200, 330, 470)]
    assert max(powers) / min(powers) < 1.01
    assert np.sqrt(np.mean(mix.astype(np.float64) ** 2)) == pytest.approx(1.0, rel=1e-3)


def test_label_counts_simultaneous_voices() -> None:
    first, second, third = tone(200, 0.5, 0.0, 0.4), tone(330, 0.5, 0.3, 0.6), tone(470, 0.5, 0.7, 1.0)
    assert most_at_once([first, second, third]) == 2
    assert most_at_once([first, third]) == 1
    assert most_at_once([first, tone(330, 0.01)]) == 2  # soft is not silent: each has its own peak
    assert most_at_once([]) == 0


def test_starts_are_cut_to_the_first_word() -> None:
    wave = tone(200, 0.5, 0.5, 0.8)
    cut = trim_start(wave)
    assert abs(len(wave) - len(cut) - 0.5 * SAMPLE_RATE) <= FRAME and np.array_equal(cut, wave[-len(cut) :])
    assert len(trim_start(wave[:10])) == 0


def test_groups_are_never_mixed() -> None:
    voices = {"a": "x", "b": "x", "c": "y", "d": "z"}
    for seed in range(50):
        assert len({voices[name] for name in choose_voices(seeded(seed, "k"), voices, 3)}) == 3
    with pytest.raises(ValueError, match="3 groups"):
        choose_voices(seeded(0, "k"), voices, 4)
