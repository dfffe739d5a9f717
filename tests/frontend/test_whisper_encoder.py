"""Whisper's encoder against transformers' own, on its fixed window and on windows as long as the clip."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor, WhisperModel

from pam_espnet.errors import CheckpointError, ConfigError, PamError
from pam_espnet.frontend.encoders.whisper import WhisperEncoder

LONGEST = 48000  # samples in the tiny model's window of 3 s


def _reference(folder: Path, wave: torch.Tensor, window: int) -> torch.Tensor:
    """Hidden states (H,T,D) from transformers' feature extractor and a model whose fixed window is ``window``."""
    model = WhisperModel.from_pretrained(folder).encoder.eval()
    positions = model.embed_positions.weight[: window // 320].clone()
    model.embed_positions = torch.nn.Embedding.from_pretrained(positions)
    model.config.max_source_positions = window // 320
    clip = torch.nn.functional.pad(wave, (0, window - len(wave))).numpy()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    mel = extractor(clip, sampling_rate=16000, padding="do_not_pad", truncation=False, return_tensors="pt")
    with torch.no_grad():
        return torch.cat(model(mel.input_features, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("samples", [1, 20000, LONGEST - 1, LONGEST])
def test_fixed_window_equals_transformers(tiny_whisper_dir: Path, samples: int) -> None:
    wave = torch.randn(samples) * 0.1
    hidden, frames = WhisperEncoder(str(tiny_whisper_dir), window="30s")(wave[None], torch.tensor([samples]))
    assert frames.tolist() == [-(-samples // 320)]
    expected = _reference(tiny_whisper_dir, wave, LONGEST)[:, : int(frames)]
    torch.testing.assert_close(hidden[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("samples", "pad_seconds", "window"),
    [(20000, 0.5, 28160), (19999, 0.0, 20160), (320, 0.0, 320), (47000, 0.5, LONGEST), (1, 0.01, 320)],
)
def test_own_window_equals_a_model_of_that_window(
    tiny_whisper_dir: Path, samples: int, pad_seconds: float, window: int
) -> None:
    """The clip and its padding, rounded up to whole frames, never beyond the model's window."""
    wave = torch.randn(samples) * 0.1
    hidden, frames = WhisperEncoder(str(tiny_whisper_dir), pad_seconds=pad_seconds)(wave[None], torch.tensor([samples]))
    expected = _reference(tiny_whisper_dir, wave, window)[:, : int(frames)]
    torch.testing.assert_close(hidden[0], expected, atol=1e-4, rtol=1e-4)


def test_too_long_is_an_error_not_a_cut(tiny_whisper_dir: Path) -> None:
    encoder = WhisperEncoder(str(tiny_whisper_dir))
    with pytest.raises(PamError, match=r"3\.00 s is longer than Whisper's window of 3 s"):
        encoder(torch.zeros(1, LONGEST + 1), torch.tensor([LONGEST + 1]))


def test_too_long_in_pieces(tiny_whisper_dir: Path) -> None:
    """Each piece as if it were a clip, one frame after another; short clips in the batch stay as they were."""
    encoder = WhisperEncoder(str(tiny_whisper_dir), long_clips="split")
    lengths = torch.tensor([2 * LONGEST + 1, 20000, LONGEST + 700])
    wave = torch.randn(3, 2 * LONGEST + 1) * 0.1
    hidden, frames = encoder(wave, lengths)
    assert frames.tolist() == [301, 63, 153] and hidden.shape[2] == 301
    cuts = [[0, 101 * 320, 202 * 320, 2 * LONGEST + 1], [0, 20000], [0, 77 * 320, LONGEST + 700]]
    for row, own in enumerate(cuts):
        alone = [encoder(wave[row : row + 1, a:b], torch.tensor([b - a]))[0] for a, b in pairwise(own)]
        torch.testing.assert_close(hidden[row, :, : int(frames[row])], torch.cat(alone, dim=2)[0], atol=1e-4, rtol=1e-4)


def test_only_the_encoder_is_loaded(tiny_whisper_dir: Path) -> None:
    names = dict(WhisperEncoder(str(tiny_whisper_dir)).named_parameters())
    weights = load_file(tiny_whisper_dir / "model.safetensors")
    assert not any("decoder" in name for name in names)
    assert {f"model.encoder.{name.removeprefix('model.')}" for name in names} == {
        n for n in weights if ".encoder." in n
    }


def test_checkpoint_of_the_model_without_its_head(tiny_whisper_dir: Path, tmp_path: Path) -> None:
    """Folders saved from WhisperModel name their weights without the leading "model."."""
    WhisperModel.from_pretrained(tiny_whisper_dir).save_pretrained(tmp_path)
    one, two = WhisperEncoder(str(tiny_whisper_dir)), WhisperEncoder(str(tmp_path))
    assert one.weights_sha256() == two.weights_sha256()


def test_missing_weights(tiny_whisper_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_whisper_dir, tmp_path / "whisper"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.encoder.layers.1.fc1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight"):
        WhisperEncoder(str(folder))


@pytest.mark.parametrize("options", [{"window": "10s"}, {"pad_seconds": -0.5}, {"long_clips": "cut"}])
def test_wrong_options(tiny_whisper_dir: Path, options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        WhisperEncoder(str(tiny_whisper_dir), **options)


def test_truncated_weights(tiny_whisper_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_whisper_dir, tmp_path / "whisper"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        WhisperEncoder(str(folder))
