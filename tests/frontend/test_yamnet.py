"""YAMNet: its log-mel, TensorFlow's padding, one frame rate and one width for 14 blocks."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pam_espnet.errors import CheckpointError
from pam_espnet.frontend.encoders.yamnet import CHANNELS, STRIDES, YAMNet, YAMNetEncoder


@pytest.fixture(scope="module")
def encoder(tiny_yamnet_dir: Path) -> YAMNetEncoder:
    return YAMNetEncoder(str(tiny_yamnet_dir))


def test_real_shapes_fill_the_width() -> None:
    bins, products = 64, []
    for channels, stride in zip(CHANNELS, STRIDES, strict=True):
        bins //= stride
        products.append(channels * bins)
    assert products[0] == 1024 and set(products[1:]) == {2048}


def test_frames_and_layers(encoder: YAMNetEncoder, tiny_yamnet_dir: Path) -> None:
    wave = torch.randn(1, 16000)
    hidden, frames = encoder(wave, torch.tensor([16000]))
    assert hidden.shape == (1, 14, 7, 64) and frames.tolist() == [7]  # one second at 6.25 Hz
    assert encoder.frame_rate == 6.25
    chosen, _ = YAMNetEncoder(str(tiny_yamnet_dir), layers=[5, 2])(wave, torch.tensor([16000]))
    torch.testing.assert_close(chosen, hidden[:, [5, 2]])


def test_padded_equals_unpadded_at_every_length(encoder: YAMNetEncoder) -> None:
    # Around one frame (2560 samples) and one period of all strides (5120 samples).
    clips = [torch.randn(size) for size in (1, 399, 2560, 2561, 5119, 5120, 5121, 12800)]
    lengths = torch.tensor([len(clip) for clip in clips])
    padded = torch.full((len(clips), 20000), 7.0)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    together, frames = encoder(padded, lengths)
    for index, clip in enumerate(clips):
        alone, own = encoder(clip[None], lengths[index : index + 1])
        assert own[0] == frames[index]
        torch.testing.assert_close(together[index, :, : own[0]], alone[0], atol=1e-4, rtol=1e-4)


def test_log_mel_of_a_tone_and_of_silence() -> None:
    net = YAMNet([4] * 14)
    times = torch.arange(16000) / 16000
    log_mel = net.log_mel(torch.stack([torch.sin(2 * math.pi * 1000 * times), torch.zeros(16000)]))
    assert log_mel.shape == (2, 98, 64)
    torch.testing.assert_close(log_mel[1], torch.full((98, 64), math.log(1e-3)))
    # 1 kHz on 64 bands between 125 and 7500 Hz of the HTK scale
    mel = [1127 * math.log1p(hertz / 700) for hertz in (125, 1000, 7500)]
    expected = (mel[1] - mel[0]) / (mel[2] - mel[0]) * 65 - 1
    assert abs(int(log_mel[0, 50].argmax()) - expected) <= 1


def test_blocks_equal_tensorflow_same_padding(encoder: YAMNetEncoder) -> None:
    """Against a plain forward pass with SAME padding computed from each size, as TensorFlow defines it."""

    def same(hidden: torch.Tensor, stride: int) -> torch.Tensor:
        pads: list[int] = []
        for size in (hidden.shape[3], hidden.shape[2]):
            total = max((math.ceil(size / stride) - 1) * stride + 3 - size, 0)
            pads += [total // 2, total - total // 2]
        return functional.pad(hidden, pads)

    net = encoder.net
    log_mel = torch.randn(2, 96, 64)
    hidden = functional.relu(net.first(same(log_mel[:, None], 2)))
    expected = [hidden]
    for depthwise, pointwise, stride in zip(net.depthwise, net.pointwise, STRIDES[1:], strict=True):
        hidden = functional.relu(pointwise(functional.relu(depthwise(same(hidden, stride)))))
        expected.append(hidden)
    for got, want in zip(net.blocks(log_mel, torch.tensor([96, 96])), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_grid_averages_fast_blocks_and_repeats_slow_ones(encoder: YAMNetEncoder) -> None:
    lengths = torch.tensor([10240])
    wave = torch.randn(1, 10240)
    hidden, _ = encoder(wave, lengths)
    log_mel = encoder.net.log_mel(functional.pad(wave, (0, 240)))
    blocks = list(encoder.net.blocks(log_mel, torch.tensor([64])))
    # block 0: 2 channels of 32 bins, 8 frames of 20 ms each
    torch.testing.assert_close(hidden[0, 0, 1], blocks[0][0, :, 8:16].mean(1).flatten())
    # block 13: 64 channels of 2 bins, half as fast as the grid
    torch.testing.assert_close(hidden[0, 13, 2], blocks[13][0, :, 1].mean(1))
    torch.testing.assert_close(hidden[0, 13, 2], hidden[0, 13, 3])


def test_weights_that_do_not_fit_are_named(tiny_yamnet_dir: Path, tmp_path: Path) -> None:
    config = (tiny_yamnet_dir / "config.json").read_text()
    (tmp_path / "model.safetensors").write_bytes((tiny_yamnet_dir / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(config.replace("[2, 4,", "[2, 8,"))
    with pytest.raises(CheckpointError, match="depthwise"):
        YAMNetEncoder(str(tmp_path))
