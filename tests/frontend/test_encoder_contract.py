"""What every encoder of the registry promises, on tiny random models of the real classes.

A new encoder adds a line to ``CASES``: the fixture that makes a folder with a tiny model of it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.base import AbsEncoder
from pam_espnet.frontend.encoders.registry import ENCODERS, build_encoder

# case -> (type, fixture that is a folder or makes one, what to make, further options)
CASES: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "whisper": ("whisper", "tiny_whisper_dir", None, {}),
    "whisper-30s": ("whisper", "tiny_whisper_dir", None, {"window": "30s"}),
    "whisper-unpadded-window": ("whisper", "tiny_whisper_dir", None, {"pad_seconds": 0.0}),
    "wav2vec2-layer": ("hf_wave", "tiny_wave_dir", "wav2vec2-layer", {}),
    "wav2vec2-group": ("hf_wave", "tiny_wave_dir", "wav2vec2-group", {}),
    "hubert-layer": ("hf_wave", "tiny_wave_dir", "hubert-layer", {}),
    "hubert-group": ("hf_wave", "tiny_wave_dir", "hubert-group", {}),
    "wavlm-layer": ("hf_wave", "tiny_wave_dir", "wavlm-layer", {}),
    "wavlm-group": ("hf_wave", "tiny_wave_dir", "wavlm-group", {}),
    "data2vec-audio-layer": ("hf_wave", "tiny_wave_dir", "data2vec-audio-layer", {}),
    "ast": ("ast", "tiny_ast_dir", None, {}),
    "yamnet": ("yamnet", "tiny_yamnet_dir", None, {}),
    "pyannote": ("pyannote", "tiny_pyannote_dir", None, {}),
}
SAMPLES = (16000, 1, 23999, 399, 8000, 16001, 640)


def test_every_registered_encoder_has_a_case() -> None:
    assert {type_ for type_, *_ in CASES.values()} == set(ENCODERS)


@pytest.fixture(params=CASES)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments of build_encoder."""
    type_, fixture, kind, extra = CASES[request.param]
    folder = request.getfixturevalue(fixture)
    return {"type": type_, "path": str(folder if kind is None else folder(kind)), **extra}


@pytest.fixture
def encoder(options: dict[str, Any]) -> AbsEncoder:
    return build_encoder(**options)


def _batch(padding: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of ``SAMPLES`` samples and different loudness, with ``padding`` behind each."""
    wave = torch.full((len(SAMPLES), max(SAMPLES) + 500), padding)
    generator = torch.Generator().manual_seed(1)
    for row, size in enumerate(SAMPLES):
        wave[row, :size] = torch.randn(size, generator=generator).mul(0.02 * (row + 1)).clamp(-1, 1)
    return wave, torch.tensor(SAMPLES)


def test_padded_equals_unpadded(encoder: AbsEncoder) -> None:
    """Neighbours, padding and values in the padding change neither frames nor values."""
    wave, lengths = _batch(padding=torch.nan)
    together, frames = encoder(wave, lengths)
    assert together.shape == (len(SAMPLES), encoder.num_layers, int(frames.max()), encoder.width)
    assert torch.equal(frames, encoder.output_lengths(lengths)) and int(frames.min()) >= 1
    for row, size in enumerate(SAMPLES):
        alone, own = encoder(wave[row : row + 1, :size], lengths[row : row + 1])
        assert own.tolist() == [frames[row]]
        torch.testing.assert_close(together[row, :, : own[0]], alone[0], atol=1e-4, rtol=1e-4)
        assert not together[row, :, own[0] :].any()


def test_hidden_states_follow_the_signal(encoder: AbsEncoder) -> None:
    """Guards the test above, which constant hidden states would pass: differences are far above its tolerance."""
    wave, lengths = _batch(padding=0.0)
    hidden, _ = encoder(wave[:1], lengths[:1])
    other, _ = encoder(wave[2:3, :16000], lengths[:1])
    assert ((hidden - other).abs().amax(dim=(0, 2, 3)) > 2e-3).all()


def test_frame_rate(encoder: AbsEncoder) -> None:
    """One second more gives ``frame_rate`` frames more."""
    one, two = encoder.output_lengths(torch.tensor([1, 2]) * encoder.sample_rate).tolist()
    assert two - one == pytest.approx(encoder.frame_rate, abs=1)


def test_frozen(encoder: AbsEncoder) -> None:
    outer = torch.nn.ModuleDict({"encoder": encoder})
    outer.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    wave, lengths = _batch(padding=0.0)
    assert not encoder(wave.requires_grad_(), lengths)[0].requires_grad


def test_mixed_precision_around_it_changes_nothing(encoder: AbsEncoder) -> None:
    wave, lengths = _batch(padding=0.0)
    expected, _ = encoder(wave, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = encoder(wave, lengths)
    assert torch.equal(hidden, expected)


def test_chosen_layers(options: dict[str, Any], encoder: AbsEncoder) -> None:
    wave, lengths = _batch(padding=0.0)
    every, _ = encoder(wave, lengths)
    assert encoder.layers == tuple(range(encoder.num_layers))
    for chosen in ([encoder.num_layers - 1, 0], [0], [encoder.num_layers - 2]):
        some = build_encoder(**options, layers=chosen)
        assert (some.layers, some.num_layers) == (tuple(chosen), len(chosen))
        torch.testing.assert_close(some(wave, lengths)[0], every[:, chosen], atol=1e-5, rtol=1e-5)


def test_wrong_layers(options: dict[str, Any], encoder: AbsEncoder) -> None:
    for wrong in ([encoder.num_layers], [-1], [0, 0], []):
        with pytest.raises(ConfigError, match=f"from 0 to {encoder.num_layers - 1}"):
            build_encoder(**options, layers=wrong)


def test_missing_folder_names_the_stage(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.*\n.*--stage 1"):
        build_encoder(**{**options, "path": str(tmp_path / "absent")})


def test_hash_of_the_weights(options: dict[str, Any], encoder: AbsEncoder) -> None:
    before = encoder.weights_sha256()
    assert build_encoder(**options).weights_sha256() == before and len(before) == 64
    next(encoder.parameters()).view(-1)[0] += 1.0
    assert encoder.weights_sha256() != before


def test_lengths_are_checked(encoder: AbsEncoder) -> None:
    for lengths in (torch.tensor([0]), torch.tensor([101]), torch.tensor([[100]])):
        with pytest.raises(ValueError, match="lengths"):
            encoder(torch.zeros(1, 100), lengths)
