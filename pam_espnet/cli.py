"""Parts that all command lines share: user errors without a stack trace, Ctrl-C, the log format, the options --device,
--dtype and --threads, and the record of a run."""

import argparse
import errno
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError, PamError, printable
from pam_espnet.fileio import DISK_ERRORS

CODE = ("*.py", "*.sh", "*.yaml", "*.cfg", "*.toml", "*.lock")  # files that a result may depend on
MISSING_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # no such file, or a folder in its place, or the reverse
DTYPES = ("float32", "bfloat16", "int8")  # precisions of the LLM in decoding


def run_main(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)``; return the process's exit status.

    A ``PamError``, a file that a full disk, a read-only disk, permissions or its long name refuse, and one that the
    command line names, or whose folder it names, and that is not there, are printed as a message alone (status 1);
    Ctrl-C gives status 130; any other exception is a bug and keeps its stack trace.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    for client in ("httpx", "httpx2"):  # huggingface_hub's, by its version: a line for each request
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        return main(argv) or 0
    except PamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = "free disk space, or choose a folder that can be written; then run it again"
        if error.errno == errno.ENAMETOOLONG:
            hint = "give a shorter name"
        elif error.errno in MISSING_ERRORS and _named_in(sys.argv[1:] if argv is None else argv, error.filename):
            hint = "correct the path, or make the file first"
        elif error.errno not in DISK_ERRORS:
            raise
        print(f"error: {printable(error.filename or 'a file')}: {error.strerror}\n  -> {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _named_in(argv: Sequence[str], filename: object) -> bool:
    """Whether arguments (of NAME=PATH the second part too) name a file or a folder that it is in."""
    if not isinstance(filename, str | bytes) or not filename:
        return False
    path = Path(os.fsdecode(filename))
    named = {Path(part) for argument in argv for part in (argument, argument.partition("=")[2]) if part}
    return any(one in named for one in (path, *path.parents) if one != Path())


def espnet_options(description: str | None, argv: Sequence[str] | None = None) -> list[str]:
    """The options of a program that hands all of them to one of ESPnet's, but answers ``--help`` without loading it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--help_all", action="store_true", help="ESPnet's options (slow: it loads ESPnet)")
    args, options = parser.parse_known_args(argv)
    return ["--help"] if args.help_all else options


def run_record(program: str) -> dict[str, Any]:
    """Command (its words) and commit, for result files; the command is the recipe's where a recipe started this."""
    typed = os.environ.get("PAM_COMMAND") or shlex.join([program, *sys.argv[1:]])
    try:
        words = shlex.split(typed)
    except ValueError:  # an apostrophe that was not quoted
        words = typed.split()
    return {"command": words, "commit": code_commit()}


def code_commit() -> str | None:
    """The commit of the code that runs, or None outside a git checkout of it; "-dirty" where code or configuration,
    not the tables that commands write, has changed since."""
    if os.environ.get("PAM_COMMIT"):
        return os.environ["PAM_COMMIT"]
    commit = _git("describe", "--always", "--abbrev=12")
    changed = commit and _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return f"{commit}-dirty" if changed else commit


def commit_date(commit: str) -> str | None:
    """When a commit as ``code_commit`` names it was made, or None where that is not known here."""
    return _git("show", "--no-patch", "--format=%cd", "--end-of-options", commit.removesuffix("-dirty"))


def _git(*words: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed; a checkout around it is another project's
        return None
    found = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def add_compute_options(
    parser: argparse.ArgumentParser, default_dtype: str = "as trained", dtypes: Sequence[str] = DTYPES
) -> None:
    """``--device``, ``--threads`` and, unless ``dtypes`` is empty, ``--dtype``, for ``compute_device``;
    ``default_dtype``: words for the help, the precision where --dtype is not given."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU if there is one (auto)")
    if dtypes:
        note = "; int8: its weights in the search, on x86 CPUs" if "int8" in dtypes else ""
        parser.add_argument("--dtype", choices=dtypes, help=f"precision of the LLM{note} (default: {default_dtype})")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 0 = torch's choice)")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """``--batch_size``, a number or "auto"."""

    def batch_size(text: str) -> int | str:
        return text if text == "auto" else int(text)

    help_text = "utterances decoded together; auto: on a GPU as many as its memory holds, on a CPU 8 (auto)"
    parser.add_argument("--batch_size", type=batch_size, default="auto", metavar="N", help=help_text)


def compute_device(args: argparse.Namespace) -> str:
    """The torch device of ``--device``, checked; sets the number of CPU threads.
    Raises ConfigError: see ``chosen_device``; a negative number of threads."""
    import torch

    check_number(args.threads, "--threads", at_least=0, whole=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    return chosen_device(args.device)


def chosen_device(name: str) -> str:
    """A torch device by name; auto is a GPU where there is one.

    Raises ConfigError: a name that is no device, or a GPU that is not there; no model needs to be loaded to learn it.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not index.isdecimal()):
        raise ConfigError(f"--device {name}: no such device; cpu, cuda, cuda:N or auto")
    gpus = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= gpus:
        last = f"the last GPU here is cuda:{gpus - 1}" if gpus else "there is no GPU here"
        raise ConfigError(f"--device {name}: {last}; cpu, cuda, cuda:N or auto")
    return name
