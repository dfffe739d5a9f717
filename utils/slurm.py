#!/usr/bin/env python3
"""Run a command n times as Slurm jobs, each run with its log: utils/run.py's contract over sbatch.

    utils/slurm.py [options] [JOB=1:n] LOG command [argument ...]

    utils/slurm.py --gpu 2 exp/train.log python -m my.training --conf conf/train.yaml
    utils/slurm.py --num-nodes 2 --gpu 8 exp/train.log python -m my.training    # srun starts it once on each node
    utils/slurm.py --max-jobs-run 4 --time 2:00:00 JOB=1:8 logs/decode.JOB.log python decode.py --keys split8/JOB/text

JOB=1:n becomes one job array, --max-jobs-run its throttle. On the node each task is `utils/run.py LOG command`, so logs
look the same as local ones. What the options mean to sbatch is in a file of Kaldi's format (conf/slurm.conf):

    command sbatch --nodes=1 --ntasks=1       how jobs are submitted
    option gpu=0 --partition=cpu              flags for one value of an option
    option gpu=* --partition=gpu --gres=gpu:$0    flags for any other value, which $0 stands for
    option time=* --time=$0                   any name makes an option of slurm.py: here --time
    default time=48:00:00                     the value of an option that is not given

The program ends after the jobs. If a run fails, the others still end; then the failed logs' last lines go to stderr and
the exit status is 1. Ctrl-C, SIGTERM and SIGHUP cancel the jobs (SIGKILL cannot: `scancel` the job that was named when
it was submitted). The working directory and the logs must be on a file system that the nodes share.

Standard library only, any Python 3.8 or newer: it has to run where the environment is not yet active.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from job_contract import (
    TAIL_LINES,
    Work,
    count,
    exit_on_signals,
    hold_signals,
    ignore_signals,
    parse_gib,
    parse_work,
    positive,
    show_failures,
)

FIRST_POLL, LAST_POLL = 0.5, 10.0  # seconds between two looks at the queue: growing, to spare the controller
BUILT_IN = ("config", "gpu", "num_nodes", "mem", "num_threads", "max_jobs_run", "lag")
PATIENCE = 600.0  # seconds for which squeue may fail: controllers are restarted now and then
ENDED = re.compile(r"# Ended \((code (\d+)|killed with run\.py)\) at ")


def fail(message: str, advice: str = "") -> NoReturn:
    """End with what is wrong and what to do."""
    print(f"slurm.py: error: {message}" + (f"\n  -> {advice}" if advice else ""), file=sys.stderr)
    raise SystemExit(1)


@dataclass
class Flags:
    """A parsed configuration: how to submit, and what each option's values mean to sbatch."""

    path: Path
    command: list[str] = field(default_factory=lambda: ["sbatch"])
    options: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)

    def of(self, name: str, value: str) -> list[str]:
        """The sbatch flags of ``name=value``."""
        meanings = self.options[name]
        flags = meanings.get(value, meanings.get("*"))
        if flags is None:
            fail(f"{self.path}: no line about {name}={value}", f"add a line: option {name}=* FLAGS with $0")
        return [flag.replace("$0", value) for flag in flags]


