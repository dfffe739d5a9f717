#!/usr/bin/env python3
"""The doctor: a check of this machine and environment, with what to type where something is wrong.

    python tools/check_install.py                        # versions, device, audio codecs, tools
    python tools/check_install.py --config conf/x.yaml   # also disk and memory, against the config's `resources`
    python tools/check_install.py --json                 # the same for programs

Exit status 1 if anything failed; a warning does not fail. Only the standard library is imported at the top, so that a
broken environment can be looked at, too.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``status`` is ok, warning or failed; ``hint`` is what to type."""

    part: str
    status: str
    message: str
    hint: str = ""


def reinstall_hint(extra: str = "") -> str:
    """What repairs a package: the set-up script, or pip where the user's own environment is active."""
    own = sys.prefix != sys.base_prefix and not list(Path(sys.prefix).glob(".pam-*"))
    if own:
        return f"{sys.executable} -m pip install -e '{ROOT}" + (f"[{extra}]'" if extra else "'")
    return f"tools/setup.sh --extras {extra}" if extra else "tools/setup.sh --force"


def check_python(spec: str, version: str | None = None) -> Finding:
    """Compare this interpreter (or ``version``) with ``python_requires``, for example ``>=3.12,<3.14``."""
    version = version or platform.python_version()
    numbers = tuple(int(n) for n in version.split(".")[:2])
    low, high = (tuple(int(n) for n in bound) for bound in re.findall(r"(\d+)\.(\d+)", spec))
    if low <= numbers < high:
        return Finding("python", "ok", f"{version} ({sys.executable})")
    return Finding("python", "failed", f"{version}, but {spec} is needed", "tools/setup.sh, then . .venv/bin/activate")


def check_packages(declared: dict[str, list[str]]) -> list[Finding]:
    """Compare installed versions with setup.cfg.

    Args:
        declared: extra -> requirement lines; the key "" holds what is always needed. A missing one of "" and a wrong
            version anywhere is a failure. An extra that is there in part is a warning, and so is one that recipes
            need (train, score); others may be absent.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Finding("packages", "failed", "the environment is empty (no package 'packaging')", reinstall_hint())]
    findings, good = [], []
    for extra, lines in declared.items():
        missing = []
        for line in lines:
            requirement = Requirement(line)
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(requirement.name)
                continue
            if requirement.specifier.contains(version, prereleases=True):
                good.append(f"{requirement.name} {version}")
            else:
                message = f"{requirement.name} is {version}, but setup.cfg asks for {requirement.specifier}"
                findings.append(Finding("packages", "failed", message, reinstall_hint()))
        if missing and not extra:
            findings.append(Finding("packages", "failed", f"not installed: {', '.join(missing)}", reinstall_hint()))
        elif missing and (extra in ("train", "score") or len(missing) < len(lines)):
            message = f"extra '{extra}' is not complete: {', '.join(missing)}"
            findings.append(Finding("packages", "warning", message, reinstall_hint(extra)))
    summary = ", ".join(dict.fromkeys(good))
    return [Finding("packages", "ok", summary), *findings] if good else findings


def read_declared(setup_cfg: Path) -> tuple[str, dict[str, list[str]]]:
    """Read ``python_requires`` and the requirement lines per extra ("" = always) from setup.cfg."""
    parser = configparser.ConfigParser(interpolation=None)
    with setup_cfg.open(encoding="utf-8") as file:
        parser.read_file(file)

    def lines(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]

    declared = {"": lines(parser["options"]["install_requires"])}
    declared |= {extra: lines(text) for extra, text in parser["options.extras_require"].items()}
    return parser["options"]["python_requires"], declared


def check_torch() -> list[Finding]:
    """Name the device that a recipe would use, and whether it computes in bfloat16 natively."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that cannot be loaded
        return [Finding("torch", "failed", f"import torch: {error}", reinstall_hint())]
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        major, minor = device.major, device.minor
        bf16 = "bfloat16" if major >= 8 else "no bfloat16 (float32 is used)"
        text = f"GPU {index}: {device.name}, {device.total_memory / GIB:.0f} GiB, capability {major}.{minor}, {bf16}"
        findings.append(Finding("torch", "ok", text))
    if not findings:
        bf16 = "native bfloat16 (used where it is faster)" if cpu_has_bf16() else "no native bfloat16 (float32 is used)"
        text = f"no GPU; CPU with {os.cpu_count()} cores, {torch.get_num_threads()} threads, {bf16}"
        findings.append(Finding("torch", "ok", text))
        driver = Path("/proc/driver/nvidia/version")
        if driver.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
            message = f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU"
            hint = "nvidia-smi  (torch needs a driver at least as new as its CUDA: " + str(torch.version.cuda) + ")"
            findings.append(Finding("torch", "warning", message, hint))
    return findings


def cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions (without them bfloat16 is slower than float32)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text) is not None


