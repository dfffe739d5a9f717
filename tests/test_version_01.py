"""What version 0.1 trained, calibrated and packed (tests/fixtures/v0.1) loads and gives the answers it gave then."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import pam_espnet

FIXTURE = Path(__file__).parent / "fixtures/v0.1"
sys.path.insert(0, str(FIXTURE))

from cases import CASES, PROMPTS, TASKS, wave  # noqa: E402

ANSWERS = json.loads((FIXTURE / "answers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment in a recipe's folder, where nothing it writes matters."""
    return Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("recipe") / "pam1"))


def check(model: Any, case: str) -> None:
    found = model.answer([wave(i) for i in range(len(TASKS))], PROMPTS, TASKS)
    assert [one.texts for one in found] == [one["texts"] for one in ANSWERS[case]]
    for one, wanted in zip(found, ANSWERS[case], strict=True):
        assert one.scores == pytest.approx(wanted["scores"], abs=1e-4)
        assert one.depths == wanted["depths"]


@pytest.mark.parametrize("case", CASES)
def test_the_experiment_answers_as_it_did(case: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe)
    check(pam_espnet.load("exp/mine", options=CASES[case]), case)


@pytest.mark.parametrize("case", ["beam", "exit by gate"])
def test_the_archive_answers_as_it_did(case: str, recipe: Path, tmp_path: Path) -> None:
    shutil.copy(recipe / "exp/mine.zip", tmp_path)
    options = json.loads(json.dumps(CASES[case]).replace("exp/mine/", ""))
    check(pam_espnet.load(tmp_path / "mine.zip", models={"llm": recipe / "downloads/tiny-llm"}, options=options), case)
