"""GE2E: loudness over the own length, mel power, LSTM layers one by one, four frames to one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pam_espnet.frontend.encoders.converted import slaney_mel_filters
from pam_espnet.frontend.encoders.ge2e import GE2E, GE2EEncoder


@pytest.fixture(scope="module")
def encoder(tiny_ge2e_dir: Path) -> GE2EEncoder:
    return GE2EEncoder(str(tiny_ge2e_dir))


def test_frames_and_layers(encoder: GE2EEncoder) -> None:
    wave, lengths = torch.randn(1, 16000), torch.tensor([16000])
    hidden, frames = encoder(wave, lengths)
    assert hidden.shape == (1, 4, 25, 8) and frames.tolist() == [25] and encoder.frame_rate == 25.0
    states = list(encoder.net.states(encoder.net.mel(wave, lengths)))
    torch.testing.assert_close(hidden[0, 2, 3], states[2][0, 12:16].mean(0))
    assert (hidden[0, 3] >= 0).all()  # the embedding is rectified


def test_padded_equals_unpadded(encoder: GE2EEncoder) -> None:
    clips = [torch.randn(size) * 0.01 for size in (1, 159, 161, 640, 641, 7999, 8000)]
    lengths = torch.tensor([len(clip) for clip in clips])
    padded = torch.full((len(clips), 12000), 7.0)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    together, frames = encoder(padded, lengths)
    for index, clip in enumerate(clips):
        alone, own = encoder(clip[None], lengths[index : index + 1])
        assert own[0] == frames[index]
        torch.testing.assert_close(together[index, :, : own[0]], alone[0], atol=1e-4, rtol=1e-4)


def test_quiet_clips_are_raised_and_loud_ones_left_alone() -> None:
    net = GE2E(width=8)
    wave = torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000)[None]
    lengths = torch.tensor([16000])
    loud, soft, softer = (net.mel(wave * scale, lengths) for scale in (0.5, 1e-2, 1e-4))
    torch.testing.assert_close(soft, softer, rtol=1e-3, atol=1e-6)
    # half of full scale is -9 dBFS, the target -30 dBFS: 10 ** (21 / 10) in power
    torch.testing.assert_close((loud.sum() / soft.sum()).item(), 10**2.097, rtol=1e-2, atol=0)
    assert torch.isfinite(net.mel(wave * 0, lengths)).all()


def test_mel_filters_equal_librosa() -> None:
    librosa = pytest.importorskip("librosa")
    expected = torch.tensor(librosa.filters.mel(sr=16000, n_fft=400, n_mels=40)).T
    torch.testing.assert_close(slaney_mel_filters(40, 400, 16000), expected, atol=1e-7, rtol=1e-5)


def test_one_lstm_per_layer_equals_the_stacked_one() -> None:
    net = GE2E(width=8, num_layers=3)
    stacked = torch.nn.LSTM(40, 8, num_layers=3, batch_first=True)
    layers = {}
    for index, lstm in enumerate(net.lstms):
        layers |= {name.replace("_l0", f"_l{index}"): tensor for name, tensor in lstm.state_dict().items()}
    stacked.load_state_dict(layers)
    mel = torch.rand(2, 30, 40)
    torch.testing.assert_close(list(net.states(mel))[2], stacked(mel)[0])
