"""An experiment of version 0.1, calibrated and packed (tests/fixtures/v0.1): it loads and gives the same answers."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pam_espnet
from pam_espnet.config import load_yaml
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.engine.calibration import Calibration
from pam_espnet.errors import ConfigError
from pam_espnet.model import build_model

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


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"compile": True}, "compile"),
        ({"exit": {"mode": "fixed", "layers": [2], "fill": "map"}}, r"exit\.fill"),
        ({"exit": {"mode": "fixed", "layers": [2], "fill": "deferred"}}, r"exit\.fill"),
        ({"beam_size": 1, "draft": {"kind": "ngram"}}, r"draft\.kind"),
    ],
)
def test_removed_decoding_options_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*no longer supported.* 6d6c31d"):
        AnswerOptions.from_dict(options)


def test_removed_model_options_are_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe)
    config = load_yaml("exp/mine/config.yaml")
    config["model_conf"]["exit_layer_dropout"] = 0.2
    with pytest.raises(ConfigError, match=r"model_conf\.exit_layer_dropout.*no longer supported.* 6d6c31d"):
        build_model(config)


def test_calibrations_with_maps_of_keys_and_values_load(recipe: Path, tmp_path: Path) -> None:
    """pam_calibrate_exit --fill_maps also wrote fill_<block>."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = recipe / "exp/mine/exit.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    more = {f"fill_{layer}": torch.zeros(33, 2, 32) for layer in (2, 3)}
    save_file({**tensors, **more}, tmp_path / "exit.safetensors", metadata)
    found = Calibration.load(tmp_path / "exit.safetensors", 32)
    assert found.layers == (2, 3) and torch.equal(found.gates, tensors["gates"])


@pytest.mark.parametrize("case", ["beam", "exit by gate"])
def test_the_archive_answers_as_it_did(case: str, recipe: Path, tmp_path: Path) -> None:
    shutil.copy(recipe / "exp/mine.zip", tmp_path)
    options = json.loads(json.dumps(CASES[case]).replace("exp/mine/", ""))
    check(pam_espnet.load(tmp_path / "mine.zip", models={"llm": recipe / "downloads/tiny-llm"}, options=options), case)
