"""Parts that some metrics need and that are not installed with this package: where they lie, and which are there.

    <parts>/java/bin/java          a Java runtime; else that of $JAVA_HOME, else the one on PATH
    <parts>/meteor/                METEOR 1.5
    <parts>/spice/                 SPICE 1.0 with Stanford CoreNLP 3.6.0
    <parts>/fense/                 sentence encoder and error detector

``<parts>`` is $PAM_PARTS, else ``tools/parts`` of the repository; ``tools/installers/caption_metrics.py`` fills it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

INSTALLER = "tools/installers/caption_metrics.py"


class UnavailableError(Exception):
    """A metric cannot be computed here; the message says why and what to type. Scoring goes on without it."""


def parts_folder() -> Path:
    """Where the installers put things."""
    own = os.environ.get("PAM_PARTS")
    return Path(own) if own else Path(__file__).resolve().parents[2] / "tools" / "parts"


def find_part(part: str, *names: str) -> Path:
    """A part, or a file in it.

    Raises:
        UnavailableError: it is not there.
    """
    path = parts_folder().joinpath(part, *names)
    if not path.exists():
        raise UnavailableError(f"not installed; python {INSTALLER} {part}")
    return path


def find_java() -> str:
    """The Java runtime to use.

    Raises:
        UnavailableError: there is none.
    """
    candidates = [parts_folder() / "java" / "bin" / "java"]
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(Path(home) / "bin" / "java")
    for path in candidates:
        if os.access(path, os.X_OK):
            return str(path)
    if found := shutil.which("java"):
        return found
    raise UnavailableError(f"there is no Java runtime; python {INSTALLER} java")


def run_java(arguments: list[str], text: str, seconds: float, cwd: Path) -> str:
    """What a Java program prints when it reads ``text``.

    Raises:
        UnavailableError: it cannot be started, fails, or takes longer than ``seconds``.
    """
    java = find_java()
    try:
        done = subprocess.run(
            [java, *arguments], input=text, capture_output=True, text=True, encoding="utf-8", errors="replace",
            timeout=seconds, cwd=cwd, check=False,
        )  # fmt: skip
    except OSError as error:
        raise UnavailableError(f"{java} cannot be started ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"the Java program took longer than {seconds:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise UnavailableError(f"the Java program failed: {lines[0] if lines else f'status {done.returncode}'}")
    return done.stdout
