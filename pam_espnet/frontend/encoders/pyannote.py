"""pyannote segmentation 3.0: up to two of three voices at once over time (Plaquet & Bredin, Interspeech 2023).

SincNet (Ravanelli & Bengio, 2018) on the waveform, four bidirectional LSTM layers, two linear layers, and seven
"powerset" classes: silence, each of three speakers alone, each pair of them. Trained on windows of 10 s; here it runs
over the whole clip.

Dimension letters: B utterances, N samples, S frames of the network, T encoder frames, C channels, D width.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pam_espnet.frontend.encoders.base import AbsEncoder, load_folder, load_weights, padding_mask

SAMPLE_RATE = 16000  # Hz
KERNEL, STRIDE, POOL = 251, 10, 3  # of the sinc filters (samples) and of the pooling behind each convolution
CONV_KERNEL = 5
# What these make of the network: one frame each 270 samples (59.3 Hz), made of 991 samples.
NATIVE_HOP = STRIDE * POOL**3
RECEPTIVE_FIELD = 991
# Emitted frames: 25 Hz, the mean of the two or three native frames in each 40 ms.
CELL = 640


class MaskedInstanceNorm(nn.Module):
    """Instance normalisation over each utterance's own length (nn.InstanceNorm1d counts the padding in)."""

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """(B,C,S) and (B,) -> (B,C,S); values beyond an utterance's end have no meaning."""
        beyond = padding_mask(lengths, hidden.shape[2])[:, None]
        count = lengths[:, None, None]
        centred = hidden - hidden.masked_fill(beyond, 0.0).sum(2, keepdim=True) / count
        variance = centred.masked_fill(beyond, 0.0).square().sum(2, keepdim=True) / count
        return centred * torch.rsqrt(variance + self.eps) * self.weight[:, None] + self.bias[:, None]


