#!/usr/bin/env python3
"""Run a command n times on this machine, each run with its log: the job-runner contract of Kaldi's recipes.

    utils/run.py [options] [JOB=1:n] LOG command [argument ...]

    utils/run.py exp/train.log python -m my.training --conf conf/train.yaml
    utils/run.py --max-jobs-run 4 JOB=1:8 logs/decode.JOB.log python decode.py --keys split8/JOB/text

JOB (any name) is replaced by the run's number in LOG and in every argument. The command is started as it stands,
without a shell. A log begins with the command and the time and ends with the status and the seconds. If a run fails,
the others still end; then the failed logs' last lines go to stderr and the exit status is 1. Ctrl-C, SIGTERM and SIGHUP
end the commands with everything that they started.

Standard library only, any Python 3.8 or newer: it has to run where the environment is not yet active.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from job_contract import SIGNALS, count, exit_on_signals, ignore_signals, parse_gib, parse_work, positive, show_failures

GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.05
TIME_FORMAT = "%a %b %d %H:%M:%S %Z %Y"


@dataclass
class Running:
    """A started command: its slot (which decides its GPUs) and its log."""

    process: subprocess.Popen[bytes]
    log: Path
    file: IO[bytes]
    slot: int
    started: float


def build_parser() -> argparse.ArgumentParser:
    """The command line; options may be written with dashes or underscores."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        usage="%(prog)s [options] [JOB=1:n] LOG command [argument ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", type=count, metavar="N", help="GPUs per run; 0 hides them all (default: as they are)")
    parser.add_argument("--mem", type=parse_gib, metavar="4G", help="memory per run: not more at once than fit")
    parser.add_argument("--num-threads", "--num_threads", type=positive, metavar="N", help="OMP_NUM_THREADS of a run")
    parser.add_argument(
        "--max-jobs-run", "--max_jobs_run", type=positive, metavar="N", help="runs at once (default: one per core)"
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def visible_gpus() -> list[str]:
    """The GPUs that runs may be given: those of $CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip()]
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    listing = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False).stdout
    return re.findall(r"^GPU (\d+):", listing, flags=re.MULTILINE)


def at_once(args: argparse.Namespace, gpus: list[str]) -> int:
    """How many runs fit on this machine at the same time (at least 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [args.max_jobs_run or max(1, cores // (args.num_threads or 1))]
    if args.mem:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
        limits.append(max(1, int(total / args.mem)))
    if args.gpu:
        limits.append(len(gpus) // args.gpu)
    return min(limits)


def in_child() -> None:
    """Signals are no longer blocked; on Linux: be killed when run.py is (even by SIGKILL): no orphan keeps writing."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def start(command: list[str], log: Path, slot: int, args: argparse.Namespace, gpus: list[str]) -> Running:
    """Write the log's header and start the command in a separate process group."""
    environment = dict(os.environ)
    if args.num_threads:
        environment["OMP_NUM_THREADS"] = str(args.num_threads)
    if args.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * args.gpu : (slot + 1) * args.gpu])
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.open("wb")
    file.write(f"# {shlex.join(command)}\n# Started at {time.strftime(TIME_FORMAT)}\n#\n".encode())
    file.flush()
    begun = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=in_child,  # safe: this program has no threads
        )
    except OSError as error:
        file.write(f"{command[0]}: {error.strerror}\n".encode())
        # Replaces the command, so that there is one way in which a run ends: status 127, as in a shell.
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(127)"])
    return Running(process, log, file, slot, begun)


def finish(run: Running, killed: bool = False) -> int:
    """Write the log's last lines; return the exit status (128 + signal when a signal ended it)."""
    status = run.process.wait()
    status = 128 - status if status < 0 else status
    seconds = round(time.monotonic() - run.started)
    how = "killed with run.py" if killed else f"code {status}"
    ended = time.strftime(TIME_FORMAT)
    run.file.seek(0, os.SEEK_END)
    run.file.write(f"# Ended ({how}) at {ended}, elapsed time {seconds} seconds\n".encode())
    run.file.close()
    return status


def kill(runs: list[Running]) -> None:
    """End process groups: SIGTERM, a few seconds of grace, SIGKILL; then close the logs."""
    ignore_signals()  # it is ending already
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        for run in runs:
            try:
                os.killpg(run.process.pid, wanted)
            except ProcessLookupError:
                continue  # already gone
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(run.process.poll() is None for run in runs):
            time.sleep(POLL_SECONDS)
    for run in runs:
        finish(run, killed=True)


def main(argv: list[str] | None = None) -> int:
    """Run all jobs; return 0 if every one succeeded, else 1 (128 + signal when ended by a signal)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    work = parse_work(parser, args.rest)
    gpus = visible_gpus() if args.gpu else []
    if args.gpu and len(gpus) < args.gpu:
        parser.error(f"--gpu {args.gpu}: {len(gpus)} GPUs are visible; use --gpu 0, or look at CUDA_VISIBLE_DEVICES")

    exit_on_signals()
    pending = deque(work.filled(number) for number in work.numbers)
    free = list(range(min(at_once(args, gpus), len(work.numbers))))
    running: list[Running] = []
    failed: list[tuple[Path, str]] = []
    try:
        while pending or running:
            while pending and free:
                log, *command = pending.popleft()
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # or a command could start that is in no list
                running.append(start(command, Path(log), free.pop(0), args, gpus))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            time.sleep(POLL_SECONDS)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                free.append(run.slot)
                if status := finish(run):
                    failed.append((run.log, str(status)))
    finally:
        if running:  # a signal or a bug: leave nothing behind
            kill(running)
    if failed:
        show_failures("run.py", failed, len(work.numbers))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
