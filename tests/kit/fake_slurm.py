#!/usr/bin/env python3
"""A replacement of sbatch, srun, squeue and scancel, by the name under which it is called: enough for tests.

Jobs are processes of this machine. $FAKE_SLURM is a folder with the state: ``<job>_<task>`` holds a task's state while
it is in the queue, ``calls`` the command lines of sbatch, ``<job>.sh`` its script; a file ``squeue_fails`` with a
number makes squeue fail that number of times, a file ``slow`` makes sbatch take a second.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ.get("FAKE_SLURM", "."))


def option(name: str, default: str = "") -> str:
    found = [word.partition("=")[2] for word in sys.argv if word.startswith(f"--{name}=")]
    return found[-1] if found else default  # as sbatch, the last one


def sbatch() -> int:
    with (STATE / "calls").open("a") as calls:
        print(" ".join(sys.argv[1:]), file=calls)
    if option("partition") == "none":
        print("sbatch: error: invalid partition specified: none", file=sys.stderr)
        return 1
    if (STATE / "slow").exists():
        time.sleep(1)
    job = str(100 + len(list(STATE.glob("*.sh"))))
    (STATE / f"{job}.sh").write_text(sys.stdin.read())
    array = re.fullmatch(r"(\d+)-(\d+)(?:%(\d+))?", option("array"))
    tasks = [str(n) for n in range(int(array[1]), int(array[2]) + 1)] if array else ["N/A"]
    for task in tasks:
        (STATE / f"{job}_{task.replace('/', '')}").write_text("PD")
    throttle = array[3] if array and array[3] else str(len(tasks))
    command = [sys.executable, __file__, "work", job, option("nodes", "1"), throttle, option("output"), *tasks]
    null = subprocess.DEVNULL
    subprocess.Popen(command, start_new_session=True, stdin=null, stdout=null, stderr=null)
    print("sbatch: a warning that is no number")
    print(f"{job};cluster")
    return 0


def work(job: str, nodes: str, throttle: str, output: str, *tasks: str) -> None:
    """The controller and the node: run the tasks, ``throttle`` at once, until all ended or the job is cancelled."""
    waiting, running = list(tasks), {}
    cancelled = STATE / f"{job}.cancel"
    while waiting or running:
        while waiting and len(running) < int(throttle) and not cancelled.exists():
            task = waiting.pop(0)
            state = STATE / f"{job}_{task.replace('/', '')}"
            state.write_text("R")
            environment = {**os.environ, "SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": nodes}
            if task.isdigit():
                environment["SLURM_ARRAY_TASK_ID"] = task
            with open(output.replace("%a", task).replace("%%", "%"), "wb") as file:
                command = ["sh", str(STATE / f"{job}.sh")]
                started = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
            running[state] = started
        if cancelled.exists():
            for task in waiting:
                (STATE / f"{job}_{task.replace('/', '')}").unlink()
            waiting = []
            for started in running.values():
                os.killpg(started.pid, signal.SIGTERM)
        for state, started in list(running.items()):
            if started.poll() is not None:
                state.unlink()
                del running[state]
        time.sleep(0.02)


def srun() -> int:
    """One task on each node of the job, all of which are addresses of this machine; all end with the first that fails.

    Behind the options, which all have a value after "=", comes the command.
    """
    words = sys.argv[1:]
    while words[0].startswith("--"):
        del words[0]
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    step = {f"SLURM_STEP_{name}": nodes for name in ("NUM_NODES", "NUM_TASKS")}
    step["SLURM_STEP_NODELIST"] = f"127.0.0.[1-{nodes}]"
    tasks = [
        subprocess.Popen(words, env={**os.environ, **step, "SLURM_NODEID": str(node)}) for node in range(int(nodes))
    ]
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks):
            for task in tasks:
                task.terminate()
        time.sleep(0.02)
    return max(abs(task.returncode) for task in tasks)


def squeue() -> int:
    fails = STATE / "squeue_fails"
    left = int(fails.read_text()) if fails.exists() else 0
    if left:
        fails.write_text(str(left - 1))
        print("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    print("99 1 R None")  # somebody's other job
    for path in sorted(STATE.glob("*_*")):
        if re.fullmatch(r"\d+_(\d+|NA)", path.name):
            job, _, task = path.name.partition("_")
            state = path.read_text()
            print(job, task.replace("NA", "N/A"), state, "JobArrayTaskLimit" if state == "PD" else "None")
    return 0


def main() -> int:
    name = Path(sys.argv[0]).name
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
        return 0
    if name == "sbatch":
        return sbatch()
    if name in ("squeue", "srun"):
        return squeue() if name == "squeue" else srun()
    (STATE / f"{sys.argv[1]}.cancel").touch()  # scancel
    return 0


if __name__ == "__main__":
    sys.exit(main())
