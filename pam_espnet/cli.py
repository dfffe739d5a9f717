"""What command lines share: user errors without a stack trace, Ctrl-C, the log format, what to note about a run."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pam_espnet.errors import PamError


def run_main(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)``; return the process's exit status.

    A ``PamError`` is printed as its message alone (status 1); Ctrl-C gives status 130; any other exception is a
    bug and keeps its stack trace.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    try:
        return main(argv) or 0
    except PamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def run_record(program: str) -> dict[str, Any]:
    """Command (its words) and commit, for result files. A recipe says what its user typed; alone, it is ``program``."""
    typed = os.environ.get("PAM_COMMAND") or shlex.join([program, *sys.argv[1:]])
    return {"command": shlex.split(typed), "commit": code_commit()}


def code_commit() -> str | None:
    """The commit of the code that runs, or None outside a git checkout."""
    folder = Path(__file__).resolve().parent
    if os.environ.get("PAM_COMMIT"):
        return os.environ["PAM_COMMIT"]
    found = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def chosen_device(name: str) -> str:
    """``--device``: a torch device by name; auto is a GPU where there is one."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
