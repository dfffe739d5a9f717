"""Two processes (gloo) that share every batch train what one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import deeper_llm, tiny_config, train_args

from pam_espnet.checkpoint import read_trained
from pam_espnet.config import write_config

pytestmark = pytest.mark.slow  # each process imports ESPnet

TRAINING: dict[str, Any] = {
    "optim": "sgd",  # Adam divides by the gradient's size: rounding of tiny gradients would become full steps
    "optim_conf": {"lr": 0.05},
    "max_epoch": 2,
    "num_iters_per_epoch": 4,
    "best_model_criterion": [["valid", "loss_answer", "min"]],
    "keep_nbest_models": 1,
    "log_interval": 2,
    "seed": 5,
}


def train(root: Path, llm: Path, output: Path, ranks: int, **changes: Any) -> tuple[dict[str, Any], list[dict]]:
    """Train with ``ranks`` processes; the trained tensors and the curve."""
    output.mkdir()
    write_config({**tiny_config(llm), **TRAINING, **changes}, output / "train.yaml")
    command = [sys.executable, "-m", "pam_espnet.bin.pam_train", *train_args(root, output / "train.yaml", output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])  # tiny_encoder
    shared = [
        "--dist_backend", "gloo", "--dist_init_method", f"file://{output}/init", "--dist_world_size", str(ranks),
        "--multiprocessing_distributed", "false",
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            command + ([*shared, "--dist_rank", str(rank)] if ranks > 1 else []),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in processes:
            process.kill()
    curve = [json.loads(line) for line in (output / "curve.jsonl").read_text().splitlines()]
    return read_trained(output / "model.safetensors"), curve


@pytest.fixture(scope="module")
def deep_llm_dir(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks, some of which are left out of a step."""
    torch.manual_seed(0)
    return deeper_llm(tiny_llm_dir, tmp_path_factory.mktemp("models") / "deep-llm", 5)


def test_blocks_left_out_on_both_ranks_do_not_hang(data: Path, deep_llm_dir: Path, tmp_path: Path) -> None:
    """Parameters of a block that is left out have no gradient on any rank; the next step has them again."""
    joint = {"exit_weight": 0.4, "exit_layers": [2, 3], "exit_layer_dropout": 0.9}
    options = {
        "batching_conf": {"max_utterances": 4, "pool": 2},
        "model_conf": {"extract_feats_in_collect_stats": False, **joint},
    }
    trained, curve = train(data, deep_llm_dir, tmp_path / "exp", 2, **options)
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    moved = [name for name, tensor in trained.items() if "lora_B" in name and tensor.abs().max() > 0]  # from zero
    assert len(moved) == 5
    assert all("loss_exit" in entry for entry in curve if entry["split"] == "train")


def test_two_processes_train_what_one_does(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    options = {"batching_conf": {"max_utterances": 4, "pool": 2}}
    one, one_curve = train(data, tiny_llm_dir, tmp_path / "one", 1, **options)
    two, two_curve = train(data, tiny_llm_dir, tmp_path / "two", 2, **options)
    assert set(one) == set(two)
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-4), name
    valid = [[e["loss_answer"] for e in curve if e["split"] == "valid"] for curve in (one_curve, two_curve)]
    assert len(valid[0]) == 2 and valid[0] == pytest.approx(valid[1], rel=1e-4)
    assert valid[0][1] < valid[0][0]


def test_a_rank_without_an_utterance_of_some_task_does_not_hang(
    data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    """Batches of two: each rank has one utterance, so one task at most, and most experts get no gradient."""
    options = {
        "batching_conf": {"max_utterances": 2, "pool": 2},
        "model_conf": {"extract_feats_in_collect_stats": False, "router_loss_weight": 0.1},
    }
    trained, curve = train(data, tiny_llm_dir, tmp_path / "exp", 2, **options)
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    assert all({"loss_asr", "loss_count", "loss_caption"} <= set(e) for e in curve if e["split"] == "valid")