def check_audio() -> list[Finding]:
    """Write and read a tone through soundfile (FLAC exactly, OGG closely); look for FFmpeg's decoders in PyAV."""
    findings = []
    try:
        import numpy as np
        import soundfile

        wave = (0.5 * np.sin(2 * np.pi * 440 / 16000 * np.arange(8000))).astype(np.float32)
        for name, subtype, tolerance in (("FLAC", "PCM_16", 1e-4), ("OGG", "VORBIS", 0.1)):
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, 16000, format=name, subtype=subtype)
            buffer.seek(0)
            back, rate = soundfile.read(buffer, dtype="float32")
            if rate != 16000 or back.shape != wave.shape or np.abs(back - wave).max() > tolerance:
                raise RuntimeError(f"{name} does not give back what was written")
        findings.append(Finding("audio", "ok", f"soundfile: FLAC, OGG ({soundfile.__libsndfile_version__})"))
    except (ImportError, OSError, RuntimeError) as error:
        findings.append(Finding("audio", "failed", f"soundfile: {error}", reinstall_hint()))
    try:
        import av.codec

        missing = [name for name in ("g722", "mp3", "opus", "aac") if name not in av.codec.codecs_available]
        if missing:
            raise ImportError(f"no decoder for {', '.join(missing)}")
        findings.append(Finding("audio", "ok", "PyAV: G.722, MP3, Opus, AAC"))
    except (ImportError, OSError) as error:
        findings.append(Finding("audio", "failed", f"PyAV: {error}", reinstall_hint()))
    return findings


def memory_gb() -> float | None:
    """Memory that this process may use, in GiB: the machine's, or a container's limit if that is smaller."""
    limits = []
    with contextlib.suppress(ValueError, OSError):  # not every system knows these names
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue  # not in such a container
        if text.isdigit():
            limits.append(int(text))
    return min(limits) / GIB if limits else None


def check_room(folder: Path, need_disk_gb: float | None, need_memory_gb: float | None) -> list[Finding]:
    """Compare free disk space at ``folder`` and memory, in GiB, with what is needed (None: only report)."""
    while not folder.exists():
        folder = folder.parent
    ask = "; what is asked for is `resources` in the size's configuration"
    free = shutil.disk_usage(folder).free / GIB
    parts = [("disk", free, need_disk_gb, f"free at {folder.resolve()}", f"--dir with more space, or free some{ask}")]
    memory = memory_gb()
    if memory is not None:
        hint = f"a smaller batch_size or model in the config, or a larger machine{ask}"
        parts.append(("memory", memory, need_memory_gb, "in all", hint))
    elif need_memory_gb is not None:
        return [Finding("memory", "warning", f"unknown here; {need_memory_gb:g} GiB are needed")]
    findings = []
    for part, has, need, where, hint in parts:
        message = f"{has:.1f} GiB {where}" + (f", {need:g} GiB needed" if need is not None else "")
        good = need is None or has >= need
        findings.append(Finding(part, "ok" if good else "failed", message, "" if good else hint))
    return findings


def read_needs(config: Path) -> tuple[float | None, float | None]:
    """Read ``resources: {disk_gb:, memory_gb:}`` of a YAML config; None for what it does not have.

    Raises:
        SystemExit: the file is not there, is not YAML, or ``resources`` is not such a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {config}: {error}") from error
    needs = content.get("resources", {}) if isinstance(content, dict) else None
    if not isinstance(needs, dict) or not all(isinstance(value, int | float) for value in needs.values()):
        raise SystemExit(f"error: {config}: resources must look like {{disk_gb: 3, memory_gb: 8}}")
    if unknown := set(needs) - {"disk_gb", "memory_gb"}:
        raise SystemExit(f"error: {config}: resources has unknown keys {sorted(unknown)}; known: disk_gb, memory_gb")
    return needs.get("disk_gb"), needs.get("memory_gb")


def check_tools() -> list[Finding]:
    """Look for the programs that recipes call beside Python."""
    findings = []
    reasons = {"bash": "runs the recipes", "git": "writes the commit beside results"}
    for name, reason in reasons.items():
        path = shutil.which(name)
        if path:
            findings.append(Finding("tools", "ok", f"{name}: {path}"))
        else:
            findings.append(Finding("tools", "warning", f"no {name} ({reason})", f"apt install {name}"))
    return findings


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check this machine; print what to type where it is wrong.")
    parser.add_argument("--config", type=Path, help="YAML whose `resources: {disk_gb:, memory_gb:}` has to be met")
    parser.add_argument("--need-disk-gb", type=float, help="free disk space needed, GiB (instead of the config's)")
    parser.add_argument("--need-memory-gb", type=float, help="memory needed, GiB (instead of the config's)")
    parser.add_argument("--dir", type=Path, default=Path("."), help="where the experiments go (default: here)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of findings")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run all checks; return the exit status."""
    args = build_parser().parse_args(argv)
    python_requires, declared = read_declared(ROOT / "setup.cfg")
    findings = [check_python(python_requires), *check_packages(declared)]
    disk, memory = read_needs(args.config) if args.config else (None, None)
    disk = args.need_disk_gb if args.need_disk_gb is not None else disk
    memory = args.need_memory_gb if args.need_memory_gb is not None else memory
    findings += [*check_torch(), *check_audio(), *check_room(args.dir, disk, memory), *check_tools()]
    failed = any(finding.status == "failed" for finding in findings)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return int(failed)
    for finding in findings:
        print(f"{finding.status:8s}{finding.part:9s} {finding.message}")
        if finding.hint:
            print(f"{'':17s} -> {finding.hint}")
    print("the installation is not usable as it is: see 'failed' above" if failed else "the installation is fine")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
