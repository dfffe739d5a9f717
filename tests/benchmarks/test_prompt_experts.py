"""The table of experts that wordings find is that of the models' own routing."""

import sys
from pathlib import Path

import pytest
import torch
from benchmarks import prompt_experts
from tiny_model import write_exp

from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.fileio import read_json

WORDINGS = {"asr": ["Transcribe.", "Write it down.", "What is said?"], "count": ["How many?", "Count them."]}


def test_experts_of_wordings(tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, prompts in WORDINGS.items():
        (tmp_path / f"{task}.txt").write_text("# a comment\n" + "".join(f"{prompt}\n" for prompt in prompts))
    exp = tmp_path / "exp"
    exp.mkdir()
    write_exp(exp, tiny_llm_dir)
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)  # a router that tells prompts apart
    tensors = {
        name: torch.randn_like(tensor) if ".router." in name else tensor
        for name, tensor in load_file(exp / "model.safetensors").items()
    }
    save_file(tensors, exp / "model.safetensors")
    out = tmp_path / "out.json"
    argv = ["prompt_experts.py", "--exp", str(exp), "--prompts", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    prompt_experts.main()

    speech = SpeechLLM.load(exp, AnswerOptions())
    asked = [(task, prompt) for task, prompts in WORDINGS.items() for prompt in prompts]
    found = [speech.answer([torch.zeros(8000)], [prompt])[0].routing for _, prompt in asked]
    own = {task: found[asked.index((task, prompts[0]))]["expert"] for task, prompts in WORDINGS.items()}
    assert len({one["expert"] for one in found}) > 1
    *rows, total = read_json(out)["rows"]
    right = 0
    for row, (task, prompt), routing in zip(rows, asked, found, strict=True):
        assert (row["task"], row["wording"]) == (task, prompt)
        assert float(row["exp"].split()[0]) == pytest.approx(routing["expert_probs"][own[task]], abs=1e-3)
        assert ("**" in row["exp"]) == (routing["expert"] != own[task])
        right += routing["expert"] == own[task] and prompt != WORDINGS[task][0]
    assert total["exp"] == f"{right} of 3"
