#!/usr/bin/env python3
"""Make tools/requirements.lock from tools/requirements.in (needs uv on PATH, or its path in $UV).

    python tools/lock.py              # keeps the versions already locked where they still fit
    python tools/lock.py --upgrade    # newest versions that fit

Every package is pinned with the hashes of its files, for Python 3.12 and 3.13; where it came from is left to the
index configured on the machine. uv drops comments, so the reason beside each line of requirements.in is written
above that package here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
HEADER = """\
# Made by `python tools/lock.py` from tools/requirements.in (uv pip compile); do not edit by hand.
# A line `# why:` is the reason for asking for the package at all and for its pin; `# via` names who needs it.
"""


def canonical(name: str) -> str:
    """A package's name as indexes compare it: ``PyYAML`` -> ``pyyaml``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_reasons(text: str) -> dict[str, str]:
    """``name ... # reason`` lines of requirements.in -> {canonical name: reason}; every line must have one."""
    reasons = {}
    for number, line in enumerate(text.splitlines(), 1):
        requirement, _, reason = line.partition("#")
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name is None:
            continue
        if not reason.strip():
            raise SystemExit(f"tools/requirements.in:{number}: {name[0]} has no reason\n  -> add `# why` to the line")
        reasons[canonical(name[0])] = reason.strip()
    return reasons


def add_reasons(lock: str, reasons: dict[str, str]) -> str:
    """Put ``# why: reason`` above the lines ``name==version`` of a compiled file."""
    lines: list[str] = []
    for line in lock.splitlines():
        pin = re.match(r"([A-Za-z0-9._-]+)==", line)
        if pin is not None and canonical(pin[1]) in reasons:
            lines.append(f"# why: {reasons[canonical(pin[1])]}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compile, annotate, replace the lock file."""
    parser = argparse.ArgumentParser(description="Make tools/requirements.lock from tools/requirements.in.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    args = parser.parse_args()
    uv = os.environ.get("UV") or shutil.which("uv") or str(TOOLS / ".uv/venv/bin/uv")
    reasons = read_reasons((TOOLS / "requirements.in").read_text(encoding="utf-8"))
    target = TOOLS / "requirements.lock"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "requirements.lock"
        if target.exists():
            shutil.copy(target, out)  # uv keeps the versions that it finds in its output file
        command = [uv, "pip", "compile", "requirements.in", "-o", str(out), "--quiet", "--no-header"]
        command += ["--universal", "--python-version", "3.12", "--generate-hashes", "--no-emit-index-url"]
        command += ["--no-emit-find-links"] + (["--upgrade"] if args.upgrade else [])
        subprocess.run(command, cwd=TOOLS, check=True)
        target.write_text(HEADER + add_reasons(out.read_text(encoding="utf-8"), reasons), encoding="utf-8")
    print(f"{target}: {sum('==' in line for line in target.read_text(encoding='utf-8').splitlines())} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
