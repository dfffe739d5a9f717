"""Warm start and feature cache in several processes (gloo): what one process makes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omniio import kaldi
from processes import TRAINING, finish, sgd, start_ranks
from tiny_model import tiny_config, train_args, write_data

from pam_espnet.config import write_config
from pam_espnet.fileio import read_trained

pytestmark = pytest.mark.slow  # each process imports ESPnet

Warm = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]  # the weights, and the log


def arguments(data: Path, exp: Path, llm: Path, limits: str = "per_gpu", **options: Any) -> list[str]:
    """Of a warm start of all tasks, whose mixture is fitted to the validation set in every second step."""
    tasks = {"asr": "ctc", "count": "bag", "caption": "bag"}
    warm = {"losses": tasks, "held_out_every": 2, "save_every": 2, "report_every": 1, "max_utterances": 6, **options}
    model = {"ctc_weight": 0.1, "router_loss_weight": 0.1, "ctc_tokens": str(exp / "tokens")}
    changes = {"warm_start_conf": warm, "batching_conf": {"limits": limits}}
    exp.mkdir(exist_ok=True)
    write_config({**tiny_config(llm, **model), **TRAINING, **changes}, exp / "given.yaml")
    return train_args(data, exp / "given.yaml", exp)


def result(exp: Path) -> Warm:
    lines = (exp / "warm_start.jsonl").read_text().splitlines()
    return read_trained(exp / "warm_start.safetensors"), [json.loads(line) for line in lines]


@pytest.mark.parametrize("limits", ["global", "per_gpu"])
def test_two_processes_warm_start_as_one_does(
    limits: str, data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per GPU: half as many steps at the root of two times the rate, as one process with that written out."""
    from pam_espnet.bin.pam_warm_start import main

    one, two = tmp_path / "one", tmp_path / "two"
    options: dict[str, Any] = {"steps": 8, "single_steps": 3, "lr": 0.05}
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", sgd)
        assert main(arguments(data, one, tiny_llm_dir, limits, **options)) == 0
    if limits == "per_gpu":
        options = {"steps": 15, "single_steps": 6, "lr": 0.05 / 2**0.5, "max_utterances": 3}
    words = arguments(data, two, tiny_llm_dir, limits, **options)
    finish(start_ranks(two, "pam_warm_start", words, 2, PAM_TEST_SGD="yes"), two)
    log = (two / "rank0.log").read_text()
    assert ("2 processes: 8 steps (of 15), learning rate times 1.41" in log) == (limits == "per_gpu")
    assert "warm_start.safetensors" not in (two / "rank1.log").read_text()
    (weights, lines), (others, other_lines) = result(one), result(two)
    assert weights.keys() == others.keys() and (one / "tokens").read_text() == (two / "tokens").read_text()
    assert len(lines) == 9 and [line.keys() for line in lines] == [line.keys() for line in other_lines]
    for line, other in zip(lines, other_lines, strict=True):
        assert list(line.values()) == pytest.approx(list(other.values()), abs=2e-4)
    for name, tensor in weights.items():
        assert torch.allclose(tensor, others[name], atol=1e-5), name


def test_a_killed_warm_start_of_two_processes_goes_on(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    def start(exp: Path) -> Any:
        return start_ranks(exp, "pam_warm_start", arguments(data, exp, tiny_llm_dir, steps=60), 2)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole), whole)
    processes, deadline = start(killed), time.monotonic() + 120
    while not (killed / "warm_start.pth").exists():
        assert time.monotonic() < deadline and processes[0].is_alive(), (killed / "rank0.log").read_text()[-3000:]
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    assert not (killed / "warm_start.safetensors").exists()
    finish(start(killed), killed)
    assert "warm start: resumed at step" in (killed / "rank0.log").read_text()
    (weights, lines), (others, other_lines) = result(whole), result(killed)
    assert lines == other_lines and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_diverged_warm_start_of_two_processes_writes_nothing(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    processes = start_ranks(exp, "pam_warm_start", arguments(data, exp, tiny_llm_dir, steps=8, lr=1e30), 2)
    for rank, process in enumerate(processes):
        process.join(120)
        log = (exp / f"rank{rank}.log").read_text()
        assert process.exitcode == 1 and "a lower warm_start_conf.lr than 1e+30" in log
    assert not (exp / "warm_start.safetensors").exists()


def test_three_processes_cache_what_one_does(tiny_llm_dir: Path, tmp_path: Path) -> None:
    from pam_espnet.bin.pam_cache_features import main

    write_data(tmp_path, "train", size=85)  # 255 utterances: three shards
    write_data(tmp_path, "dev", size=1)  # one
    words = arguments(tmp_path, tmp_path / "exp", tiny_llm_dir)[:-2]
    assert main([*words, "--feats", str(tmp_path / "one")]) == 0
    finish(start_ranks(tmp_path, "pam_cache_features", [*words, "--feats", str(tmp_path / "three")], 3), tmp_path)
    for path in (f"{encoder}/{name}/feats.scp" for encoder in ("one", "two") for name in ("train", "dev")):
        one, three = (kaldi.load_scp(str(tmp_path / feats / path)) for feats in ("one", "three"))
        assert list(one) == list(three) and all((one[utt] == three[utt]).all() for utt in one)
    assert "features one train: 100%" in (tmp_path / "rank0.log").read_text()
    assert "features" not in (tmp_path / "rank2.log").read_text()
    # all there: nothing is encoded again
    arks = sorted((tmp_path / "three").rglob("*.ark"))
    times = [ark.stat().st_mtime_ns for ark in arks]
    finish(start_ranks(tmp_path, "pam_cache_features", [*words, "--feats", str(tmp_path / "three")], 2), tmp_path)
    assert len(arks) == 8 and times == [ark.stat().st_mtime_ns for ark in arks]
