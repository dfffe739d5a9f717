"""GE2E: who speaks, after the d-vector of Wan et al. (ICASSP 2018) as Resemblyzer trained it.

Forty mel bands (power, not its logarithm) of the clip at -30 dBFS, three LSTM layers, a projection. Trained on windows
of 1.6 s, whose last frame is the speaker's embedding; here it runs over the whole clip and all frames are kept.

Dimension letters: B utterances, N samples, S mel frames, T encoder frames, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pam_espnet.frontend.encoders.base import AbsEncoder, load_folder
from pam_espnet.frontend.encoders.converted import average_to_grid, load_weights, slaney_mel_filters

SAMPLE_RATE = 16000  # Hz
WINDOW, HOP, NUM_MELS = 400, 160, 40  # samples, samples, bands
LOUDNESS = -30.0  # dB relative to full scale; quieter clips are raised to it, louder ones left alone
CELL = 640  # samples per emitted frame: 25 Hz, the mean of four mel frames


class GE2E(nn.Module):
    """Three LSTM layers and a projection.

    Args:
        width: D, of each LSTM layer and of the embedding.
        num_layers: each is a module of its own, since torch's stacked LSTM shows only its last layer.
    """

    mel_filters: Tensor
    window: Tensor

    def __init__(self, width: int = 256, num_layers: int = 3) -> None:
        super().__init__()
        sizes = [NUM_MELS] + [width] * (num_layers - 1)
        self.lstms = nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in sizes)
        self.projection = nn.Linear(width, width)
        mel_filters = slaney_mel_filters(NUM_MELS, WINDOW, SAMPLE_RATE)
        self.register_buffer("mel_filters", mel_filters, persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def mel(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """(B,N) and (B,) -> (B,S,40) mel power of the clips at their common loudness, centred windows."""
        # The mean square is the clip's own: zeros beyond its end add nothing to the sum.
        power = wave.square().sum(1, keepdim=True) / lengths[:, None]
        gain = LOUDNESS - 10.0 * torch.log10(power.clamp_min(1e-18))
        wave = wave * 10.0 ** (gain.clamp_min(0.0) / 20.0)
        spectrum = torch.stft(
            wave, WINDOW, HOP, window=self.window, center=True, pad_mode="constant", return_complex=True
        )
        return spectrum.abs().square().transpose(1, 2) @ self.mel_filters

    def states(self, mel: Tensor) -> Iterator[Tensor]:
        """(B,S,40) -> each LSTM layer, then the embedding at each frame, (B,S,D); computed as it is asked for.

        The layers only look back, so nothing beyond an utterance's end reaches its own frames.
        """
        hidden = mel
        for lstm in self.lstms:
            hidden, _ = lstm(hidden)
            yield hidden
        yield functional.relu(self.projection(hidden))


class GE2EEncoder(AbsEncoder):
    """Hidden states of the GE2E speaker encoder at 25 Hz, each 256 wide.

    Layers: 0 to 2 the LSTM layers, 3 the speaker embedding as it stands at each frame (before its L2 normalisation).

    Args:
        path: local folder with ``config.json`` (the arguments of :class:`GE2E`) and ``model.safetensors``, as
            ``pam_espnet.convert.ge2e`` writes it.
        layers: hidden states to emit, 0 to 3; None for all.

    Raises:
        ConfigError: no such folder, or a layer out of range.
        CheckpointError: the folder's files do not fit together.
    """

    def __init__(self, path: str, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        config, tensors = load_folder(path)
        self.net = GE2E(**config["network"])
        load_weights(self.net, tensors, path)
        available = len(self.net.lstms) + 1
        self.finish(
            layers=layers, available=available, width=self.net.projection.out_features, frame_rate=SAMPLE_RATE / CELL
        )

    def output_lengths(self, num_samples: Tensor) -> Tensor:
        """One frame for each begun 640 samples."""
        return (num_samples + CELL - 1) // CELL

    def hidden_states(self, wave: Tensor, lengths: Tensor) -> list[Tensor]:
        """(B,T,D) per layer; see the base class."""
        mel = self.net.mel(wave, lengths)
        frames = (lengths + HOP - 1) // HOP
        num_cells = int(self.output_lengths(lengths).max())
        states = itertools.islice(self.net.states(mel), max(self.layers) + 1)
        return [average_to_grid(state, frames, hop=HOP, centre=0, cell=CELL, num_cells=num_cells) for state in states]
