"""The spectrogram shows what sounds when."""

from collections.abc import Callable

import numpy as np
import pytest

from pam_espnet.demo.spectrogram import MOST_FRAMES, draw_spectrogram


@pytest.mark.parametrize("rate", [8000, 16000])
def test_two_tones_are_at_their_times_and_frequencies(tone: Callable[..., np.ndarray], rate: int) -> None:
    figure = draw_spectrogram(np.concatenate([tone(1.5, 500, rate), tone(0.5, 2000, rate)]), rate)
    axes = figure.axes[0]
    (image,) = axes.images
    left, right, low, high = image.get_extent()
    assert (left, right, low, high) == (0, 2.0, 0, rate / 2000)
    assert axes.get_xlabel() == "time, s"
    level = image.get_array()  # (frequencies, frames)
    khz = np.linspace(low, high, len(level))[level.argmax(axis=0)]
    seconds = np.linspace(left, right, level.shape[1])
    assert khz[seconds < 1.4] == pytest.approx(0.5, abs=0.05)
    assert khz[seconds > 1.6] == pytest.approx(2.0, abs=0.05)


def test_silence_and_length_are_no_trouble() -> None:
    for seconds, most in ((0.1, 10), (120, 1.1 * MOST_FRAMES)):
        image = draw_spectrogram(np.zeros(int(seconds * 16000), np.float32), 16000).axes[0].images[0]
        assert np.isfinite(image.get_array()).all() and image.get_array().shape[1] <= most
