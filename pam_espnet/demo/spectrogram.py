"""Spectrogram of a recording with its time axis. Shape letters: N samples, T frames."""

from typing import Any

import numpy as np

from pam_espnet.score.plots import new_figure

WINDOW, HOP = 0.025, 0.01  # seconds
MOST_FRAMES = 3000  # of the picture: longer recordings have a longer hop
RANGE = 80.0  # dB below the loudest


def draw_spectrogram(wave: np.ndarray, rate: int) -> Any:
    """A figure of wave (N,) at ``rate`` Hz: level in dB over seconds and kHz. N: at least one window of 25 ms."""
    width = round(WINDOW * rate)
    hop = max(round(HOP * rate), len(wave) // MOST_FRAMES)
    frames = np.lib.stride_tricks.sliding_window_view(wave, width)[::hop] * np.hanning(width)  # (T,width)
    level = 20 * np.log10(np.abs(np.fft.rfft(frames)) + 1e-6)
    figure, grid = new_figure(1, 1, (6.4, 3.2))
    axes = grid[0, 0]
    image = axes.imshow(
        level.T,
        origin="lower",
        aspect="auto",
        extent=(0, len(wave) / rate, 0, rate / 2000),
        cmap="magma",
        vmin=level.max() - RANGE,
    )
    axes.set(xlabel="time, s", ylabel="frequency, kHz", title="Spectrogram")
    figure.colorbar(image, ax=axes, label="dB")
    return figure
