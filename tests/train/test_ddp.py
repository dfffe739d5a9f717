"""Two processes (gloo) that share every batch train what one process trains."""

from pathlib import Path

import pytest
import torch
from processes import check_same, train
from tiny_model import deeper_llm

pytestmark = pytest.mark.slow  # each process imports ESPnet


@pytest.fixture(scope="module")
def deep_llm_dir(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks, some of which are left out of a step."""
    torch.manual_seed(0)
    return deeper_llm(tiny_llm_dir, tmp_path_factory.mktemp("models") / "deep-llm", 5)


def test_two_processes_train_what_one_does(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    options = {"batching_conf": {"max_utterances": 4, "pool": 2, "limits": "global"}}
    one = train(data, tiny_llm_dir, tmp_path / "one", 1, **options)
    two = train(data, tiny_llm_dir, tmp_path / "two", 2, **options)
    check_same(one, two)
    lines = (tmp_path / "two/rank0.log").read_text().splitlines()
    rates = [line for line in lines if "s of audio/s" in line]
    assert len(rates) == 4 and "1epoch:train:1-2batch: " in rates[0] and "2epoch:train:3-4batch: " in rates[-1]
    assert "0 tokens/s" not in rates[0].split() and "s of audio/s" not in (tmp_path / "two/rank1.log").read_text()
    first, last = (entry["loss_answer"] for entry in one[1] if entry["split"] == "valid")
    assert last < first


def test_gradients_in_bfloat16_differ_by_its_rounding(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    """``ddp_comm_hook=bf16_compress_hook``; of one step of gradient descent, which moves weights by their gradient."""
    one_step = {"max_epoch": 1, "num_iters_per_epoch": 1}
    still, exact, rounded = (
        train(data, tiny_llm_dir, tmp_path / f"{lr}-{hook}", 2, optim_conf={"lr": lr}, ddp_comm_hook=hook, **one_step)
        for lr, hook in ((1e-30, None), (0.05, None), (0.05, "bf16_compress_hook"))
    )
    moved, error = (
        torch.cat([(one[0][name] - other[0][name]).flatten().double() for name in still[0]])
        for one, other in ((exact, still), (rounded, exact))
    )
    assert 0 < error.norm() < 2**-8 * moved.norm()
    losses = [next(e["loss_answer"] for e in curve if e["split"] == "valid") for _, curve in (exact, rounded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_rank_without_an_utterance_of_some_task_does_not_hang(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    """Batches of two: each rank has one utterance, so one task at most, and most experts get no gradient."""
    options = {
        "batching_conf": {"max_utterances": 1, "pool": 2},
        "model_conf": {"extract_feats_in_collect_stats": False, "router_loss_weight": 0.1},
    }
    trained, curve = train(data, tiny_llm_dir, tmp_path / "exp", 2, **options)
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    assert all({"loss_asr", "loss_count", "loss_caption"} <= set(e) for e in curve if e["split"] == "valid")
