"""Start of stage 3's commands in several processes: one agent of torch.distributed.run per node, one process per GPU
under it.

    pam_train ... --ngpu 4                       one node: the command becomes the agent
    srun ... pam_train ... --num_nodes 2 --ngpu 4    Slurm, one task per node (utils/slurm.py --num-nodes 2)
    pam_train ... --num_nodes 2 --ngpu 4 --node_rank 0 --first_node node1:29500     any other cluster: on every node

The agent starts the same command once more for each process, with LOCAL_RANK, RANK and WORLD_SIZE in the environment.
Independent of ESPnet, whose own launcher is not used.
"""

import argparse
import ctypes
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Options that say in how many processes a command runs, and where."""
    parser.add_argument("--ngpu", type=int, metavar="N", help="GPUs of each node (default: ngpu of the configuration)")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes on a node (default: one per GPU, on a CPU 1)"
    )
    parser.add_argument("--num_nodes", type=int, default=1, metavar="N", help="nodes; Slurm names them (default: 1)")
    parser.add_argument("--node_rank", type=int, metavar="I", help="which node this is, from 0, where Slurm is not")
    parser.add_argument(
        "--first_node", metavar="HOST:PORT", help="the first node and a free port there, where Slurm is not"
    )


def chosen_ngpu(args: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """GPUs of each node: ``--ngpu``, else those of the configuration."""
    return int((config.get("ngpu") or 0) if args.ngpu is None else args.ngpu)


def is_rank() -> bool:
    """Whether this process was started by an agent."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the only one, or the first of those that agents started."""
    return not is_rank() or os.environ["RANK"] == "0"


def start(args: argparse.Namespace, ngpu: int, module: str, words: Sequence[str]) -> int | None:
    """Where several processes are asked for, be the agent that runs ``module`` with ``words`` in each; its exit status.
    None: this process does the work, alone or as one of those. Raises as ``agent_options``."""
    if agent := agent_options(args, ngpu):
        return run_agent(agent, module, words)
    if is_rank():
        become_rank(ngpu)
    return None


@contextmanager
def process_group(cuda: bool, wait: timedelta | None = None) -> Iterator[None]:
    """The group of torch.distributed between the processes that agents started: over NCCL, with a GPU each, or gloo; a
    process that is alone has none. ``wait``: how long one may wait for another (default: torch's)."""
    if not is_rank():
        yield
        return
    import torch

    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=wait)
    yield
    torch.distributed.destroy_process_group()  # after an error the others may be in the middle of something


def end(status: int) -> NoReturn:
    """End this process. One that an agent started ends without Python's own finalisation, in which gloo's threads, that
    may still hold the last tensors, would abort it (pytorch/pytorch, pull request 179291)."""
    if is_rank():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def agent_options(args: argparse.Namespace, ngpu: int) -> list[str]:
    """The options of torch.distributed.run; none, where this process is to be alone or one that an agent started.
    Raises ConfigError: options that contradict each other, or nodes that cannot be found."""
    nproc = max(1, ngpu) if args.processes is None else args.processes
    for name, value in (("--processes", nproc), ("--num_nodes", args.num_nodes)):
        check_number(value, name, at_least=1, whole=True)
    if ngpu and nproc != ngpu:
        raise ConfigError(f"--processes {nproc}: there is one process per GPU, and --ngpu is {ngpu}")
    if is_rank() or nproc * args.num_nodes == 1:
        return []
    if args.num_nodes == 1:
        return ["--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", str(nproc)]
    node, master = args.node_rank, args.first_node
    if node is None and master is None and "SLURM_NODEID" in os.environ:
        node, master = _from_slurm(args.num_nodes)
    if node is None or not re.fullmatch(r"\S+:\d+", master or "") or not 0 <= node < args.num_nodes:
        raise ConfigError(
            f"--num_nodes {args.num_nodes}: which node is this, and which is the first?\n"
            "  -> under Slurm start it with srun, one task per node; else give --node_rank I --first_node HOST:PORT"
        )
    host, _, port = str(master).rpartition(":")
    # The static rendezvous, because the other one asks each node whether it has the first one's name, and on some
    # clusters none knows that it has.
    return [
        "--nnodes", str(args.num_nodes), "--node_rank", str(node), "--master_addr", host, "--master_port", port,
        "--nproc_per_node", str(nproc),
    ]  # fmt: skip


def run_agent(options: Sequence[str], module: str, words: Sequence[str]) -> int:
    """Be the agent of this node until its processes have ended; 0, or 1 when one failed (its message is in the log)."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    nproc = int(options[-1])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    try:
        main([*options, "-m", module, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"error: process {rank} ended first, with status {failure.exitcode}; see above", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def become_rank(ngpu: int) -> None:
    """Prepare a process that an agent started: it ends with the agent, even by SIGKILL, or it would hold the
    experiment's lock; without GPUs it sees none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if not ngpu:
        # As many names as there are processes, none of which is a GPU: ESPnet counts them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _from_slurm(num_nodes: int) -> tuple[int, str]:
    """(index of this node, HOST:PORT of the first one) in a step of Slurm with one task per node."""
    tasks, nodes = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    if not tasks == nodes == str(num_nodes):
        raise ConfigError(
            f"--num_nodes {num_nodes}: this step of Slurm has {tasks} tasks on {nodes} nodes\n"
            f"  -> srun --nodes={num_nodes} --ntasks={num_nodes} --ntasks-per-node=1"
        )
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    port = 15000 + int(os.environ["SLURM_JOB_ID"]) % 15000  # the same on all nodes; below those that systems give out
    return int(os.environ["SLURM_NODEID"]), f"{first_host(names)}:{port}"


def first_host(names: str) -> str:
    """The first name of Slurm's list of nodes, such as ``gpu[07-09,12],login1``: as scontrol reads it, where it is."""
    if scontrol := shutil.which("scontrol"):
        done = subprocess.run([scontrol, "show", "hostnames", names], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    # The first of every bracket, up to a comma outside of brackets: rack[1-2]n[07-09] begins with rack1n07.
    plain = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", names)
    return plain.split(",")[0]
