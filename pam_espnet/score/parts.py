"""Parts of some metrics that are not installed with this package: Java programs and models.

    <parts>/java/bin/java          a Java runtime; else that of $JAVA_HOME, else the one on PATH
    <parts>/meteor/                METEOR 1.5
    <parts>/spice/                 SPICE 1.0 with Stanford CoreNLP 3.6.0
    <parts>/fense/                 sentence encoder and error detector

``<parts>`` is $PAM_PARTS, else ``tools/parts`` of the repository; ``tools/installers/caption_metrics.py`` fills it.
"""

import os
import shutil
import subprocess
from pathlib import Path

INSTALLER = "tools/installers/caption_metrics.py"


class UnavailableError(Exception):
    """A metric cannot be computed here; the message has the reason and what to type. Scoring continues without it."""


def parts_folder() -> Path:
    """Where the installers put things."""
    return Path(os.environ.get("PAM_PARTS") or Path(__file__).resolve().parents[2] / "tools" / "parts")


def find_part(part: str, *names: str) -> Path:
    """A part, or a file in it; an UnavailableError where it is not there."""
    path = parts_folder().joinpath(part, *names)
    if not path.exists():
        raise UnavailableError(f"not installed; python {INSTALLER} {part}")
    return path


def find_java() -> str:
    """The Java runtime to use; an UnavailableError where there is none."""
    folders = [str(Path(home) / "bin") for home in (parts_folder() / "java", os.environ.get("JAVA_HOME")) if home]
    if found := shutil.which("java", path=os.pathsep.join([*folders, os.environ.get("PATH", "")])):
        return found
    raise UnavailableError(f"there is no Java runtime; python {INSTALLER} java")


def run_java(arguments: list[str], text: str, seconds: float, cwd: Path) -> str:
    """The output of a Java program that reads ``text``.
    Raises UnavailableError: it cannot be started, fails, or takes longer than ``seconds``."""
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
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
        raise UnavailableError(f"the Java program failed: {reason}")
    return done.stdout
