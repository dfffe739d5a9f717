"""The commands of stage 3 on the tiny model in one process, or in several that share the work (gloo)."""

import importlib
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_config, train_args
from warm import warm_processes

from pam_espnet.config import write_config
from pam_espnet.fileio import read_trained

Training = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]  # what was trained, and the curve

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


def _main(log: Path, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(environment)
    torch.set_num_threads(1)
    if environment.get("PAM_TEST_SGD"):
        torch.optim.AdamW = sgd  # type: ignore[assignment,misc]
    sys.exit(importlib.import_module(f"pam_espnet.bin.{module}").main(arguments))


def sgd(groups: Any, lr: float, **_: Any) -> torch.optim.SGD:
    """In place of AdamW, which makes full steps of the rounding of tiny gradients."""
    return torch.optim.SGD(groups, lr=lr)


def start(log: Path, module: str, arguments: Sequence[str], **environment: str) -> BaseProcess:
    """A process with a command of the package."""
    process = warm_processes().Process(target=_main, args=(log, module, arguments, environment))
    process.start()
    return process


def start_ranks(
    folder: Path, module: str, arguments: Sequence[str], ranks: int, **environment: str
) -> list[BaseProcess]:
    """The processes that an agent of torch.distributed.run would start; their logs are ``folder/rank<r>.log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    return [start(log, module, arguments, **shared, **one, **environment) for log, one in zip(logs, own, strict=True)]


def finish(processes: Sequence[BaseProcess], folder: Path) -> None:
    """Wait until all have ended well."""
    try:
        for rank, process in enumerate(processes):
            process.join(300)
            assert process.exitcode == 0, (folder / f"rank{rank}.log").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()


def train(root: Path, llm: Path, output: Path, ranks: int, **changes: Any) -> Training:
    """Train with ``ranks`` processes; the trained tensors and the curve."""
    output.mkdir()
    write_config({**tiny_config(llm), **TRAINING, **changes}, output / "given.yaml")
    shared = [
        "--dist_backend", "gloo", "--dist_init_method", f"file://{output}/init", "--dist_world_size", str(ranks),
        "--multiprocessing_distributed", "false",
    ]  # fmt: skip
    arguments = train_args(root, output / "given.yaml", output)
    processes = []
    for rank in range(ranks):
        more = [*shared, "--dist_rank", str(rank)] if ranks > 1 else []
        processes.append(start(output / f"rank{rank}.log", "pam_train", [*arguments, *more]))
    finish(processes, output)
    return trained(output)


def command(data: Path, exp: Path, llm: Path, *words: str, **changes: Any) -> list[str]:
    """pam_train, with further options ``words``."""
    exp.mkdir(exist_ok=True)
    write_config({**tiny_config(llm), **TRAINING, **changes}, exp / "given.yaml")
    return [sys.executable, "-m", "pam_espnet.bin.pam_train", *train_args(data, exp / "given.yaml", exp), *words]


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports the kit's encoders and has no GPU."""
    kit = str(Path(__file__).parent)
    return {**os.environ, "PYTHONPATH": kit, "CUDA_VISIBLE_DEVICES": "", **more}


def trained(exp: Path) -> Training:
    """What the training in ``exp`` has written."""
    curve = [json.loads(line) for line in (exp / "curve.jsonl").read_text().splitlines()]
    return read_trained(exp / "model.safetensors"), curve


def check_same(one: Training, other: Training, epochs: int = 2) -> None:
    """Both trained the same: tensors to 1e-4, losses on the validation set to 1e-4 of their value.

    Not to the last digit: over two ranks, sums are taken in another order.
    """
    assert set(one[0]) == set(other[0])
    for name in one[0]:
        assert torch.allclose(one[0][name], other[0][name], atol=1e-4), name
    losses = [[e["loss_answer"] for e in curve if e["split"] == "valid"] for _, curve in (one, other)]
    assert len(losses[0]) == epochs and losses[0] == pytest.approx(losses[1], rel=1e-4)
