"""AST: one window equals transformers; a longer clip is read window by window."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.ast import ASTEncoder


def _noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)).mul(0.1)


@pytest.mark.parametrize("samples", [8000, 4321, 400])
def test_one_window_equals_transformers(tiny_ast_dir: Path, samples: int) -> None:
    """Feature extractor, model and final layer norm as transformers runs them; frames are means over frequency."""
    from transformers import ASTFeatureExtractor, ASTModel

    encoder = ASTEncoder(str(tiny_ast_dir))
    wave = _noise(samples)
    mel = ASTFeatureExtractor.from_pretrained(tiny_ast_dir)(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    model = ASTModel.from_pretrained(tiny_ast_dir).eval()
    with torch.no_grad():
        expected = model(mel["input_values"], output_hidden_states=True)
    hidden, frames = encoder(wave[None], torch.tensor([samples]))
    assert frames.tolist() == [-(-samples // 1600)] and (encoder.frame_rate, encoder.width) == (10.0, 16)
    across = (40 - 16) // 10 + 1
    for index, state in enumerate([*expected.hidden_states[:3], expected.last_hidden_state]):
        means = state[0, 2:].reshape(across, 5, 16).mean(0)
        torch.testing.assert_close(hidden[0, index], means[: frames[0]], atol=1e-4, rtol=1e-4)


def test_the_next_window_begins_where_the_patches_end(tiny_ast_dir: Path) -> None:
    """Half a second is five patches: frames 5.. of a clip are the frames of the clip from sample 8000 on."""
    encoder = ASTEncoder(str(tiny_ast_dir))
    wave = _noise(20000)
    hidden, frames = encoder(wave[None], torch.tensor([20000]))
    later, _ = encoder(wave[None, 8000:], torch.tensor([12000]))
    assert frames.tolist() == [13]
    torch.testing.assert_close(hidden[:, :, 5:], later, atol=1e-4, rtol=1e-4)


def test_a_preprocessor_that_does_not_fit(tiny_ast_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ast"
    shutil.copytree(tiny_ast_dir, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_mel_bins": 128}))
    with pytest.raises(ConfigError, match="128 mel bins"):
        ASTEncoder(str(folder))
    file.unlink()
    with pytest.raises(ConfigError, match="preprocessor_config"):
        ASTEncoder(str(folder))
