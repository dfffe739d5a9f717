"""An experiment packed and loaded: the same answers, what is in a package, what cannot be packed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import deeper_llm
from tiny_package import LICENCE, OPTIONS, answers, decoded, llm, unpack

import pam_espnet
from pam_espnet.bin import pam_decode, pam_pack
from pam_espnet.config import load_yaml, write_config
from pam_espnet.errors import CheckpointError, ConfigError, DataError
from pam_espnet.fileio import read_json, read_trained, save_trained, sha256_file, write_json
from pam_espnet.model import build_model
from pam_espnet.package import MANIFEST, save

# The same answers


def test_zip_folder_and_experiment_give_the_same_answers(recipe: Path, package: Path, data: Path) -> None:
    expected = decoded(recipe)
    assert len(expected) == 3
    found = answers(package, data, models=llm(recipe))
    assert {key: texts for key, (texts, _) in found.items()} == {key: texts for key, (texts, _) in expected.items()}
    assert all(found[key][1] == pytest.approx(expected[key][1], abs=1e-5) for key in expected)
    assert pam_pack.main(["--exp", str(recipe / "exp/mine"), "--out", "folder"]) == 0
    assert answers(Path("folder"), data, models=llm(recipe)) == found
    assert answers(recipe / "exp/mine", data) == found  # its relative paths start at the recipe, not here


def test_models_are_found_where_the_recipe_has_them(
    recipe: Path, package: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe)
    assert answers(package, data).keys() == decoded(recipe).keys()


def test_other_options_replace_the_packed_ones(recipe: Path, package: Path) -> None:
    write_config({"beam_size": 1, "max_new_tokens": 3}, "other.yaml")
    for options in ("other.yaml", {"beam_size": 1, "max_new_tokens": 3}):
        model = pam_espnet.load(package, models=llm(recipe), options=options)
        assert model.options.beam.max_new_tokens == 3 and not model.options.answer_sets
    model = pam_espnet.load(recipe / "exp/mine", options="other.yaml")
    assert model.options.beam.max_new_tokens == 3


def test_files_of_the_working_directory_are_not_taken_for_the_packages(recipe: Path, package: Path, data: Path) -> None:
    expected = answers(package, data, models=llm(recipe))
    Path("ctc_tokens.txt").write_text("no tokens\n")
    Path("config.yaml").write_text("llm: evil\n")
    assert answers(package, data, models=llm(recipe)) == expected


def test_importing_the_package_stays_light(repo_root: Path) -> None:
    code = "import sys, pam_espnet; print(callable(pam_espnet.load), 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


# What is in it


def test_contents(recipe: Path, package: Path) -> None:
    folder = unpack(package)
    manifest = read_json(folder / MANIFEST)
    expected = {"model.safetensors", "config.yaml", "decode.yaml", "ctc_tokens.txt", "RESULTS.md", "results.json"}
    licences = {"licences/README.md", "licences/llm/LICENSE"}
    assert set(manifest["members"]) == expected | licences | {"routing.png"}
    assert all(sha256_file(folder / name) == entry["sha256"] for name, entry in manifest["members"].items())
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert manifest["decoding"]["dtype"] == "float32" and load_yaml(folder / "decode.yaml") == OPTIONS
    assert (folder / "licences/llm/LICENSE").read_text() == LICENCE
    assert (folder / "licences/README.md").read_text() == (recipe / "README.md").read_text()
    (model,) = manifest["models"]
    assert model["source"] == "downloads/tiny-llm" and model["revision"] is None
    assert "in egs/tiny/pam1: ./run.sh --stage 1" in model["get"] and "LICENSE" not in model["files"]
    assert model["files"]["model.safetensors"] == sha256_file(recipe / "downloads/tiny-llm/model.safetensors")
    assert {"config.json", "tokenizer.json"} < set(model["files"])
    config = load_yaml(folder / "config.yaml")
    assert config["max_epoch"] == 3 and config["model_conf"]["ctc_tokens"] == "ctc_tokens.txt"
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".yaml", ".json"):
            text = path.read_text()
            assert str(recipe) not in text and "/home/me" not in text and "!!" not in text


def test_the_same_experiment_gives_the_same_bytes(package: Path, exp: Path) -> None:
    for path in exp.rglob("*"):  # in another folder, with other times
        path.touch()
    assert pam_pack.main(["--exp", str(exp), "--out", "again.zip"]) == 0
    assert Path("again.zip").read_bytes() == package.read_bytes()


def test_absolute_paths_and_the_calibration_are_made_relocatable(recipe: Path, exp: Path, data: Path) -> None:
    """With early exit: an LLM with enough blocks, its calibration, an absolute path."""
    from pam_espnet.engine.calibration import Calibration

    folder = deeper_llm(recipe / "downloads/tiny-llm", Path("deep").resolve(), 4)
    config = load_yaml(exp / "config.yaml") | {"llm": str(folder)}
    config["model_conf"]["ctc_tokens"] = str(exp / "ctc_tokens.txt")
    save_trained(build_model(config).state_dict(), exp / "model.safetensors")
    write_config(config, exp / "config.yaml")
    write_json(exp / "results.json", {})
    gates = Calibration((2,), None, torch.zeros(1, 33), 0.4)
    gates.save("gates.safetensors", {})
    write_config({"beam_size": 2, "exit": {"mode": "gate", "calibration": "gates.safetensors"}}, "gate.yaml")
    args = ["--exp", str(exp), "--data", str(data), "--config", "gate.yaml"]
    assert pam_decode.main([*args, "--out", str(exp / "decode_gate/test")]) == 0
    save(exp, "gate", "gate")
    assert load_yaml("gate/config.yaml")["llm"] == "deep"
    assert load_yaml("gate/decode.yaml")["exit"] == {"mode": "gate", "calibration": "exit.safetensors"}
    Path("gates.safetensors").rename("moved.safetensors")
    found = answers(Path("gate"), data)  # ./deep is seen from here
    lines = (exp / "decode_gate/test/text").read_text().splitlines()
    assert [texts[0] for texts, _ in found.values()] == [line.partition(" ")[2] for line in lines]
    with pytest.raises(DataError, match="not the calibration"):
        save(exp, "gate", "gate")
    assert Path("gate/exit.safetensors").is_file()  # the older package is kept


# What cannot be packed


def test_stages_that_were_not_run_are_named(exp: Path) -> None:
    with pytest.raises(DataError, match=r"there are: decode_beam\).*\n.*--stage 4"):
        save(exp, "a.zip", "other")
    (exp / "RESULTS.md").rename(exp / "R")
    with pytest.raises(DataError, match="--stage 5"):
        save(exp, "a.zip")
    assert not Path("a.zip").exists()


def test_a_folder_of_something_else_is_not_replaced(exp: Path) -> None:
    with pytest.raises(ConfigError, match="exists and is no package"):
        save(exp, exp)
    assert (exp / "config.yaml").is_file()


def test_weights_that_were_not_decoded_with_are_not_packed(exp: Path) -> None:
    state = read_trained(exp / "model.safetensors")
    save_trained({name: tensor + 1 for name, tensor in state.items()}, exp / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"results\.json was made with other weights"):
        save(exp, "a.zip")
    write_json(exp / "results.json", {})
    with pytest.raises(CheckpointError, match="decode_beam was made with other weights"):
        save(exp, "a.zip")
    content = (exp / "model.safetensors").read_bytes()
    (exp / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        save(exp, "a.zip")


def test_sets_decoded_differently_are_not_packed(exp: Path) -> None:
    shutil.copytree(exp / "decode_beam/test", exp / "decode_beam/test_more")
    key = read_json(exp / "decode_beam/test/key.json")
    key["search"]["beam_size"] = 7
    write_json(exp / "decode_beam/test_more/key.json", key)
    with pytest.raises(DataError, match="decoded with different search"):
        save(exp, "a.zip")