class PyanNet(nn.Module):
    """The segmentation network, its sinc filters stored as an ordinary convolution.

    Args:
        num_filters: sinc filters.
        channels: C of the two convolutions behind them.
        lstm_width: of one direction of an LSTM layer.
        num_lstm_layers: each is a separate module, since torch's stacked LSTM shows only its last layer.
        linear_width: of the two linear layers.
        num_classes: powerset classes.
    """

    def __init__(
        self,
        num_filters: int = 80,
        channels: int = 60,
        lstm_width: int = 128,
        num_lstm_layers: int = 4,
        linear_width: int = 128,
        num_classes: int = 7,
    ) -> None:
        super().__init__()
        self.wave_norm = MaskedInstanceNorm(1)
        self.sinc = nn.Conv1d(1, num_filters, KERNEL, stride=STRIDE, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(wide, channels, CONV_KERNEL) for wide in (num_filters, channels))
        self.norms = nn.ModuleList(MaskedInstanceNorm(wide) for wide in (num_filters, channels, channels))
        sizes = [channels] + [2 * lstm_width] * (num_lstm_layers - 1)
        self.lstms = nn.ModuleList(nn.LSTM(size, lstm_width, batch_first=True, bidirectional=True) for size in sizes)
        self.linears = nn.ModuleList([nn.Linear(2 * lstm_width, linear_width), nn.Linear(linear_width, linear_width)])
        self.classifier = nn.Linear(linear_width, num_classes)
        self.widths = (channels, *[2 * lstm_width] * num_lstm_layers, linear_width, linear_width, num_classes)
        self.num_states = len(self.widths)
        self.width = max(self.widths)

    def frame_lengths(self, num_samples: Tensor) -> Tensor:
        """Native frames of clips of ``num_samples``, which are at least ``RECEPTIVE_FIELD``."""
        frames = ((num_samples - KERNEL) // STRIDE + 1) // POOL
        for _ in self.convs:
            frames = (frames - CONV_KERNEL + 1) // POOL
        return frames

    def sincnet(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """(B,N) -> (B,S,C). No convolution is padded, so an utterance's own frames see nothing beyond its end."""
        hidden = self.sinc(self.wave_norm(wave[:, None], lengths)).abs()
        frames = (lengths - KERNEL) // STRIDE + 1
        for index, norm in enumerate(self.norms):
            if index:
                hidden = self.convs[index - 1](hidden)
                frames = frames - CONV_KERNEL + 1
            frames = frames // POOL
            hidden = functional.leaky_relu(norm(functional.max_pool1d(hidden, POOL), frames))
        return hidden.transpose(1, 2)

    def states(self, wave: Tensor, lengths: Tensor, host_lengths: Tensor) -> Iterator[Tensor]:
        """SincNet, each LSTM layer, both linear layers, class posteriors: (B,S,·) each, computed as asked for.
        ``host_lengths`` are ``lengths`` (B,) on the host."""
        yield (hidden := self.sincnet(wave, lengths))
        # Packed, so that the backward direction starts at each utterance's own end.
        frames = self.frame_lengths(host_lengths)
        packed = pack_padded_sequence(hidden, frames, batch_first=True, enforce_sorted=False)
        for lstm in self.lstms:
            packed, _ = lstm(packed)
            yield (hidden := pad_packed_sequence(packed, batch_first=True)[0])
        for linear in self.linears:
            yield (hidden := functional.leaky_relu(linear(hidden)))
        yield self.classifier(hidden).softmax(-1)


def average_to_grid(states: Tensor, lengths: Tensor, num_cells: int) -> Tensor:
    """(B,S,D) of native frames -> (B,T,D), T = ``num_cells``: the mean of the frames whose centres lie in each cell.

    Cell t is [t, t + 1) * ``CELL`` samples, so its frames depend on its index alone and not on an utterance's
    neighbours. A cell without a frame of its utterance (only at the end of a clip) repeats the nearest one.

    Args:
        states: (B,S,D).
        lengths: (B,) native frames of each utterance, at least 1.
        num_cells: T.
    """
    edges = torch.arange(num_cells + 1, device=states.device) * CELL - RECEPTIVE_FIELD // 2
    first = (-(-edges // NATIVE_HOP)).clamp_min(0)  # first frame at or after each edge
    start = torch.minimum(first[None, :-1], lengths[:, None] - 1)
    stop = torch.maximum(torch.minimum(first[None, 1:], lengths[:, None]), start + 1)
    total = torch.zeros_like(states[:, :1]).repeat(1, num_cells, 1)
    for offset in range(math.ceil(CELL / NATIVE_HOP)):
        index = (start + offset)[:, :, None]
        picked = states.gather(1, index.clamp_max(states.shape[1] - 1).expand(-1, -1, states.shape[2]))
        total += picked.masked_fill(index >= stop[:, :, None], 0.0)
    return total / (stop - start)[:, :, None]


class PyannoteEncoder(AbsEncoder):
    """Hidden states of pyannote's segmentation network at 25 Hz, each 256 wide.

    Layers: 0 SincNet (60 wide), 1 to 4 the LSTM layers (256), 5 and 6 the linear layers (128), 7 the posteriors of the
    seven classes. Narrower ones are filled with zeros up to 256. Clips shorter than the network's field of view (991
    samples, 62 ms) are padded with silence.

    Args:
        path: local folder with ``config.json`` (the arguments of :class:`PyanNet`) and ``model.safetensors``, as the
            mini recipe makes it (``local/pyannote_segmentation.py``).
        layers: hidden states to emit, 0 to 7; None for all.

    Raises ConfigError: no such folder, or a layer out of range; CheckpointError: its files do not fit together.
    """

    runs_in_bfloat16 = False  # recurrent layers, normalisation of raw samples, and 1.5 million weights: nothing to gain

    def __init__(self, path: str, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        config, tensors = load_folder(path)
        self.net = PyanNet(**config["network"])
        load_weights(self.net, tensors, path)
        rate = SAMPLE_RATE / CELL
        self.finish(layers=layers, available=self.net.num_states, width=self.net.width, frame_rate=rate)
        self.layer_widths = tuple(self.net.widths[index] for index in self.layers)

    def output_lengths(self, num_samples: Tensor) -> Tensor:
        """One frame for each begun 640 samples."""
        return -(-num_samples // CELL)

    def hidden_states(self, wave: Tensor, lengths: Tensor) -> list[Tensor]:
        """(B,T,D) per layer; see the base class."""
        wave = functional.pad(wave, (0, max(RECEPTIVE_FIELD - wave.shape[1], 0)))
        seen = lengths.clamp_min(RECEPTIVE_FIELD)
        frames = self.net.frame_lengths(seen)
        num_cells = int(self.output_lengths(self.host_lengths).max())
        emitted = []
        host = self.host_lengths.clamp_min(RECEPTIVE_FIELD)
        for state in itertools.islice(self.net.states(wave, seen, host), max(self.layers) + 1):
            cells = average_to_grid(state, frames, num_cells)
            emitted.append(functional.pad(cells, (0, self.width - cells.shape[2])))
        return emitted