def read_flags(path: Path) -> Flags:
    """Kaldi's queue configuration; a mistake in it is named with its line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(f"{path}: {error.strerror}", "--config names a file like egs/TEMPLATE/pam1/slurm.conf")
    flags = Flags(path)
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            fail(f"{path}:{number}: {error}")
        if not words:
            continue
        name, equals, value = words[1].partition("=") if len(words) > 1 else ("", "", "")
        name = name.replace("-", "_")
        if words[0] == "command" and len(words) > 1:
            flags.command = words[1:]
        elif words[0] == "option" and equals and re.fullmatch(r"[a-z]\w*", name):
            flags.options.setdefault(name, {})[value] = words[2:]
        elif words[0] == "default" and equals and len(words) == 2:
            flags.defaults[name] = value
        else:
            fail(f"{path}:{number}: cannot read '{line.strip()}'", "lines are: command, option name=value, default")
    for name in flags.defaults:
        if name not in flags.options:
            fail(f"{path}: default {name}=... without a line option {name}=...")
    return flags


def named_config(words: list[str]) -> Path:
    """The value of --config, looked for before the parser can be made, which the configuration adds options to."""
    path, index = "conf/slurm.conf", 0
    while index < len(words) and words[index].startswith("--"):  # the command after them may have a --config too
        name, equals, value = words[index].partition("=")
        if not equals:
            value = words[index + 1] if index + 1 < len(words) else ""
        if name == "--config":
            path = value
        index += 1 if equals else 2  # every option takes a value
    return Path(path)


def build_parser(options: list[str]) -> argparse.ArgumentParser:
    """The command line; ``options`` of the configuration join those of the contract."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [options] [JOB=1:n] LOG command [argument ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=Path("conf/slurm.conf"), help="(default: conf/slurm.conf)")
    parser.add_argument("--gpu", type=count, metavar="N", help="GPUs per run, on each of its nodes; 0 hides them all")
    parser.add_argument(
        "--num-nodes", "--num_nodes", type=positive, metavar="N", help="nodes per run; srun starts it on each (1)"
    )
    parser.add_argument("--mem", type=parse_gib, metavar="4G", help="memory per run; $0 is it in MiB, as in 4096M")
    parser.add_argument("--num-threads", "--num_threads", type=positive, metavar="N", help="OMP_NUM_THREADS of a run")
    parser.add_argument("--max-jobs-run", "--max_jobs_run", type=positive, metavar="N", help="runs at once")
    parser.add_argument(
        "--lag", type=count, default=30, metavar="S", help="seconds a shared disk may take to show a log's end (30)"
    )
    for name in options:
        if name not in BUILT_IN:
            parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest=name, help="as configured")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def sbatch_flags(args: argparse.Namespace, flags: Flags) -> list[str]:
    """What the given options and the defaults of the others mean to sbatch."""
    values = dict(flags.defaults)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "mem" in given:
        given["mem"] = f"{max(1, round(args.mem * 1024))}M"
    for name, free in (("gpu", 0), ("num_nodes", 1), ("mem", None), ("num_threads", 1)):
        # No GPU, one node and one thread need no flags; anything else must not be dropped silently.
        if name in given and name not in flags.options and given[name] != free:
            fail(f"{flags.path}: no line about {name}", f"add a line: option {name}=* FLAGS with $0")
    values.update({name: str(value) for name, value in given.items() if name in flags.options})
    return [flag for name in sorted(values) for flag in flags.of(name, values[name])]


def batch_script(work: Work, args: argparse.Namespace) -> str:
    """What a task does on its node: go to this directory and run the command through run.py, which writes the log."""
    command = [sys.executable or "python3", str(Path(__file__).resolve().parent / "run.py")]
    several = (args.num_nodes or 1) > 1
    if args.gpu is not None and not (several and args.gpu):  # every node has GPUs of its own, which Slurm names there
        command += ["--gpu", str(args.gpu)]
    if args.num_threads is not None:
        command += ["--num-threads", str(args.num_threads)]
    line = shlex.join(command)
    if work.name:
        # In double quotes for the shell of the node, which has the task's number.
        line += f' "{work.name}=${{SLURM_ARRAY_TASK_ID:-{work.numbers[0]}}}"'
    log, *words = work.words
    cores = ""
    if several:
        words = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *words]
        # srun no longer takes the job's cores for a step, unless it is told to.
        cores = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK}"\n'
    return f"#!/bin/sh\ncd {shlex.quote(os.getcwd())} || exit 1\n{cores}exec {line} {shlex.join([log, *words])}\n"


class Job:
    """A submitted job or job array: its state in the queue and in its logs."""

    def __init__(self, work: Work, args: argparse.Namespace, command: list[str]) -> None:
        """Submit. Old logs are emptied, or their ends would be taken for those of the new runs."""
        self.logs = {number: Path(work.filled(number)[0]) for number in work.numbers}
        for log in self.logs.values():
            log.parent.mkdir(parents=True, exist_ok=True)
            # Emptied, not removed: somebody may be following it.
            log.open("wb").close()
        pattern = work.words[0].replace("%", "%%")
        if work.name:
            pattern = pattern.replace(work.name, "%a" if len(work.numbers) > 1 else str(work.numbers[0]))
        self.pattern = pattern + ".slurm"
        # Its name may hold JOB in a folder's name too: sbatch fills %a in wherever it stands.
        name = Path(work.words[0]).name.replace(f".{work.name}." if work.name else "\0", ".")
        words = [*command, "--parsable", f"--job-name={Path(name).stem}", f"--output={self.pattern}"]
        if len(work.numbers) > 1:
            throttle = f"%{args.max_jobs_run}" if args.max_jobs_run else ""
            words.append(f"--array={work.numbers[0]}-{work.numbers[-1]}{throttle}")
        script = batch_script(work, args)
        # In a separate session: a Ctrl-C while it runs must not leave a job whose number is lost.
        done = subprocess.run(words, input=script, capture_output=True, text=True, check=False, start_new_session=True)
        numbers = re.findall(r"^(\d+)(?:;.*)?$", done.stdout, flags=re.MULTILINE)
        if done.returncode or not numbers:
            print((done.stderr or done.stdout).strip(), file=sys.stderr)
            fail(f"sbatch refused the job (status {done.returncode})", f"it was called as: {shlex.join(words)}")
        self.id = numbers[-1]

    def own_output(self, number: int) -> Path:
        """Where Slurm's own words about a task go."""
        return Path(self.pattern.replace("%%", "\0").replace("%a", str(number)).replace("\0", "%"))

    def queued(self) -> dict[int, str]:
        """The tasks that are pending or run, with the reason of the pending ones; OSError where squeue fails."""
        # By user, not by job: asking for a job that the controller has forgotten is an error.
        words = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F %K %t %r"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip() or f"squeue: status {done.returncode}")
        lines = [line.split(None, 3) for line in done.stdout.splitlines()]
        first = next(iter(self.logs))
        return {
            int(words[1]) if words[1].isdigit() else first: words[3] if words[2] == "PD" else ""
            for words in lines
            if len(words) == 4 and words[0] == self.id
        }

    def status(self, number: int) -> str | None:
        """How a run ended by its log: its exit status, "killed", or None where the log has no end."""
        try:
            with self.logs[number].open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 400))
                last = file.read().decode(errors="replace").rstrip("\n").rpartition("\n")[2]
        except OSError:
            return None
        match = ENDED.match(last)
        return (match[2] or "killed") if match else None

    def cancel(self) -> None:
        """Cancel what is left, and wait until it has left the queue."""
        print(f"slurm.py: cancelling job {self.id}", file=sys.stderr)
        done = subprocess.run(["scancel", self.id], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"slurm.py: {done.stderr.strip()}\n  -> scancel {self.id}", file=sys.stderr)
            return
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if not self.queued():
                    return
            except OSError as error:
                print(f"slurm.py: {error}", file=sys.stderr)
                return
            time.sleep(FIRST_POLL)
        print(f"slurm.py: job {self.id} is still in the queue\n  -> squeue --job {self.id}", file=sys.stderr)


