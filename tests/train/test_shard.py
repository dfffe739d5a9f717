"""Training with the LLM's blocks sharded over two processes (FSDP2, gloo) is training with whole ones."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import check_same, command, environment, train, trained
from services import unavailable
from tiny_model import deeper_llm

from pam_espnet.config import load_yaml
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.llm.shard import stream_blocks

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


@pytest.mark.parametrize("shard", [None, "node"])
def test_a_warm_start_streams_blocks_that_may_not_fit(tiny_llm_dir: Path, shard: str | None) -> None:
    """On a CPU the copy of a block is the block; that it is on the GPU for its pass alone is for tests/gpu."""
    whole, streamed = (LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", shard=shard) for _ in range(2))
    stream_blocks(streamed.lm, "cpu")
    assert streamed.to("meta").device.type == "meta"
    assert {p.device.type for p in streamed.transformer.layers.parameters()} == {"cpu"}
    streamed.lm.model.embed_tokens, streamed.lm.model.norm = whole.lm.model.embed_tokens, whole.lm.model.norm
    streamed.lm.model.rotary_emb = whole.lm.model.rotary_emb
    assert torch.equal(streamed.prompt_vectors(["Hi", "Count."]), whole.prompt_vectors(["Hi", "Count."]))


LLM_CONF = {"dtype": "float32", "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]}}


def changes(steps: int) -> dict[str, Any]:
    """Batches of one utterance for each process: a task, and so a prompt, that the other one has not."""
    batching = {"max_utterances": 1, "pool": 2}
    return {"batching_conf": batching, "num_iters_per_epoch": steps, "optim_conf": {"lr": 0.01}, "llm_conf": LLM_CONF}


def run(words: list[str]) -> str:
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow  # five processes import ESPnet
def test_training_is_that_with_whole_blocks(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    joint = {"extract_feats_in_collect_stats": False, "exit_weight": 0.4, "exit_layers": [1]}
    more = {**changes(8), "model_conf": joint}
    sharded = {**more, "llm_conf": {**LLM_CONF, "shard": "node", "gradient_checkpointing": True}}
    two = ["--processes", "2"]
    log = run(command(data, tmp_path / "sharded", tiny_llm_dir, *two, **sharded))
    assert "GB in each of 2 processes" in log
    run(command(data, tmp_path / "whole", tiny_llm_dir, *two, **more))
    check_same(trained(tmp_path / "whole"), trained(tmp_path / "sharded"))
    model = trained(tmp_path / "sharded")[0]
    assert not [name for name in model if "base_layer" in name]
    config = load_yaml(tmp_path / "sharded/config.yaml")
    answers = SpeechLLM.load(tmp_path / "sharded", AnswerOptions.from_dict({}, "options"), config=config)
    assert len(answers.answer([np.zeros(8000, np.float32)], ["Hi"])) == 1  # one process reads the whole LLM


@pytest.mark.slow
@pytest.mark.services  # minutes
def test_a_killed_training_continues_as_the_unbroken_one(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    more = {**changes(40), "checkpoint_steps": 5, "llm_conf": {**LLM_CONF, "shard": "all"}}
    unbroken, killed = (
        command(data, tmp_path / name, tiny_llm_dir, "--processes", "2", **more) for name in ("unbroken", "killed")
    )
    run(unbroken)
    agent = subprocess.Popen(killed, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "killed").glob("step_checkpoint/epoch1_step*")):
        assert time.monotonic() < deadline and agent.poll() is None
        time.sleep(0.02)
    agent.kill()
    agent.wait()
    assert not (tmp_path / "killed/model.safetensors").exists()
    assert "resumed epoch 1 at step" in run(killed)
    one, other = (trained(tmp_path / name)[0] for name in ("killed", "unbroken"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
@pytest.mark.services
def test_four_bits_train_alike_in_one_and_two_processes(
    data: Path, small_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        unavailable("bitsandbytes", "bitsandbytes is not installed: tools/setup.sh --extras quantize")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # or its kernels for CPUs are compiled first
    more: dict[str, Any] = {
        "batching_conf": {"max_utterances": 4, "pool": 2, "limits": "global"},
        "llm_conf": {**LLM_CONF, "quantize": "nf4", "lora": {"r": 2, "dropout": 0.0}},
        "checkpoint_steps": 2,
        "optim_conf": {"lr": 0.005},
    }
    one, two = (train(data, small_llm_dir, tmp_path / name, n, **more) for name, n in (("one", 1), ("two", 2)))
    check_same(one, two)
