"""An experiment packed, carried away and loaded: the same answers, and what is wrong is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import deeper_llm, tiny_config, write_data

import pam_espnet
from pam_espnet.bin import pam_decode, pam_pack
from pam_espnet.config import load_yaml, write_config
from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.shards import read_wave
from pam_espnet.errors import CheckpointError, ConfigError, DataError
from pam_espnet.fileio import read_json, read_trained, save_trained, sha256_file, write_json
from pam_espnet.model import build_model
from pam_espnet.package import MANIFEST, save

OPTIONS = {"beam_size": 2, "max_new_tokens": 6, "answer_sets": {"count": ["0", "1", "2"]}, "task_vocabulary": False}
LICENCE = "Tiny LLM, no licence in particular."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "test", size=1)


@pytest.fixture(scope="module")
def recipe(tiny_llm_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's folder with a trained, decoded and scored experiment; its paths start there, as in real ones."""
    root = tmp_path_factory.mktemp("tree") / "egs" / "tiny" / "pam1"
    exp = root / "exp" / "mine"
    shutil.copytree(tiny_llm_dir, root / "downloads" / "tiny-llm")
    (root / "downloads/tiny-llm/LICENSE").write_text(LICENCE)
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "README.md").write_text("# tiny\n\nTones are free.\n\n## Data\n\nTones are licensed CC0.\n")
    exp.mkdir(parents=True)
    (exp / "ctc_tokens.txt").write_text("5\n6\n7\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config = tiny_config(Path("downloads/tiny-llm"), ctc_weight=0.1, ctc_tokens="exp/mine/ctc_tokens.txt")
        config |= {"output_dir": "exp/mine", "max_epoch": 3, "train_data_path_and_name_and_type": [["/home/me/x"]]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_trained(build_model(config).state_dict(), exp / "model.safetensors")
        write_config(config, exp / "config.yaml")
        write_config(OPTIONS, root / "decode.yaml")
        decoded = exp / "decode_beam" / "test"
        args = ["--exp", str(exp), "--data", str(data), "--out", str(decoded), "--config", "decode.yaml"]
        assert pam_decode.main([*args, "--dtype", "float32"]) == 0
    (exp / "RESULTS.md").write_text("# mine\n\n![Routing](routing.png)\n")
    (exp / "routing.png").write_bytes(b"\x89PNG")
    write_json(exp / "results.json", {"checkpoint": {"sha256": sha256_file(exp / "model.safetensors")}})
    return root


@pytest.fixture(scope="module")
def package(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "mine.zip"
    save(recipe / "exp/mine", path)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def exp(recipe: Path, tmp_path: Path) -> Path:
    """A copy of the recipe's experiment that a test may spoil."""
    shutil.copytree(recipe, tmp_path / "egs/tiny/pam1")
    return tmp_path / "egs/tiny/pam1/exp/mine"


def llm(recipe: Path) -> dict[str, Path]:
    return {"llm": recipe / "downloads/tiny-llm"}


def answers(path: Path, data: Path, **options: Any) -> dict[str, tuple[list[str], list[float]]]:
    tables = DataDir.load(data)
    keys = list(tables.utterances)
    model = pam_espnet.load(path, **options)
    waves = [read_wave(tables, key, 16000) for key in keys]
    prompts, tasks = ([table[key] for key in keys] for table in (tables.prompt, tables.utt2task))
    found = model.answer(waves, prompts, tasks)
    return {key: (one.texts, one.scores) for key, one in zip(keys, found, strict=True)}


def decoded(recipe: Path) -> dict[str, tuple[list[str], list[float]]]:
    lines = (recipe / "exp/mine/decode_beam/test/nbest.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        (entry := json.loads(line))["utt"]: (
            [hypothesis["text"] for hypothesis in entry["hypotheses"]],
            [hypothesis["score"] for hypothesis in entry["hypotheses"]],
        )
        for line in lines
    }


def unpack(package: str | Path) -> Path:
    """What is in a zip file, in a folder beside it."""
    folder = Path("unpacked")
    with zipfile.ZipFile(package) as file:
        file.extractall(folder)
    return folder


def rewrite(package: Path, path: Path, changed: Mapping[str, bytes | None]) -> Path:
    """A copy of ``package`` with other contents, or without a member; the manifest stays as it is."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
        contents = {name: source.read(name) for name in source.namelist()}
        for name, content in {**contents, **changed}.items():
            if content is not None:
                target.writestr(name, content)
    return path


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
    from pam_espnet.engine.calibration import Calibration, Judgement

    folder = deeper_llm(recipe / "downloads/tiny-llm", Path("deep").resolve(), 4)
    config = load_yaml(exp / "config.yaml") | {"llm": str(folder)}
    config["model_conf"]["ctc_tokens"] = str(exp / "ctc_tokens.txt")
    save_trained(build_model(config).state_dict(), exp / "model.safetensors")
    write_config(config, exp / "config.yaml")
    write_json(exp / "results.json", {})
    gates = Calibration((2,), None, torch.zeros(1, 33), 0.4)
    gates.save("gates.safetensors", Judgement(0.4, 1.0, 1.0, 2.0, 1.5))
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


# What is wrong with a package


@pytest.mark.parametrize("kept", [0, 100, 50_000, -1])
def test_truncated(package: Path, kept: int) -> None:
    Path("a.zip").write_bytes(package.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.zip: .*(cut short|damaged)(.|\n)*copy the package again"):
        pam_espnet.load("a.zip")


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "licences/llm/LICENSE"])
def test_changed_and_missing_members(package: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"a.zip: member {name}: changed"):
        pam_espnet.load(rewrite(package, Path("a.zip"), {name: b"x"}))
    with pytest.raises(DataError, match=f"a.zip: member {name}: missing"):
        pam_espnet.load(rewrite(package, Path("a.zip"), {name: None}))
    folder = unpack(package)
    (folder / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{folder}: member {name}: changed"):
        pam_espnet.load(folder)


def test_a_flipped_bit(package: Path) -> None:
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights, by far the largest member
    Path("a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip"):
        pam_espnet.load("a.zip")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil"])
def test_members_that_would_land_outside(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "in/here").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "in/here"))
    with pytest.raises(DataError, match=r"unsafe member .*evil"):
        pam_espnet.load(rewrite(package, Path("a.zip"), {name: b"x"}))
    assert not list(tmp_path.rglob("evil")) and not Path("/tmp/evil").exists()


def test_links_and_inflated_members(package: Path) -> None:
    shutil.copy(package, "link.zip")
    link = zipfile.ZipInfo("config.link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile("link.zip", "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"unsafe member 'config\.link'"):
        pam_espnet.load("link.zip")
    shutil.copy(package, "bomb.zip")
    with zipfile.ZipFile("bomb.zip", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(50_000_000))
    with pytest.raises(DataError, match="unpacks to more than"):
        pam_espnet.load("bomb.zip")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"not json", "no manifest"),
        (b"[]", "no manifest"),
        (b'{"format": 1}', "no manifest"),
        (b'{"format": 1, "members": {}, "models": [{"name": "llm"}]}', "no manifest"),
        (b'{"format": 99, "members": {}}', "format 99"),
        (None, "it has no manifest.json"),
    ],
)
def test_manifests_that_cannot_be(package: Path, manifest: bytes | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pam_espnet.load(rewrite(package, Path("a.zip"), {MANIFEST: manifest}))


def test_members_outside_a_folder_are_not_read(package: Path) -> None:
    folder = unpack(package)
    manifest = read_json(folder / MANIFEST)
    manifest["members"]["../../x"] = {"sha256": "0"}
    write_json(folder / MANIFEST, manifest)
    with pytest.raises(DataError, match="unsafe member"):
        pam_espnet.load(folder)


def test_what_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "gone.zip", "no such package"), (tmp_path / "empty", "neither manifest.json")):
        with pytest.raises(ConfigError, match=message):
            pam_espnet.load(path)


# Machines and people that handle it


@pytest.mark.parametrize("prefix", ["", "mine/"])
def test_a_package_zipped_again_with_compression_loads(recipe: Path, package: Path, data: Path, prefix: str) -> None:
    with zipfile.ZipFile(package) as source, zipfile.ZipFile("again.zip", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(prefix + name, source.read(name))
        target.writestr("__MACOSX/._mine", b"x")
    assert answers(Path("again.zip"), data, models=llm(recipe)).keys() == decoded(recipe).keys()


def test_a_package_on_a_disk_that_cannot_be_written_loads(
    recipe: Path, package: Path, data: Path, tmp_path: Path
) -> None:
    """Nothing is written beside it, and nothing is left in the temporary folder."""
    (tmp_path / "disk").mkdir()
    shutil.copy(package, tmp_path / "disk")
    before = set(Path(tempfile.gettempdir()).glob("pam_package_*"))
    (tmp_path / "disk").chmod(0o500)
    assert answers(tmp_path / "disk/mine.zip", data, models=llm(recipe)).keys() == decoded(recipe).keys()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["mine.zip"]
    assert set(Path(tempfile.gettempdir()).glob("pam_package_*")) == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", ["tempfile.mkdtemp", "zipfile.ZipFile.extract"])
def test_without_a_disk_to_unpack_to_it_says_what_to_do(
    package: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(step, fail)
    with pytest.raises(DataError, match=r"mine\.zip: (.|\n)*-> make room"):
        pam_espnet.load(package)


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("gpu", "cuda", "cuda:99"):
        with pytest.raises(ConfigError, match=f"--device {device}: "):
            pam_espnet.load("gone.zip", device=device)


# The pretrained models


def test_missing_model(recipe: Path, package: Path) -> None:
    digest = sha256_file(recipe / "downloads/tiny-llm/model.safetensors")
    with pytest.raises(ConfigError) as caught:
        pam_espnet.load(package)
    for part in ("'llm'", digest, "--models llm=DIR", "./run.sh --stage 1"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="there is no nowhere"):
        pam_espnet.load(package, models={"llm": "nowhere"})
    for path in (package, recipe / "exp/mine"):
        with pytest.raises(ConfigError, match=f"there is no 'lm' in {path}.*; it has llm"):
            pam_espnet.load(path, models={"lm": "nowhere"})


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_another_model_in_its_folder(recipe: Path, package: Path, name: str) -> None:
    shutil.copytree(recipe / "downloads/tiny-llm", "other")
    (Path("other") / name).write_bytes((Path("other") / name).read_bytes() + b" ")
    with pytest.raises(ConfigError, match=f"other/{name} is another one"):
        pam_espnet.load(package, models={"llm": "other"})
    (Path("other") / name).unlink()
    with pytest.raises(ConfigError, match=f"there is no other/{name}"):
        pam_espnet.load(package, models={"llm": "other"})


def test_weights_that_do_not_fit(recipe: Path, package: Path) -> None:
    """Packed by other means: the manifest fits its members, the weights do not fit the model."""
    folder = unpack(package)
    state = read_trained(folder / "model.safetensors")
    name, tensor = next((name, tensor) for name, tensor in state.items() if tensor.dim() == 2)
    save_trained({**state, name: tensor[1:]}, folder / "model.safetensors")
    manifest = read_json(folder / MANIFEST)
    manifest["members"]["model.safetensors"]["sha256"] = sha256_file(folder / "model.safetensors")
    write_json(folder / MANIFEST, manifest)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        pam_espnet.load(folder, models=llm(recipe))


def test_models_of_the_hub_are_named_by_their_commit(
    recipe: Path, exp: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A local cache in the hub's layout replaces the hub; nothing is fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--org--tiny"
    config = load_yaml(exp / "config.yaml")
    write_config({**config, "llm": "org/tiny"}, exp / "config.yaml")
    with pytest.raises(ConfigError, match="org/tiny: no such folder"):
        save(exp, "a.zip")
    shutil.copytree(recipe / "downloads/tiny-llm", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    (model,) = save(exp, "a.zip")["models"]
    assert (model["source"], model["revision"]) == ("org/tiny", commit)
    assert answers(Path("a.zip"), data).keys() == decoded(recipe).keys()
    shutil.rmtree(repository)
    with pytest.raises(ConfigError, match=f"not from the Hugging Face hub(.|\n)*get it .*org/tiny/tree/{commit}"):
        pam_espnet.load("a.zip")


def test_which_files_of_a_model_count(exp: Path) -> None:
    """All visible ones but licences, and one format of weights."""
    folder = exp.parents[1] / "downloads/tiny-llm"
    expected = {path.name for path in folder.iterdir()} - {"LICENSE"}
    for name in ("README.md", ".git/config", "provenance.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (model,) = save(exp, "mine")["models"]
    assert set(model["files"]) == expected
    licences = {path.name for path in Path("mine/licences/llm").iterdir()}
    assert licences == {"LICENSE", "README.md", "provenance.json"}


def test_an_encoder_in_a_single_file(recipe: Path, exp: Path, data: Path) -> None:
    config = load_yaml(exp / "config.yaml")
    config["frontend_conf"]["encoders"]["one"]["path"] = str(Path("weights.pth").resolve())
    write_config(config, exp / "config.yaml")
    Path("weights.pth").write_bytes(b"weights")
    llm_model, encoder = save(exp, "mine")["models"]
    assert llm_model["name"] == "llm" and encoder["source"] == "weights.pth"
    assert set(encoder["files"]) == {"weights.pth"}
    assert "whoever packed this" in encoder["get"]
    assert answers(Path("mine"), data, models=llm(recipe)).keys() == decoded(recipe).keys()
    Path("weights.pth").rename("moved.pth")
    assert answers(Path("mine"), data, models={**llm(recipe), "one": Path("moved.pth")}).keys()


def test_an_encoder_named_llm_is_refused(exp: Path) -> None:
    config = load_yaml(exp / "config.yaml")
    config["frontend_conf"]["encoders"]["llm"] = {"path": "y"}
    write_config(config, exp / "config.yaml")
    with pytest.raises(ConfigError, match="give the encoder another name"):
        save(exp, "mine")
