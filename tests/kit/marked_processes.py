"""All processes that one command has started, in any group or session: they carry its mark in their environment."""

import os
import signal
from contextlib import suppress
from pathlib import Path

MARK = "PAM_TEST_MARK"  # set it to a string that no other command has


def running(mark: str) -> list[int]:
    """Ids of the processes with this mark; a zombie has no environment, and is not among them."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or belongs to somebody else
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return sorted(found)


def kill_all(mark: str) -> None:
    """SIGKILL to every process with this mark, until there is none."""
    while pids := running(mark):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
