"""The lock files, requirements.in, requirements-extras.in and setup.cfg agree."""

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


PAIRS = ("requirements", "requirements-extras")


def pins(repo_root: Path, name: str) -> dict[str, str]:
    text = (repo_root / f"tools/{name}.lock").read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def declared(repo_root: Path) -> list[Requirement]:
    """Every requirement of setup.cfg."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(repo_root / "setup.cfg")
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_every_declared_package_is_required_and_locked_within_its_bounds(repo_root: Path, tool: dict[str, Any]) -> None:
    reasons = [tool["read_reasons"]((repo_root / f"tools/{name}.in").read_text()) for name in PAIRS]
    locked = [pins(repo_root, name) for name in PAIRS]
    assert (
        not locked[0].keys() & locked[1].keys()
        and "-r requirements.lock\n" in (repo_root / "tools/requirements-extras.lock").read_text()
    ), "the second lock file includes the first"
    names = set()
    for requirement in declared(repo_root):
        name = canonicalize_name(requirement.name)
        names.add(name)
        which = [number for number, known in enumerate(reasons) if name in known]
        assert len(which) == 1, f"{name} is in setup.cfg and not in tools/requirements.in or requirements-extras.in"
        version = locked[which[0]][name]
        assert requirement.specifier.contains(version), f"{requirement}, but {version} is locked"
    assert set().union(*reasons) - names <= {"setuptools", "pillow"}, "in tools/requirements*.in and not in setup.cfg"


@pytest.mark.parametrize("name", PAIRS)
def test_pins_hashes_and_reasons_are_in_the_lock_file(repo_root: Path, tool: dict[str, Any], name: str) -> None:
    source, text = ((repo_root / f"tools/{name}{suffix}").read_text() for suffix in (".in", ".lock"))
    locked = pins(repo_root, name)
    for package, reason in tool["read_reasons"](source).items():
        assert f"# why: {reason}\n{package}==" in text.replace("PyYAML==", "pyyaml=="), f"run tools/lock.py: {package}"
    for package, version in re.findall(r"^([\w.-]+)==([\w.]+)", source, re.MULTILINE):
        assert locked[canonicalize_name(package)] == version, f"run tools/lock.py: {package}"
    blocks = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked) and all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text and "--index" not in text


def test_the_second_lock_file_has_only_what_the_first_lacks(tool: dict[str, Any]) -> None:
    first = "a==1 \\\n    --hash=x\nb==2 ; python_version < '3' \\\n    --hash=y\n"
    assert (
        tool["without"](first + "c==3 \\\n    --hash=z\n    # via a\n", first) == "c==3 \\\n    --hash=z\n    # via a\n"
    )
    with pytest.raises(SystemExit, match="other versions than a==2"):
        tool["without"]("a==2 \\\n    --hash=x\n", first)


def test_a_line_without_a_reason_is_refused(tool: dict[str, Any]) -> None:
    assert tool["read_reasons"]("# head\n\nPy_YAML>=6  # configs\n") == {"py-yaml": "configs"}
    with pytest.raises(SystemExit, match=r"requirements\.in:2: numpy has no reason"):
        tool["read_reasons"]("torch # why\nnumpy\n")
