"""pyannote segmentation: statistics over the own length, LSTM layers one by one, frames on a fixed grid."""

from pathlib import Path

import pytest
import torch

from pam_espnet.frontend.encoders.pyannote import (
    CELL,
    NATIVE_HOP,
    RECEPTIVE_FIELD,
    MaskedInstanceNorm,
    PyanNet,
    PyannoteEncoder,
    average_to_grid,
)


@pytest.fixture(scope="module")
def encoder(tiny_pyannote_dir: Path) -> PyannoteEncoder:
    return PyannoteEncoder(str(tiny_pyannote_dir))


def test_frames_layers_and_width(encoder: PyannoteEncoder) -> None:
    hidden, frames = encoder(torch.randn(1, 16000), torch.tensor([16000]))
    assert hidden.shape == (1, 6, 25, 12) and frames.tolist() == [25] and encoder.frame_rate == 25.0
    # SincNet is 5 wide, the linear layers 9, the posteriors 7: the rest is zero
    assert [int((state != 0).any(0).sum()) for state in hidden[0]] == [5, 12, 12, 9, 9, 7]
    torch.testing.assert_close(hidden[0, 5].sum(-1), torch.ones(25))


def test_padded_equals_unpadded(encoder: PyannoteEncoder) -> None:
    clips = [torch.randn(size) * 0.1 for size in (1, 640, 990, 991, 1261, 8000, 8001)]
    lengths = torch.tensor([len(clip) for clip in clips])
    padded = torch.full((len(clips), 12000), 7.0)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    together, frames = encoder(padded, lengths)
    assert torch.isfinite(together).all()
    for index, clip in enumerate(clips):
        alone, own = encoder(clip[None], lengths[index : index + 1])
        assert own[0] == frames[index]
        torch.testing.assert_close(together[index, :, : own[0]], alone[0], atol=1e-4, rtol=1e-4)


def test_one_lstm_per_layer_equals_the_stacked_one() -> None:
    net = PyanNet(num_filters=8, channels=5, lstm_width=6, num_lstm_layers=3, linear_width=9)
    stacked = torch.nn.LSTM(5, 6, num_layers=3, batch_first=True, bidirectional=True)
    layers = {}
    for index, lstm in enumerate(net.lstms):
        layers |= {name.replace("_l0", f"_l{index}"): tensor for name, tensor in lstm.state_dict().items()}
    stacked.load_state_dict(layers)
    wave = torch.randn(1, 8000)
    states = list(net.states(wave, *[torch.tensor([8000])] * 2))
    torch.testing.assert_close(states[3], stacked(states[0])[0])


def test_receptive_field_and_hop() -> None:
    lengths = PyanNet(num_filters=8, channels=5).frame_lengths(torch.tensor([990, 991, 991 + 269, 991 + 270]))
    assert lengths.tolist() == [0, 1, 1, 2]


def test_masked_norm_equals_torch_on_the_own_part() -> None:
    norm, reference = MaskedInstanceNorm(3), torch.nn.InstanceNorm1d(3, affine=True)
    hidden = torch.randn(2, 3, 20) * 5 + 3
    torch.testing.assert_close(norm(hidden, torch.tensor([12, 20]))[0, :, :12], reference(hidden[:1, :, :12])[0])


def test_grid_takes_frames_by_their_centres() -> None:
    """Every native frame counts in exactly the cell that holds its centre; cells past the last frame repeat it."""
    num_frames, num_cells = 57, 25
    states = torch.arange(num_frames, dtype=torch.float32)[None, :, None]
    grid = average_to_grid(states, torch.tensor([num_frames]), num_cells)
    cells: dict[int, list[int]] = {}
    for frame in range(num_frames):
        cells.setdefault((RECEPTIVE_FIELD // 2 + NATIVE_HOP * frame) // CELL, []).append(frame)
    expected = [sum(cells.get(cell, [56])) / len(cells.get(cell, [56])) for cell in range(num_cells)]
    assert set(map(len, cells.values())) <= {1, 2, 3}
    torch.testing.assert_close(grid[0, :, 0], torch.tensor(expected))


def test_only_the_layers_needed_are_computed(tiny_pyannote_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PyannoteEncoder(str(tiny_pyannote_dir), layers=[1])
    monkeypatch.setattr(encoder.net.lstms[1], "forward", None)  # calling it would fail
    hidden, _ = encoder(torch.randn(1, 4000), torch.tensor([4000]))
    assert hidden.shape == (1, 1, 7, 12)
