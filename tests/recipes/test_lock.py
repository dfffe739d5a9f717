"""The lock file, requirements.in and setup.cfg agree."""

import configparser
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def tool(repo_root: Path) -> dict[str, Any]:
    return runpy.run_path(str(repo_root / "tools/lock.py"), run_name="lock")


@pytest.fixture(scope="module")
def locked(repo_root: Path) -> dict[str, str]:
    text = (repo_root / "tools/requirements.lock").read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def declared(repo_root: Path) -> list[Requirement]:
    """Every requirement of setup.cfg, but those of the extras that set-up omits."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(repo_root / "setup.cfg")
    texts = [parser["options"]["install_requires"]]
    texts += [text for extra, text in parser["options.extras_require"].items() if extra not in ("demo", "quantize")]
    lines = [line for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_every_declared_package_is_required_and_locked_within_its_bounds(
    repo_root: Path, tool: dict[str, Any], locked: dict[str, str]
) -> None:
    reasons = tool["read_reasons"]((repo_root / "tools/requirements.in").read_text())
    for requirement in declared(repo_root):
        name = canonicalize_name(requirement.name)
        assert name in reasons, f"{name} is in setup.cfg and not in tools/requirements.in"
        assert requirement.specifier.contains(locked[name]), f"{requirement}, but {locked[name]} is locked"
    names = {canonicalize_name(requirement.name) for requirement in declared(repo_root)}
    assert set(reasons) - names <= {"setuptools", "pillow"}, "in tools/requirements.in and not in setup.cfg"


def test_pins_hashes_and_reasons_are_in_the_lock_file(
    repo_root: Path, tool: dict[str, Any], locked: dict[str, str]
) -> None:
    source = (repo_root / "tools/requirements.in").read_text()
    text = (repo_root / "tools/requirements.lock").read_text()
    for name, reason in tool["read_reasons"](source).items():
        assert f"# why: {reason}\n{name}==" in text.replace("PyYAML==", "pyyaml=="), f"run tools/lock.py: {name}"
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", source, re.MULTILINE):
        assert locked[canonicalize_name(name)] == version, f"run tools/lock.py: {name}"
    blocks = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked) and all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text and "--index" not in text


def test_a_line_without_a_reason_is_refused(tool: dict[str, Any]) -> None:
    assert tool["read_reasons"]("# head\n\nPy_YAML>=6  # configs\n") == {"py-yaml": "configs"}
    with pytest.raises(SystemExit, match=r"requirements\.in:2: numpy has no reason"):
        tool["read_reasons"]("torch # why\nnumpy\n")
