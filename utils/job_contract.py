"""Kaldi's job-runner contract, shared by run.py and slurm.py: its command line, and how a log ends.

    CMD [options] [JOB=1:n] LOG command [argument ...]

Independent of how a command is started. Standard library only, any Python 3.8 or newer.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

TAIL_LINES = 20
SHOWN_LOGS = 5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse_gib(text: str) -> float:
    """Kaldi's memory sizes: ``4G``, ``500M``, ``1.5T``, or a plain number of GiB -> GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size like 4G or 500M")
    return float(match[1]) * {"M": 1 / 1024, "": 1.0, "G": 1.0, "T": 1024.0}[match[2]]


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def count(text: str) -> int:
    """An integer of at least 0."""
    return 0 if text == "0" else positive(text)


@dataclass
class Work:
    """What is to be run: ``words`` is the log and the command; ``name`` in them stands for each of ``numbers``."""

    name: str  # "" if the command is to run once
    numbers: list[int]
    words: list[str]

    def filled(self, number: int) -> list[str]:
        """The log and the command of one run."""
        return [part.replace(self.name, str(number)) if self.name else part for part in self.words]


def parse_work(parser: argparse.ArgumentParser, rest: list[str]) -> Work:
    """``[JOB=1:n] LOG command ...``; what is wrong with it ends the program through ``parser``."""
    name, numbers = "", [1]
    job = re.fullmatch(r"([A-Za-z_]\w*)=(\d+)(?::(\d+))?", rest[0]) if rest else None
    if job is not None:
        rest = rest[1:]
        name, first, last = job[1], int(job[2]), int(job[3] or job[2])
        if first > last:
            parser.error(f"{job[0]}: the range is empty")
        numbers = list(range(first, last + 1))
    if len(rest) < 2:
        parser.error("give a log file and a command")
    if rest[0].startswith("-"):
        parser.error(f"unknown option {rest[0]}")
    if len(numbers) > 1 and name not in rest[0]:
        parser.error(f"the log's name must contain {name}, or {len(numbers)} runs would write to {rest[0]}")
    return Work(name, numbers, rest)


def exit_on_signals() -> None:
    """Ctrl-C, SIGTERM and SIGHUP raise SystemExit(128 + signal), so that ``finally`` blocks can clean up."""

    def on_signal(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    for wanted in SIGNALS:
        signal.signal(wanted, on_signal)


def hold_signals() -> list[int]:
    """Until the next of these functions is called, such signals only join the list that is returned."""
    held: list[int] = []
    for wanted in SIGNALS:
        signal.signal(wanted, lambda number, frame: held.append(number))
    return held


def ignore_signals() -> None:
    """From now on nothing interrupts the cleaning up."""
    for wanted in SIGNALS:
        signal.signal(wanted, signal.SIG_IGN)


def show_failures(program: str, failed: list[tuple[Path, str]], total: int) -> None:
    """Print the last lines of failed logs to stderr, each with its status."""
    for log, status in failed[:SHOWN_LOGS]:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else "(there is no log)"
        print(f"----- last lines of {log} (status {status})", file=sys.stderr)
        print("\n".join(text.splitlines()[-TAIL_LINES:]), file=sys.stderr)
    if len(failed) > SHOWN_LOGS:
        print("also failed: " + " ".join(str(log) for log, _ in failed[SHOWN_LOGS:]), file=sys.stderr)
    print(f"{program}: {len(failed)} of {total} runs failed; log: {failed[0][0]}", file=sys.stderr)
