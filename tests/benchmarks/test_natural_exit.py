"""The natural exit profile of a tiny LLM: its last block agrees with itself, and its loss is the LLM's own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import natural_exit


def test_profile(
    tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = "one two three four five six seven eight nine ten zero two three four five six seven eight nine ten one"
    (tmp_path / "text").write_text(f"{words}\n%\ntoo short\n\n{words} {words}\n")
    output = tmp_path / "found.json"
    arguments = ["--llm", f"tiny={tiny_llm_dir}", "--text", str(tmp_path / "text"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["natural_exit.py", *arguments])
    natural_exit.main()
    found = json.loads(output.read_text())
    assert found["paragraphs"] == 2
    own = found["llms"]["tiny"]
    last = own["blocks"][-1]
    assert len(own["blocks"]) == own["depth"] and last["all"] == 100 and own["blocks"][0]["all"] < 100
    assert own["oracle"]["first match"]["value"] <= own["oracle"]["saturated"]["value"] <= own["depth"]
    llm, tokenizer = natural_exit.load(str(tiny_llm_dir))
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    losses = []
    for text in (words, f"{words} {words}"):
        ids = torch.tensor(begin + tokenizer(text, add_special_tokens=False).input_ids)
        with torch.no_grad():
            log_probs = llm(ids[None]).logits[0, :-1].log_softmax(-1)
        losses += [-float(log_probs[at, ids[at + 1]]) for at in range(natural_exit.CONTEXT, len(ids) - 1)]
    assert own["tokens"] == len(losses) and last["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert f"| {own['depth']} of {own['depth']} | 100.0 |" in capsys.readouterr().out
