#!/usr/bin/env python3
"""Make the two lock files of tools/ from requirements.in and requirements-extras.in (needs uv on PATH, or its path in
$UV). The second includes the first and has what the extras that set-up leaves out add to it.

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
# Made by `python tools/lock.py` from tools/{source} (uv pip compile); do not edit by hand.
# A line `# why:` is the reason for asking for the package at all and for its pin; `# via` names who needs it.
"""
PIN = re.compile(r"([A-Za-z0-9._-]+)==")


def canonical(name: str) -> str:
    """A package's name as indexes compare it: ``PyYAML`` -> ``pyyaml``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_reasons(text: str, path: str = "tools/requirements.in") -> dict[str, str]:
    """``name ... # reason`` lines of ``path`` -> {canonical name: reason}; every line must have one."""
    reasons = {}
    for number, line in enumerate(text.splitlines(), 1):
        requirement, _, reason = line.partition("#")
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name is None:
            continue
        if not reason.strip():
            raise SystemExit(f"{path}:{number}: {name[0]} has no reason\n  -> add `# why` to the line")
        reasons[canonical(name[0])] = reason.strip()
    return reasons


def add_reasons(lock: str, reasons: dict[str, str]) -> str:
    """Put ``# why: reason`` above the lines ``name==version`` of a compiled file."""
    lines: list[str] = []
    for line in lock.splitlines():
        pin = PIN.match(line)
        if pin is not None and canonical(pin[1]) in reasons:
            lines.append(f"# why: {reasons[canonical(pin[1])]}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def without(lock: str, other: str) -> str:
    """The packages of a compiled file that ``other`` lacks; those that both have must be the same versions."""
    pins = set(re.findall(r"^[A-Za-z0-9._-]+==[^ ]+", other, re.MULTILINE))
    blocks = re.split(r"^(?=[A-Za-z0-9._-]+==)", lock, flags=re.MULTILINE)
    kept = [block for block in blocks if block.split(" ")[0] not in pins]
    names = {pin.split("==")[0] for pin in pins}
    if changed := [block.split(" ")[0] for block in kept if block.split("==")[0] in names]:
        raise SystemExit(f"requirements.lock has other versions than {', '.join(changed)}\n  -> add --upgrade")
    return "".join(kept)


def compile_lock(uv: str, sources: list[str], target: Path, more: list[str]) -> str:
    """The lock file of ``sources``; keeps the versions of ``target`` where they still fit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / target.name
        if target.exists():
            lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
            # uv keeps the versions that it finds in its output file
            out.write_text("".join(line for line in lines if not line.startswith("-r ")), encoding="utf-8")
        command = [uv, "pip", "compile", *sources, "-o", str(out), "--quiet", "--no-header"]
        command += ["--universal", "--python-version", "3.12", "--generate-hashes", "--no-emit-index-url"]
        subprocess.run([*command, "--no-emit-find-links", *more], cwd=TOOLS, check=True)
        return out.read_text(encoding="utf-8")


def main() -> int:
    """Compile, annotate, replace the lock files."""
    parser = argparse.ArgumentParser(description="Make tools/requirements.lock and tools/requirements-extras.lock.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    args = parser.parse_args()
    uv = os.environ.get("UV") or shutil.which("uv") or str(TOOLS / ".uv/venv/bin/uv")
    more = ["--upgrade"] if args.upgrade else []
    first, second = TOOLS / "requirements.lock", TOOLS / "requirements-extras.lock"
    for target, included in ((first, None), (second, first)):
        source = target.with_suffix(".in").name
        reasons = read_reasons((TOOLS / source).read_text(encoding="utf-8"), f"tools/{source}")
        head = HEADER.format(source=source)
        if included is None:
            lock = compile_lock(uv, [source], target, more)
        else:
            head += f"-r {included.name}\n"
            constrained = [*more, "--constraints", included.name]
            lock = compile_lock(uv, [included.with_suffix(".in").name, source], target, constrained)
            lock = without(lock, included.read_text(encoding="utf-8"))
        target.write_text(head + add_reasons(lock, reasons), encoding="utf-8")
        print(f"{target}: {sum('==' in line for line in target.read_text(encoding='utf-8').splitlines())} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
