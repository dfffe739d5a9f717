"""Training with the LLM's blocks sharded over two processes (FSDP2, gloo) is training with whole ones."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import check_same, command, environment, trained
from tiny_model import deeper_llm

from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM

KIT = Path(__file__).resolve().parents[1] / "kit"


@pytest.fixture(scope="module")
def deep_llm_dir(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks, every second of which can be recomputed."""
    torch.manual_seed(0)
    return deeper_llm(tiny_llm_dir, tmp_path_factory.mktemp("models") / "deep-llm", 5)


@pytest.mark.slow  # three processes import transformers
def test_gradients_are_those_of_whole_blocks(deep_llm_dir: Path, tmp_path: Path) -> None:
    """Prompts differ between the processes, every second block is recomputed, the loss has an early exit."""
    agent = ["--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2"]
    script = [str(KIT / "sharded_ranks.py"), str(deep_llm_dir), str(tmp_path)]
    words = [sys.executable, "-m", "torch.distributed.run", *agent, *script]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for whole, *sharded in ranks:
        for other in sharded:
            for name in ("vectors", "steps", "valid", "state"):
                torch.testing.assert_close(other[name], whole[name], atol=1e-6, rtol=1e-5)
            held, size = other["held"]
            assert size == whole["held"][0] == whole["held"][1] and held == size / 2
    assert not torch.equal(ranks[0][0]["steps"][0]["audio"], ranks[1][0]["steps"][0]["audio"][:, :5])


def test_one_process_holds_the_whole_llm(tiny_llm_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        llm = LLM.from_pretrained(str(tiny_llm_dir), shard="node")
    assert llm.shard_group is None and "one process, which holds the whole LLM" in caplog.text
    with pytest.raises(ConfigError, match=r"llm_conf\.shard: 'gpu'; choose node, all"):
        LLM.from_pretrained(str(tiny_llm_dir), shard="gpu")


@pytest.mark.slow  # each run imports ESPnet three times
def test_training_killed_and_resumed_is_training_with_whole_blocks(
    data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    lora = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]}
    changes: dict[str, Any] = {
        "batching_conf": {"max_utterances": 1, "pool": 2},  # a task, and so a prompt, that another process has not
        "num_iters_per_epoch": 40,
        "checkpoint_steps": 5,
        "optim_conf": {"lr": 0.01},
    }

    def words(name: str, **llm_conf: Any) -> list[str]:
        conf = {"dtype": "float32", "lora": lora, **llm_conf}
        return command(data, tmp_path / name, tiny_llm_dir, "--processes", "2", **changes, llm_conf=conf)

    def run(arguments: list[str]) -> str:
        done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    run(words("whole"))
    assert "GB in each of 2 processes" in run(words("sharded", shard="node"))
    check_same(trained(tmp_path / "whole"), trained(tmp_path / "sharded"))
    arguments = words("killed", shard="node")
    agent = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("step_checkpoint/epoch1_step*")):
        assert time.monotonic() < deadline and agent.poll() is None
        time.sleep(0.02)
    agent.kill()
    agent.wait()
    assert not (tmp_path / "killed/model.safetensors").exists()
    assert "resumed epoch 1 at step" in run(arguments)
    killed, unbroken = (trained(tmp_path / name)[0] for name in ("killed", "sharded"))
    assert all(torch.equal(killed[name], unbroken[name]) for name in unbroken)
