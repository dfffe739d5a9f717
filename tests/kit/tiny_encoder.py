"""An encoder small enough for tests: two hidden states of width 8 at 25 Hz, from random projections of the wave.

Configurations name it by its import path, ``tiny_encoder:TinyEncoder``, as a user's own encoder would be.
"""

import torch
from torch import Tensor, nn

from pam_espnet.frontend.encoders.base import AbsEncoder

HOP = 640  # samples per frame: 25 Hz


class TinyEncoder(AbsEncoder):
    """Frames of 40 ms, projected twice."""

    def __init__(self, path: str = "", layers: list[int] | None = None, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(HOP, 8, generator=generator) / 8)
        self.second = nn.Parameter(torch.randn(8, 8, generator=generator) / 3)
        self.finish(layers=layers, available=2, width=8, frame_rate=25.0)

    def output_lengths(self, num_samples: Tensor) -> Tensor:
        return -(-num_samples // HOP)

    def hidden_states(self, wave: Tensor, lengths: Tensor) -> list[Tensor]:
        wave = nn.functional.pad(wave, (0, -wave.shape[1] % HOP))
        low = torch.tanh(wave.unflatten(1, (-1, HOP)) @ self.first)
        return [low, torch.tanh(low @ self.second)]
