"""The package as a wheel, without the repository: it answers from an archive of version 0.1."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

FIXTURE = Path(__file__).parent / "fixtures/v0.1"
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def installed(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is in the wheel; built from a copy, because building writes into its source."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "setup.cfg", "LICENSE", "README.md"):
        shutil.copy(repo_root / name, source)
    shutil.copytree(repo_root / "pam_espnet", source / "pam_espnet", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", BUILD, str(wheels)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (wheel,) = wheels.glob("pam_espnet-*.whl")
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def run(installed: Path, folder: Path, *command: str) -> str:
    """Standard output of Python with the wheel first on its path, and the fixture's encoder type behind it."""
    path = f"{installed}{os.pathsep}{Path(__file__).parent}"
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_and_nothing_else(installed: Path, repo_root: Path, tmp_path: Path) -> None:
    ours = {path.relative_to(repo_root) for path in (repo_root / "pam_espnet").rglob("*") if path.is_file()}
    expected = {path for path in ours if "__pycache__" not in path.parts}
    packed = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path for path in packed if not path.parts[0].endswith(".dist-info")} == expected
    shown = run(installed, tmp_path, "-c", "import pam_espnet; print(pam_espnet.__file__)")
    assert Path(shown.strip()).is_relative_to(installed)


@pytest.mark.slow
def test_the_wheel_answers_from_an_archive(installed: Path, tmp_path: Path) -> None:
    shutil.copy(FIXTURE / "exp/mine.zip", tmp_path)
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", 0.1 * rng.standard_normal(16000), 16000)
    model = ("--model", "mine.zip", "--models", f"llm={FIXTURE / 'downloads/tiny-llm'}")
    output = run(installed, tmp_path, "-m", "pam_espnet.bin.pam_inference", *model, "a.wav", "--task", "asr", "--json")
    assert '"answer": ' in output and '"wav": "a.wav"' in output
