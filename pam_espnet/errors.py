"""The errors a user can cause and repair; everything else is a bug and keeps its stack trace.

A message states what is wrong, where (file, and line when there is one) and what to type or change next.
Command lines print them without a stack trace and exit with 1 (see ``pam_espnet.cli``).
"""

import os
from functools import partial
from pathlib import Path
from typing import Any


def printable(path: str | os.PathLike[str]) -> str:
    """A file's name as text that can be written anywhere: bytes that are not UTF-8 become ``\\xe9``."""
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class PamError(Exception):
    """Base of all errors whose message is meant for the user."""


class DataError(PamError):
    """Something in a data file is wrong.

    Args:
        path: the file (or directory) that is wrong.
        message: what is wrong, one sentence.
        line: line number in ``path``, counted from 1.
        hint: what to do next, one sentence or a command.
    """

    def __init__(self, path: str | Path, message: str, *, line: int | None = None, hint: str | None = None) -> None:
        self.path = Path(path)
        self.message = message
        self.line = line
        self.hint = hint
        where = printable(path) + (f":{line}" if line is not None else "")
        super().__init__(f"{where}: {message}" + (f"\n  -> {hint}" if hint else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it reaches the parent when it is raised in a worker process."""
        return partial(DataError, line=self.line, hint=self.hint), (self.path, self.message)


class ConfigError(PamError):
    """A configuration key has a value that cannot work; the message names the key."""


class CheckpointError(PamError):
    """A checkpoint is truncated or does not fit the model; the message lists the keys."""
