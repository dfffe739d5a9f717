"""Waveform models against a direct call of the transformers model on one clip."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel, Wav2Vec2Config, Wav2Vec2Model

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.hf_wave import HFWaveEncoder

KINDS = ["wav2vec2-layer", "wav2vec2-group", "hubert-layer", "wavlm-layer", "wavlm-group", "data2vec-audio-layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(tiny_wave_dir: Callable[[str], Path], kind: str) -> None:
    folder = tiny_wave_dir(kind)
    wave = torch.randn(8000) * 0.1 + 0.05
    encoder = HFWaveEncoder(str(folder))
    hidden, frames = encoder(wave[None], torch.tensor([8000]))
    values = AutoFeatureExtractor.from_pretrained(folder)(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(values.input_values, output_hidden_states=True)
    assert frames.tolist() == [expected.last_hidden_state.shape[1]] and encoder.frame_rate == 50.0
    torch.testing.assert_close(hidden[0], torch.cat(expected.hidden_states), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers', of its own call
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_fused_attention_of_wavlm_equals_transformers(tiny_wave_dir: Callable[[str], Path], norm: str) -> None:
    """Hidden states of a padded batch, with lengths on both sides of a whole number of aligned rows and a gated
    position bias that matters; weights and their names stay, so feature caches stay valid."""
    folder = tiny_wave_dir(f"wavlm-{norm}")
    encoder, reference = HFWaveEncoder(str(folder)), AutoModel.from_pretrained(folder).eval()
    assert encoder.model.state_dict().keys() == reference.state_dict().keys()
    for sizes in ((16, 15, 1), (33, 40, 17), (64,), (130, 3)):  # frames
        frames = torch.tensor(sizes)
        hidden = torch.randn(len(sizes), max(sizes), 16)
        inside = torch.arange(max(sizes)) < frames[:, None]
        for mask in (inside, None):
            with torch.no_grad():
                pair = [
                    model.encoder(hidden.clone(), attention_mask=mask).last_hidden_state
                    for model in (encoder.model, reference)
                ]
            rows = torch.ones_like(inside) if mask is None else mask
            torch.testing.assert_close(pair[0][rows], pair[1][rows], atol=1e-5, rtol=1e-5)
    table = encoder.model.encoder.layers[0].attention.rel_attn_embed.weight
    moved = pair[0].clone()
    table.mul_(-1)
    with torch.no_grad():
        changed = encoder.model.encoder(hidden.clone(), attention_mask=mask).last_hidden_state
    assert (changed - moved).abs().max() > 1e-2


def test_unused_blocks_are_dropped(tiny_wave_dir: Callable[[str], Path]) -> None:
    """One block more than needed stays: transformers applies the final norm to the last one's output."""
    blocks = [
        len(HFWaveEncoder(str(tiny_wave_dir("hubert-layer")), layers=[top]).model.encoder.layers) for top in (0, 1)
    ]
    assert blocks == [1, 2]


def test_adapter_of_a_fine_tuned_model_is_left_out(tiny_wave_dir: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_wave_dir("wav2vec2-layer")
    config = Wav2Vec2Config.from_pretrained(folder, add_adapter=True, num_adapter_layers=2, output_hidden_size=16)
    model = Wav2Vec2Model(config).eval()
    model.load_state_dict({**model.state_dict(), **AutoModel.from_pretrained(folder).state_dict()})
    model.save_pretrained(tmp_path)
    shutil.copy(folder / "preprocessor_config.json", tmp_path)
    wave, lengths = torch.randn(1, 8000), torch.tensor([8000])
    one, two = HFWaveEncoder(str(folder))(wave, lengths), HFWaveEncoder(str(tmp_path))(wave, lengths)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_not_a_waveform_model(tiny_whisper_dir: Path) -> None:
    with pytest.raises(ConfigError, match="WhisperModel, which is no model on raw waveforms"):
        HFWaveEncoder(str(tiny_whisper_dir))


def test_no_feature_extractor(tiny_wave_dir: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_wave_dir("wavlm-layer"), tmp_path / "wavlm"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="preprocessor_config"):
        HFWaveEncoder(str(folder))


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ConfigError, match="cannot load"):
        HFWaveEncoder(str(tmp_path))


def test_id_that_is_not_in_the_cache() -> None:
    """Offline (as in all tests), an id that was never fetched is a configuration error, not a stack trace."""
    with pytest.raises(ConfigError, match="somebody/no-such-wave-model"):
        HFWaveEncoder("somebody/no-such-wave-model")
