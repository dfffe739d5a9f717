"""The ways that the benchmark compares find the same answers, and it writes what it measured; no timing is asserted."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import decode, decode_ways
from torch.nn import functional as F

from pam_espnet.llm.llm import LLM


def way(name: str, llm: Path) -> decode_ways.Way:
    args = argparse.Namespace(way=name, llm=str(llm), exp="", beam=3, dtype="float32")
    return decode_ways.make(args, decode_ways.load(args))


@pytest.mark.parametrize("name", decode.WAYS)
def test_every_way_finds_the_best_answers(name: str, tiny_llm_dir: Path) -> None:
    """Against a beam search without cache, padding or batch, written down in a few lines."""
    generator = torch.Generator().manual_seed(1)
    prefixes = [torch.randn(length, 32, generator=generator) for length in (7, 4, 9)]
    decoder = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32")
    expected = []
    with torch.no_grad():
        for prefix in prefixes:
            beam: list[tuple[float, list[int]]] = [(0.0, [])]
            for _ in range(5):
                longer = []
                for score, tokens in beam:
                    embeds = torch.cat([prefix, decoder.embed(torch.tensor(tokens, dtype=torch.long))])
                    best = F.log_softmax(decoder.lm(inputs_embeds=embeds[None]).logits[0, -1], -1).topk(3)
                    longer += [(score + float(v), [*tokens, int(t)]) for v, t in zip(*best, strict=True)]
                beam = sorted(longer, reverse=True)[:3]
            expected.append(beam[0][1])
        assert way(name, tiny_llm_dir)(prefixes, 5) == expected


def test_points_are_added_and_written(
    tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Here:
        """A way in this process."""

        def __init__(self, name: str, args: argparse.Namespace) -> None:
            self.way = way(name, tiny_llm_dir)

        def ask(self, **request: Any) -> dict[str, Any]:
            return json.loads(json.dumps(decode_ways.reply(self.way, request, "cpu")))

        def close(self) -> None:
            pass

    def run(*more: str) -> str:
        common = ["--llm", str(tiny_llm_dir), "--tokens", "4", "--rounds", "1", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["decode.py", *common, "--ways", "generate", "fused", *more])
        decode.main()
        return capsys.readouterr().out

    monkeypatch.setattr(decode, "Worker", Here)
    output = tmp_path / "out" / "decode.json"
    run("--prefix", "9", "--batch", "1", "2")
    record = json.loads(output.read_text())
    assert [(row["batch"], row["way"]) for row in record["rows"]] == [
        (1, "generate"), (1, "fused"), (2, "generate"), (2, "fused"),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["same_best"] == row["batch"] and row["positions"] == [9, 9]
        assert row["peak_bytes"] >= row["rest_bytes"] > 0 and row["total"] > 0
    again = run("--prefix", "9", "11", "--batch", "1", "--limit", "0")
    assert "measured already" in again and again.count("left out") == 2
    run("--prefix", "9", "--batch", "1", "--profile", "fused")
    table = output.with_suffix(".md").read_text()
    assert table.count("| fused |") == 2 and "Profile of fused, prefix 9, batch 1" in table and "--limit 0" in table
    with pytest.raises(SystemExit, match="options differ"):
        run("--beam", "2")
