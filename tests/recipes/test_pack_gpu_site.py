"""Packages for a GPU machine: what is in the archive, what is not, what is said where something is missing."""

import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/pack_gpu_site.py"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment with a package of every name, and one that nobody asked for."""
    site = tmp_path / "venv/lib/python3.12/site-packages"
    for name in (*runpy.run_path(str(TOOL))["NAMES"], "other"):
        module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-1.2.dist-info"
        files = [f"{module}/__init__.py", f"{module}/tests/test_it.py", f"{module}/fast.c", f"{info}/METADATA"]
        for file in files:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_text(f"Name: {name}\nVersion: 1.2\n" if file.endswith("METADATA") else "")
        (site / info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, "../../../bin/it", "gone.py"]))
    return tmp_path / "venv"


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *args], capture_output=True, text=True, check=False)


def test_code_is_packed_and_tests_are_not(venv: Path, tmp_path: Path) -> None:
    done = run("--venv", venv, "--output", tmp_path / "out/site.tar.gz")
    assert done.returncode == 0 and "python3.12" in done.stdout, done.stderr
    with tarfile.open(tmp_path / "out/site.tar.gz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "there", filter="data")
    (tmp_path / "alone").mkdir()
    assert {"site/torch_complex/__init__.py", "site/torch_complex-1.2.dist-info/METADATA"} <= set(names)
    assert not [name for name in names if "tests" in name or name.endswith(".c") or "other" in name or ".." in name]
    about = json.loads((tmp_path / "there/site/packed.json").read_text())
    assert about["python"] == "3.12" and about["packages"]["torch-complex"] == "1.2"
    code = "import distutils, distutils.version, setuptools; print(distutils.version.LooseVersion('1.2') < '1.10')"
    (tmp_path / "there/site/distutils").rename(tmp_path / "alone/distutils")
    environment = {"PYTHONPATH": str(tmp_path / "alone")}
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert there.stdout == "True\n", there.stderr


def test_what_is_missing_is_named(venv: Path, tmp_path: Path) -> None:
    (venv / "lib/python3.12/site-packages/peft-1.2.dist-info/METADATA").write_text("Name: another\n")
    done = run("--venv", venv, "--output", tmp_path / "site.tar.gz")
    assert done.returncode == 1 and "lacks peft" in done.stderr and "tools/setup.sh" in done.stderr
    assert not (tmp_path / "site.tar.gz").exists()
    done = run("--venv", tmp_path / "nothing", "--output", tmp_path / "site.tar.gz")
    assert done.returncode == 1 and "no environment" in done.stderr