def wait_for(job: Job, lag: float) -> dict[int, str]:
    """The status of every run, once none is in the queue.

    A run that is gone from the queue while its log has no end (looked for ``lag`` seconds long) is "lost": cancelled,
    out of memory, its node gone.
    """
    statuses: dict[int, str] = {}
    gone: dict[int, float] = {}  # since when a task is out of the queue
    pause, shown, failing = FIRST_POLL, "", 0.0
    while True:
        now = time.monotonic()
        try:
            queued = job.queued()
            failing = 0.0
        except OSError as error:
            failing = failing or now
            if now - failing > PATIENCE:
                fail(f"no answer from the queue for {PATIENCE:.0f} s: {error}", f"look after it: scancel {job.id}")
            time.sleep(pause)
            continue
        for number in job.logs:
            if number in queued:
                gone.pop(number, None)
            elif number not in statuses:
                gone.setdefault(number, now)
                status = job.status(number)
                if status is None and now - gone[number] > lag:
                    status = "lost"
                if status is not None:
                    statuses[number] = status
        if len(statuses) == len(job.logs):
            return statuses
        reasons = sorted({reason for reason in queued.values() if reason})
        # What is worth a line: that nothing runs yet, and why.
        pending = ", ".join(reasons) if queued and all(queued.values()) and reasons != ["None"] else ""
        if pending and pending != shown:
            print(f"slurm.py: job {job.id} is pending: {pending}", file=sys.stderr)
            shown = pending
        time.sleep(pause)
        pause = FIRST_POLL if gone.keys() - statuses.keys() else min(LAST_POLL, pause * 1.2)


def main(argv: list[str] | None = None) -> int:
    """Run all jobs; return 0 if every one succeeded, else 1 (128 + signal when ended by a signal)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        build_parser([]).parse_args(words)
    flags = read_flags(named_config(words))
    parser = build_parser(sorted(flags.options))
    args = parser.parse_args(words)
    work = parse_work(parser, args.rest)
    command = [*flags.command, *sbatch_flags(args, flags)]
    for program in (flags.command[0], "squeue", "scancel"):
        if shutil.which(program) is None:
            fail(f"{program}: not found on PATH", "log in to a node of the cluster; or run here: ./run.sh --cmd local")
    held = hold_signals()
    job = None
    try:
        job = Job(work, args, command)
        exit_on_signals()
        if held:
            raise SystemExit(128 + held[0])
        print(f"slurm.py: submitted job {job.id} ({len(job.logs)} runs): {work.words[0]}", file=sys.stderr)
        statuses = wait_for(job, args.lag)
    except BaseException:  # a signal or a bug: leave nothing behind
        ignore_signals()
        if job is not None:
            job.cancel()
        raise
    failed = []
    for number, status in statuses.items():
        own = job.own_output(number)
        if status.isdigit():
            own.unlink(missing_ok=True)  # run.py's words, which are in the log
        elif own.exists():
            print(f"----- {own}", file=sys.stderr)
            print("\n".join(own.read_text(errors="replace").splitlines()[-TAIL_LINES:]), file=sys.stderr)
        if status != "0":
            failed.append((job.logs[number], status))
    if failed:
        show_failures("slurm.py", failed, len(job.logs))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
