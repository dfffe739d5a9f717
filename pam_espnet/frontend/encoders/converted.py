"""What the networks converted from packages (YAMNet, pyannote, GE2E) share: strict loading, mel filters, a frame grid.

Dimension letters: B utterances, S frames of the network, T frames emitted, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pam_espnet.errors import CheckpointError


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Fill all of ``net`` from ``tensors``, nothing missing and nothing left over.

    Raises:
        CheckpointError: names or shapes differ; lists them.
    """
    try:
        net.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}/model.safetensors does not fit {type(net).__name__}: {error}\n"
            "  -> delete the folder and run the recipe's first stage again"
        ) from error


def average_to_grid(states: Tensor, lengths: Tensor, *, hop: int, centre: int, cell: int, num_cells: int) -> Tensor:
    """Mean of the frames whose centres lie in each cell of a regular grid; cell t is [t, t + 1) * ``cell`` samples.

    Which frames meet in a cell depends on its index alone, so an utterance's neighbours cannot change it. A cell that
    holds none of its utterance's frames (only at the end of a clip) repeats the nearest one.

    Args:
        states: (B,S,D).
        lengths: (B,) own frames of each utterance, at least 1.
        hop: samples between frames.
        centre: sample at the centre of frame 0, smaller than ``cell``.
        cell: samples per emitted frame.
        num_cells: T.

    Returns:
        (B,T,D)
    """
    edges = torch.arange(num_cells + 1, device=states.device) * cell - centre
    first = edges.add(hop - 1).div(hop, rounding_mode="floor").clamp_min(0)  # first frame at or after each edge
    start = torch.minimum(first[None, :-1], lengths[:, None] - 1)
    stop = torch.maximum(torch.minimum(first[None, 1:], lengths[:, None]), start + 1)
    total = torch.zeros_like(states[:, :1]).repeat(1, num_cells, 1)
    for offset in range(math.ceil(cell / hop)):
        index = (start + offset)[:, :, None]
        inside = index < stop[:, :, None]
        picked = states.gather(1, index.clamp_max(states.shape[1] - 1).expand(-1, -1, states.shape[2]))
        total += picked.masked_fill(~inside, 0.0)
    return total / (stop - start)[:, :, None]


def htk_mel_filters(num_mels: int, fft_size: int, low: float, high: float, sample_rate: int) -> Tensor:
    """Triangles on the HTK mel axis, as TensorFlow makes them: peak 1, straight in mel. (bins, mels); Hz."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    bins = mel(torch.linspace(0, sample_rate / 2, fft_size // 2 + 1, dtype=torch.float64))
    ends = mel(torch.tensor([low, high], dtype=torch.float64))
    filters = _triangles(bins, torch.linspace(float(ends[0]), float(ends[1]), num_mels + 2, dtype=torch.float64))
    filters[0] = 0.0  # TensorFlow leaves the constant component out
    return filters.float()


def slaney_mel_filters(num_mels: int, fft_size: int, sample_rate: int) -> Tensor:
    """Triangles with corners on Slaney's mel axis, straight in Hz, each of area 1; librosa's default. (bins, mels)."""
    # Slaney's axis: linear below 1 kHz (66.7 Hz per mel), logarithmic above (27 mels for a factor of 6.4).
    knee, per_mel, log_step = 1000.0, 200.0 / 3.0, math.log(6.4) / 27.0
    top = knee / per_mel + math.log(sample_rate / 2 / knee) / log_step
    mels = torch.linspace(0, top, num_mels + 2, dtype=torch.float64)
    above = knee * torch.exp(log_step * (mels - knee / per_mel))
    corners = torch.where(mels < knee / per_mel, mels * per_mel, above)
    bins = torch.linspace(0, sample_rate / 2, fft_size // 2 + 1, dtype=torch.float64)
    return (_triangles(bins, corners) * 2.0 / (corners[2:] - corners[:-2])).float()


def _triangles(bins: Tensor, corners: Tensor) -> Tensor:
    """(bins, mels): filter i rises from ``corners[i]``, is 1 at ``corners[i + 1]`` and falls to ``corners[i + 2]``."""
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins[:, None] - left) / (peak - left)
    falling = (right - bins[:, None]) / (right - peak)
    return torch.minimum(rising, falling).clamp_min(0.0)
