"""A wheel of the package, without the checkout around it: it holds no recipes, and answers from an archive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = Path(__file__).parent / "fixtures/v0.1"
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
ANSWER = """
import importlib.metadata, json, pam_espnet
from cases import CASES, PROMPTS, TASKS, wave
model = pam_espnet.load("mine.zip", models={"llm": "tiny-llm"}, options=CASES["beam"])
found = model.answer([wave(i) for i in range(len(TASKS))], PROMPTS, TASKS)
version = importlib.metadata.version("pam-espnet")
print(json.dumps([pam_espnet.__file__, version, [[one.texts, one.scores] for one in found]]))
"""


def python(cwd: Path, *words: str, path: tuple[Path, ...] = ()) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_wheel_without_recipes_answers_from_an_archive(tmp_path: Path) -> None:
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    shutil.copytree(ROOT / "pam_espnet", source / "pam_espnet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python(source, "-c", BUILD, str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:  # a wheel of pure Python is installed by being unpacked
        archive.extractall(site)
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"pam_espnet"}
    modules = {path.relative_to(ROOT) for path in (ROOT / "pam_espnet").rglob("*.py")}
    assert modules == {path.relative_to(site) for path in site.rglob("*.py")}

    work.mkdir()
    shutil.copy(FIXTURE / "exp/mine.zip", work)
    shutil.copytree(FIXTURE / "downloads/tiny-llm", work / "tiny-llm")
    said = python(work, "-c", ANSWER, path=(site, FIXTURE, ROOT / "tests/kit"))
    where, version, found = json.loads(said.splitlines()[-1])
    assert Path(where).is_relative_to(site) and f"-{version}-" in wheel.name
    expected = json.loads((FIXTURE / "answers.json").read_text(encoding="utf-8"))["beam"]
    for (texts, scores), wanted in zip(found, expected, strict=True):
        assert texts == wanted["texts"] and scores == pytest.approx(wanted["scores"], abs=1e-4)
