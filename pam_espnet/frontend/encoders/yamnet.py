"""YAMNet: sound events, after Google's AudioSet tagger (TensorFlow Models, research/audioset/yamnet).

The published network tags patches of 0.96 s. Here it runs fully convolutionally over the whole clip and emits the
output of each of its 14 blocks; the classifier of 521 classes is not loaded.

Dimension letters: B utterances, N samples, S mel frames, T encoder frames, F frequency bins, C channels, D width.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.base import AbsEncoder, load_folder, load_weights, padding_mask

CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

SAMPLE_RATE = 16000  # Hz
WINDOW, HOP, FFT_SIZE = 400, 160, 512  # samples
NUM_MELS, LOW, HIGH = 64, 125.0, 7500.0  # bins, Hz, Hz
LOG_OFFSET = 1e-3
# All strides together: clips are padded with silence to whole multiples of this many mel frames.
PERIOD = 32
# Every layer is emitted at the rate of blocks 6 to 11, 6.25 Hz.
MEL_FRAMES_PER_FRAME = 16


class YAMNet(nn.Module):
    """A convolution and 13 depthwise-separable blocks, batch normalisation folded into the weights.

    Args:
        channels: C of each block.
        strides: of each block, in time and frequency alike.
    """

    mel_filters: Tensor
    window: Tensor

    def __init__(self, channels: Sequence[int] = CHANNELS, strides: Sequence[int] = STRIDES) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.first = nn.Conv2d(1, channels[0], 3, stride=strides[0])
        self.depthwise = nn.ModuleList(
            nn.Conv2d(wide, wide, 3, stride=stride, groups=wide)
            for wide, stride in zip(channels[:-1], strides[1:], strict=True)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(wide, out, 1) for wide, out in itertools.pairwise(channels))
        filters = mel_filter_bank(  # (257,64): TensorFlow's triangles, of height 1 and straight in mel
            FFT_SIZE // 2 + 1, NUM_MELS, LOW, HIGH, SAMPLE_RATE, mel_scale="htk", triangularize_in_mel_space=True
        )
        self.register_buffer("mel_filters", torch.from_numpy(filters).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def log_mel(self, wave: Tensor) -> Tensor:
        """(B,N) -> (B,S,F): magnitude, not power; windows start at multiples of the hop, none is centred."""
        frames = wave.unfold(-1, WINDOW, HOP) * self.window
        return torch.log(torch.fft.rfft(frames, FFT_SIZE).abs() @ self.mel_filters + LOG_OFFSET)

    def blocks(self, log_mel: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        """The output of each block, (B,C,S',F'), zero beyond each utterance's end, computed one after the other, from
        ``log_mel`` (B,S,F) and own mel ``lengths`` (B,); S and lengths are multiples of ``PERIOD``."""
        hidden = _zero_beyond(log_mel[:, None], lengths)
        hidden = functional.relu(self.first(_pad_same(hidden, self.strides[0])))
        lengths = lengths // self.strides[0]
        yield (hidden := _zero_beyond(hidden, lengths))
        for depthwise, pointwise, stride in zip(self.depthwise, self.pointwise, self.strides[1:], strict=True):
            hidden = functional.relu(depthwise(_pad_same(hidden, stride)))
            hidden = functional.relu(pointwise(hidden))
            lengths = lengths // stride
            # Zero is what the next block's padding would hold if the utterance were alone.
            yield (hidden := _zero_beyond(hidden, lengths))


class YAMNetEncoder(AbsEncoder):
    """The 14 blocks of YAMNet at 6.25 Hz, each 1024 wide.

    A block's C channels times its F frequency bins is 1024 or 2048: averaging neighbouring bins until the product is
    1024 gives all blocks one width without padding, and keeps of the early blocks, which have few channels, at which
    frequencies something happens. Faster blocks are averaged over time, the slower last two (3.125 Hz) repeated.

    Args:
        path: local folder with ``config.json`` (``channels``, ``strides``) and ``model.safetensors``, as the mini
            recipe makes it (``local/yamnet_onnx.py``).
        layers: blocks to emit, 0 to 13; None for all.

    Raises ConfigError: no such folder, or a layer out of range; CheckpointError: its files do not fit together.
    """

    runs_in_bfloat16 = False  # 27 convolutions, no norm between them: its states would move by 4 %, and it is small

    def __init__(self, path: str, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        config, tensors = load_folder(path)
        self.net = YAMNet(config["channels"], config["strides"])
        load_weights(self.net, tensors, path)
        total = math.prod(self.net.strides)
        if total != PERIOD:
            raise ConfigError(f"{path}/config.json: the strides multiply to {total}, YAMNet's to {PERIOD}")
        rate = SAMPLE_RATE / (HOP * MEL_FRAMES_PER_FRAME)
        self.finish(layers=layers, available=len(self.net.channels), width=self.net.channels[-1], frame_rate=rate)

    def output_lengths(self, num_samples: Tensor) -> Tensor:
        """One frame for each begun 2560 samples."""
        return -(-num_samples // (HOP * MEL_FRAMES_PER_FRAME))

    def hidden_states(self, wave: Tensor, lengths: Tensor) -> list[Tensor]:
        """(B,T,D) per block; see the base class."""
        # Zeros behind a clip turn into log-mel silence. With a whole number of periods every stride meets an even
        # size, for which TensorFlow's SAME padding is always the same.
        periods = -(-lengths // (HOP * PERIOD))
        num_samples = -(-int(self.host_lengths.max()) // (HOP * PERIOD)) * HOP * PERIOD + WINDOW - HOP
        log_mel = self.net.log_mel(functional.pad(wave, (0, num_samples - wave.shape[1])))
        blocks = itertools.islice(self.net.blocks(log_mel, periods * PERIOD), max(self.layers) + 1)
        return [self._to_grid(block, log_mel.shape[1]) for block in blocks]

    def _to_grid(self, block: Tensor, num_mel_frames: int) -> Tensor:
        """(B,C,S',F') -> (B,T,D): one frame rate and one width for all blocks."""
        stride = num_mel_frames // block.shape[2]
        bands = self.width // block.shape[1]
        pooled = functional.avg_pool2d(block, (max(MEL_FRAMES_PER_FRAME // stride, 1), block.shape[3] // bands))
        pooled = pooled.repeat_interleave(max(stride // MEL_FRAMES_PER_FRAME, 1), dim=2)
        return pooled.transpose(1, 2).flatten(2)


def _pad_same(hidden: Tensor, stride: int) -> Tensor:
    """TensorFlow's SAME padding of even sizes for kernel 3: stride 2 pads at the end only."""
    return functional.pad(hidden, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))


def _zero_beyond(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(B,C,S,F) with zeros at and beyond each utterance's length."""
    return hidden.masked_fill(padding_mask(lengths, hidden.shape[2])[:, None, :, None], 0.0)
