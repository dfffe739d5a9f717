"""Stage 3 through torch.distributed.run: which agent is started, what its processes make, and what a kill leaves."""

import argparse
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from marked_processes import MARK, running
from processes import check_same, command, environment, trained

from pam_espnet.config import load_yaml
from pam_espnet.errors import ConfigError
from pam_espnet.train.launch import add_launch_options, agent_options, first_host


def options(*words: str, ngpu: int = 0) -> list[str]:
    parser = argparse.ArgumentParser()
    add_launch_options(parser)
    return agent_options(parser.parse_args(words), ngpu)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a task of Slurm: the second of two nodes."""
    environment = {
        "SLURM_JOB_ID": "123456", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-09,12]",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_one_process_needs_no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options() == options(ngpu=1) == options("--processes", "1") == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert options("--num_nodes", "2", ngpu=4) == []  # an agent has started this one


def test_agents() -> None:
    assert options(ngpu=4)[-2:] == ["--nproc_per_node", "4"] and "--standalone" in options(ngpu=4)
    given = options("--num_nodes", "2", "--node_rank", "1", "--first_node", "node1:29500", ngpu=1)
    assert " ".join(given) == "--nnodes 2 --node_rank 1 --master_addr node1 --master_port 29500 --nproc_per_node 1"


def test_nodes_of_slurm(slurm: pytest.MonkeyPatch) -> None:
    found = options("--num_nodes", "2", ngpu=2)
    assert " ".join(found) == "--nnodes 2 --node_rank 1 --master_addr gpu07 --master_port 18456 --nproc_per_node 2"
    slurm.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigError, match="4 tasks on 2 nodes\n  -> srun --nodes=2 --ntasks=2 --ntasks-per-node=1"):
        options("--num_nodes", "2", ngpu=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_nodes", "0"], "--num_nodes: 0"),
        (["--num_nodes", "2"], "which node is this"),
        (["--num_nodes", "2", "--node_rank", "2", "--first_node", "a:1"], "which node is this"),
        (["--num_nodes", "2", "--node_rank", "0", "--first_node", "a"], "--first_node HOST:PORT"),
        (["--processes", "2"], "--ngpu is 4"),
    ],
)
def test_options_that_cannot_work(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(ConfigError, match=message):
        options(*words, ngpu=4)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("login1", "login1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]n[07-09]", "rack1n07"),
        ("a-1.example,b[1-2]", "a-1.example"),
    ],
)
@pytest.mark.parametrize("scontrol", [True, False])
def test_the_first_host_of_a_list(names: str, first: str, scontrol: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scontrol, where it is installed, and without."""
    if not scontrol:
        monkeypatch.setenv("PATH", "")
    assert first_host(names) == first


# -- trained ---------------------------------------------------------------------------------------------------------


def ended(words: list[str], status: int = 0) -> str:
    """Run a command; what it wrote to stderr."""
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stderr[-5000:]
    return done.stderr


@pytest.mark.slow  # three processes import ESPnet
def test_two_processes_train_what_one_does(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    """Limits per process, half as many steps, the rate doubled: as one process with all that written out."""
    from pam_espnet.bin.pam_train import main

    one = tmp_path / "one"
    assert main(command(data, one, tiny_llm_dir, batching_conf={"max_utterances": 4, "pool": 2})[3:]) == 0
    changes = {
        "batching_conf": {"max_utterances": 2, "pool": 2},
        "num_iters_per_epoch": 8,
        "optim_conf": {"lr": 0.025},
    }
    two = tmp_path / "two"
    log = ended(command(data, two, tiny_llm_dir, "--processes", "2", **changes))
    check_same(trained(one), trained(two))
    assert "80 s and 2 utterances on each of 2 processes, 160 s and 4 utterances on all together" in log
    assert "num_iters_per_epoch 8 -> 4" in log
    assert load_yaml(two / "train.yaml")["optim_conf"] == {"lr": 0.025}
    assert load_yaml(two / "config.yaml")["optim_conf"] == {"lr": 0.05}
    # what one process begins to compute is for as many processes
    log = ended(command(data, two, tiny_llm_dir, "--processes", "3", **changes), status=1)
    assert "processes.json: was made with other settings" in log
    assert "error: process 0 ended first, with status 1" in log and "Traceback" not in log


class Nodes:
    """Two agents with two processes each, on loopback, with what Slurm would tell them."""

    def __init__(self, words: list[str], log: Path, mark: str) -> None:
        self.agents = []
        for node in ("0", "1"):
            own = environment(
                SLURM_JOB_ID=str(os.getpid()), SLURM_NODEID=node, SLURM_STEP_NODELIST="127.0.0.[1-2]",
                SLURM_STEP_NUM_NODES="2", SLURM_STEP_NUM_TASKS="2", **{MARK: mark},
            )  # fmt: skip
            with log.open("ab") as file:
                self.agents.append(subprocess.Popen(words, env=own, stdout=file, stderr=file, start_new_session=True))

    def wait(self) -> list[int]:
        return [agent.wait(300) for agent in self.agents]


@pytest.mark.slow
@pytest.mark.services  # minutes
def test_two_nodes_go_on_after_one_was_killed(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    changes = {
        "batching_conf": {"max_utterances": 1, "pool": 2},
        "num_iters_per_epoch": 160,  # of one process: forty of four
        "checkpoint_steps": 5,
        "optim_conf": {"lr": 0.01},
        "ddp_comm_hook": "bf16_compress_hook",
        "unused_parameters": True,  # or DDP lays gradients out anew after its first step, and sums round differently
    }
    lora = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]}  # draws random numbers in every step
    changes["llm_conf"] = {"dtype": "float32", "lora": lora}
    words = ["--num_nodes", "2", "--processes", "2"]
    log = tmp_path / "log"
    whole = command(data, tmp_path / "whole", tiny_llm_dir, *words, **changes)
    assert Nodes(whole, log, str(tmp_path)).wait() == [0, 0], log.read_text()[-5000:]

    exp = tmp_path / "killed"
    again = command(data, exp, tiny_llm_dir, *words, **changes)
    killed = str(exp)
    nodes = Nodes(again, log, killed)
    deadline = time.monotonic() + 300
    while not list(exp.glob("step_checkpoint/epoch1_step*")):
        assert time.monotonic() < deadline and nodes.agents[0].poll() is None, log.read_text()[-5000:]
        time.sleep(0.02)
    nodes.agents[1].kill()
    assert nodes.wait() == [1, -9]
    assert not running(killed)  # no process of either node is left
    assert not (exp / "model.safetensors").exists()
    assert Nodes(again, log, str(tmp_path)).wait() == [0, 0], log.read_text()[-5000:]
    assert "resumed epoch 1 at step" in log.read_text()
    assert (exp / "curve.jsonl").read_bytes() == (tmp_path / "whole/curve.jsonl").read_bytes()
    models = [trained(folder)[0] for folder in (exp, tmp_path / "whole")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
