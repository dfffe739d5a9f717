"""Copies of a model in which a part of its experts is changed."""

import sys
from pathlib import Path

import pytest
import torch
from benchmarks import expert_parts
from tiny_model import tiny_config, write_data, write_exp

from pam_espnet.data.datadir import validate
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.shards import read_wave
from pam_espnet.decode.speech_llm import SpeechLLM


def test_changed_parts(tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = validate(write_data(tmp_path, "test", size=3))
    exp = tmp_path / "exp"
    exp.mkdir()
    write_exp(exp, tiny_llm_dir)
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    tensors = {name: torch.randn_like(tensor) for name, tensor in load_file(exp / "model.safetensors").items()}
    save_file(tensors, exp / "model.safetensors")
    monkeypatch.setattr(sys, "argv", ["expert_parts.py", "--exp", str(exp), "--out", str(tmp_path / "parts")])
    expert_parts.main()

    waves = [read_wave(data, key, 16000) for key in data.utterances]
    prompts = [data.prompt[key] for key in data.utterances]

    def heard(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        audio = SpeechLLM.load(folder, AnswerOptions()).encode(waves, prompts)
        return torch.cat(audio.routing.layer_weights, dim=1), audio.embeddings

    weights, embeddings = heard(exp)
    found = {name: heard(tmp_path / "parts" / name) for name in expert_parts.CHANGES}
    mean = tensors[expert_parts.LAYERS].softmax(dim=1).mean(dim=0)
    for name in ("same_weights", "neither"):
        torch.testing.assert_close(found[name][0], mean.expand_as(weights))
    torch.testing.assert_close(found["no_networks"][0], weights)
    for name, (_, changed) in found.items():
        assert not torch.allclose(changed, embeddings), name
    moved = tensors[expert_parts.LAYERS].softmax(dim=1).roll(-1, dims=0)
    for row, own in zip(found["next_expert"][0], weights, strict=True):
        expert = int((tensors[expert_parts.LAYERS].softmax(dim=1) - own).abs().sum(dim=1).argmin())
        torch.testing.assert_close(row, moved[expert])


def test_another_fusion_is_refused(
    tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_exp(tmp_path, tiny_llm_dir, frontend_conf=tiny_config(tiny_llm_dir)["frontend_conf"] | {"fusion": "average"})
    monkeypatch.setattr(sys, "argv", ["expert_parts.py", "--exp", str(tmp_path), "--out", str(tmp_path / "parts")])
    with pytest.raises(SystemExit):
        expert_parts.main()
    assert "not a PaM model" in capsys.readouterr().err and not (tmp_path / "parts").exists()
