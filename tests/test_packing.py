"""An experiment packed, carried away and loaded: the same answers, and what is wrong is refused by name."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_model import deeper_llm, tiny_config, write_data

import pam_espnet
from pam_espnet.bin import pam_decode, pam_pack
from pam_espnet.config import load_yaml, write_config
from pam_espnet.data.archives import MARKER
from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.shards import read_wave
from pam_espnet.errors import CheckpointError, ConfigError, DataError, PamError
from pam_espnet.fileio import read_json, read_trained, save_trained, sha256_file, write_json
from pam_espnet.model import build_model
from pam_espnet.packing import models as pretrained
from pam_espnet.packing.archive import MANIFEST, read_manifest, unpacked, write_archive
from pam_espnet.packing.licences import mentions
from pam_espnet.packing.pack import pack

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
def archive(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "mine.zip"
    pack(recipe / "exp/mine", path)
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


def rewrite(archive: Path, path: Path, changed: Mapping[str, bytes | None]) -> Path:
    """A copy of ``archive`` with other contents, or without a member; the manifest stays as it is."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        contents = {name: source.read(name) for name in source.namelist()}
        for name, content in {**contents, **changed}.items():
            if content is not None:
                target.writestr(name, content)
    return path


# The same answers


def test_archive_unpacked_archive_and_experiment_answer_alike(recipe: Path, archive: Path, data: Path) -> None:
    expected = decoded(recipe)
    assert len(expected) == 3
    found = answers(archive, data, models=llm(recipe), cache="cache")
    assert {key: texts for key, (texts, _) in found.items()} == {key: texts for key, (texts, _) in expected.items()}
    assert all(found[key][1] == pytest.approx(expected[key][1], abs=1e-5) for key in expected)
    (folder,) = (path for path in Path("cache").iterdir() if path.is_dir())
    assert answers(folder, data, models=llm(recipe)) == found
    assert answers(recipe / "exp/mine", data) == found  # its relative paths start at the recipe, not here


def test_models_are_found_where_the_recipe_has_them(
    recipe: Path, archive: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(recipe)
    assert answers(archive, data, cache=tmp_path).keys() == decoded(recipe).keys()


def test_other_options_replace_the_packed_ones(recipe: Path, archive: Path, data: Path) -> None:
    write_config({"beam_size": 1, "max_new_tokens": 3}, "other.yaml")
    for options in ("other.yaml", {"beam_size": 1, "max_new_tokens": 3}):
        model = pam_espnet.load(archive, models=llm(recipe), options=options, cache="cache")
        assert model.options.beam.max_new_tokens == 3 and not model.options.answer_sets
    model = pam_espnet.load(recipe / "exp/mine", options="other.yaml")
    assert model.options.beam.max_new_tokens == 3


def test_importing_the_package_stays_light(repo_root: Path) -> None:
    code = "import sys, pam_espnet; print(callable(pam_espnet.load), 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


# What is in it


def test_contents(recipe: Path, archive: Path, data: Path) -> None:
    folder = unpacked(archive, "cache")
    manifest = read_json(folder / MANIFEST)
    expected = {"model.safetensors", "config.yaml", "decode.yaml", "ctc_tokens.txt", "LICENSES.md"}
    assert set(manifest["members"]) == expected | {"RESULTS.md", "results.json", "routing.png"}
    assert all(sha256_file(folder / name) == entry["sha256"] for name, entry in manifest["members"].items())
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert manifest["versions"]["pam_espnet"] == pam_espnet.__version__
    assert manifest["recipe"] == "egs/tiny/pam1" and manifest["decoding"]["dtype"] == "float32"
    assert load_yaml(folder / "decode.yaml") == OPTIONS
    (model,) = manifest["models"]
    assert model["source"] == "downloads/tiny-llm" and model["revision"] is None
    assert "./run.sh --stage 1" in model["get"] and "LICENSE" not in model["files"]
    assert model["files"]["model.safetensors"] == sha256_file(recipe / "downloads/tiny-llm/model.safetensors")
    assert {"config.json", "tokenizer.json"} < set(model["files"])
    config = load_yaml(folder / "config.yaml")
    assert config["max_epoch"] == 3 and config["model_conf"]["ctc_tokens"] == "ctc_tokens.txt"
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".yaml", ".json"):
            assert str(recipe) not in path.read_text() and "/home/me" not in path.read_text()


def test_licences_are_quoted_and_what_is_unknown_is_said_to_be(recipe: Path, exp: Path, tmp_path: Path) -> None:
    pack(exp, "a.zip")
    notes = (unpacked("a.zip") / "LICENSES.md").read_text()
    assert LICENCE in notes and "Tones are licensed CC0." in notes and "Tones are free" not in notes
    (exp.parents[1] / "downloads/tiny-llm/LICENSE").unlink()
    (exp.parents[1] / "README.md").unlink()
    pack(exp, "b.zip")
    notes = (unpacked("b.zip") / "LICENSES.md").read_text()
    assert "Unknown: its files state none." in notes and "Unknown: no README" in notes


def test_tables_that_speak_of_licences_are_quoted_whole() -> None:
    text = "# Licence\n\n| a | licence |\n|---|---|\n| x | GPL-2 |\n\nmore\n"
    assert mentions(text) == ["| a | licence |\n|---|---|\n| x | GPL-2 |"]


def test_the_same_experiment_gives_the_same_bytes(recipe: Path, archive: Path, exp: Path) -> None:
    for path in exp.rglob("*"):  # in another place, with other times
        path.touch()
    assert pam_pack.main(["--exp", str(exp), "--out", "again.zip"]) == 0
    assert Path("again.zip").read_bytes() == archive.read_bytes()


def test_absolute_paths_and_the_calibration_are_made_relocatable(recipe: Path, exp: Path, data: Path) -> None:
    """With early exit: an LLM deep enough to leave, its calibration, an absolute path."""
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
    pack(exp, "gate.zip", "gate")
    unpacked_to = unpacked("gate.zip")
    assert load_yaml(unpacked_to / "config.yaml")["llm"] == "deep"
    assert load_yaml(unpacked_to / "decode.yaml")["exit"] == {"mode": "gate", "calibration": "exit.safetensors"}
    Path("gates.safetensors").rename("moved.safetensors")
    found = answers(Path("gate.zip"), data)  # ./deep is seen from here
    lines = (exp / "decode_gate/test/text").read_text().splitlines()
    assert [texts[0] for texts, _ in found.values()] == [line.partition(" ")[2] for line in lines]
    with pytest.raises(DataError, match="not the calibration"):
        pack(exp, "gate.zip", "gate")


# What cannot be packed


def test_stages_that_were_not_run_are_named(exp: Path) -> None:
    (exp / "RESULTS.md").rename(exp / "R")
    with pytest.raises(DataError, match="--stage 5"):
        pack(exp, "a.zip")
    with pytest.raises(DataError, match=r"there are: decode_beam\).*\n.*--stage 4"):
        pack(exp, "a.zip", "other")
    with pytest.raises(ConfigError, match=r"\.zip"):
        pam_pack.main(["--exp", str(exp), "--out", "a.tar"])
    assert not Path("a.zip").exists()


def test_weights_that_were_not_decoded_with_are_not_packed(exp: Path) -> None:
    state = read_trained(exp / "model.safetensors")
    save_trained({name: tensor + 1 for name, tensor in state.items()}, exp / "model.safetensors")
    with pytest.raises(CheckpointError, match="scores of other weights"):
        pack(exp, "a.zip")
    write_json(exp / "results.json", {})
    with pytest.raises(CheckpointError, match="decode_beam was made with other weights"):
        pack(exp, "a.zip")
    content = (exp / "model.safetensors").read_bytes()
    (exp / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        pack(exp, "a.zip")


def test_sets_decoded_differently_are_not_packed(exp: Path) -> None:
    shutil.copytree(exp / "decode_beam/test", exp / "decode_beam/test_more")
    key = read_json(exp / "decode_beam/test/key.json")
    key["search"]["beam_size"] = 7
    write_json(exp / "decode_beam/test_more/key.json", key)
    with pytest.raises(DataError, match="another search than test"):
        pack(exp, "a.zip")


# What is wrong with an archive


@pytest.mark.parametrize("kept", [0, 100, 50_000, -1])
def test_truncated(archive: Path, kept: int) -> None:
    Path("a.zip").write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.zip: .*(cut short|damaged)"):
        pam_espnet.load("a.zip")


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "LICENSES.md"])
def test_changed_and_missing_members(archive: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"a.zip: member {name}: changed"):
        pam_espnet.load(rewrite(archive, Path("a.zip"), {name: b"x"}))
    with pytest.raises(DataError, match=f"a.zip: member {name}: missing"):
        pam_espnet.load(rewrite(archive, Path("a.zip"), {name: None}))
    assert not [path for path in Path().iterdir() if path.is_dir()]


def test_a_flipped_bit(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights, by far the largest member
    Path("a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip"):
        pam_espnet.load("a.zip")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil"])
def test_members_that_would_land_outside(archive: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"unsafe member .*evil"):
        pam_espnet.load(rewrite(archive, Path("a.zip"), {name: b"x"}), cache=tmp_path / "in" / "cache")
    assert not list(tmp_path.rglob("evil")) and not Path("/tmp/evil").exists()


def test_links_strangers_and_inflated_members(archive: Path, tmp_path: Path) -> None:
    shutil.copy(archive, "link.zip")
    link = zipfile.ZipInfo("config.link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile("link.zip", "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"unsafe member 'config\.link'"):
        pam_espnet.load("link.zip")
    with pytest.raises(DataError, match=r"member 'more\.py' is not in its manifest"):
        pam_espnet.load(rewrite(archive, Path("more.zip"), {"more.py": b"x"}))
    shutil.copy(archive, "bomb.zip")
    with zipfile.ZipFile("bomb.zip", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(20_000_000))
    with pytest.raises(DataError, match="unpacks to more than"):
        pam_espnet.load("bomb.zip")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"not json", "no manifest"),
        (b"[]", "no manifest"),
        (b'{"format": 1}', "no manifest"),
        (b'{"format": 99, "members": {}}', "format 99"),
        (b'{"format": 1, "members": {"../x": {"sha256": "0"}}}', "unsafe member"),
        (None, "missing: this is no archive"),
    ],
)
def test_manifests_that_cannot_be(archive: Path, manifest: bytes | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pam_espnet.load(rewrite(archive, Path("a.zip"), {MANIFEST: manifest}))


def test_a_manifest_that_lacks_its_models(recipe: Path, archive: Path) -> None:
    folder = unpacked(archive, "cache")
    manifest = read_json(folder / MANIFEST)
    write_json(folder / MANIFEST, {key: value for key, value in manifest.items() if key != "models"})
    with pytest.raises(DataError, match="incomplete: KeyError"):
        pam_espnet.load(folder, models=llm(recipe))
    evil = {**manifest["models"][0], "files": {"../../x": "0"}}
    write_json(folder / MANIFEST, {**manifest, "models": [evil]})
    with pytest.raises(ConfigError, match="unsafe file name"):
        pam_espnet.load(folder, models=llm(recipe))


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "gone.zip", "no such archive"), (tmp_path / "empty", "neither manifest.json")):
        with pytest.raises(ConfigError, match=message):
            pam_espnet.load(path)


# The folder it is unpacked into


def test_the_folder_is_used_again_and_repaired(archive: Path) -> None:
    folder = unpacked(archive, "cache")
    marker = (folder / MARKER).stat().st_mtime_ns
    assert unpacked(archive, "cache") == folder and (folder / MARKER).stat().st_mtime_ns == marker
    (folder / "config.yaml").write_text("llm: evil\n")
    assert unpacked(archive, "cache") == folder
    assert load_yaml(folder / "config.yaml")["llm"] == "downloads/tiny-llm"
    (folder / "config.yaml").write_text("llm: evil\n")
    with pytest.raises(DataError, match=r"config\.yaml: changed"):
        pam_espnet.load(folder)


def test_two_archives_of_one_name_do_not_meet(archive: Path) -> None:
    write_archive("mine.zip", {"x": b"1"}, {})
    first = unpacked("mine.zip", "cache")
    second = unpacked(archive, "cache")
    assert first != second and read_manifest(first)["members"].keys() == {"x"}


# The pretrained models


def test_missing_model(recipe: Path, archive: Path) -> None:
    digest = sha256_file(recipe / "downloads/tiny-llm/model.safetensors")
    with pytest.raises(ConfigError) as caught:
        pam_espnet.load(archive, cache="cache")
    for part in ("'llm'", digest, "--models llm=DIR", "./run.sh --stage 1"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="there is no nowhere"):
        pam_espnet.load(archive, models={"llm": "nowhere"}, cache="cache")
    with pytest.raises(ConfigError, match="there is no 'lm' in this archive; it has llm"):
        pam_espnet.load(archive, models={"lm": "nowhere"}, cache="cache")
    with pytest.raises(ConfigError, match="there is no 'lm'"):
        pam_espnet.load(recipe / "exp/mine", models={"lm": "nowhere"})


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_another_model_in_its_place(recipe: Path, archive: Path, name: str) -> None:
    shutil.copytree(recipe / "downloads/tiny-llm", "other")
    (Path("other") / name).write_bytes((Path("other") / name).read_bytes() + b" ")
    with pytest.raises(ConfigError, match=f"other/{name} is another one"):
        pam_espnet.load(archive, models={"llm": "other"}, cache="cache")
    (Path("other") / name).unlink()
    with pytest.raises(ConfigError, match=f"there is no file other/{name}"):
        pam_espnet.load(archive, models={"llm": "other"}, cache="cache")


def test_weights_that_do_not_fit(recipe: Path, archive: Path) -> None:
    """Packed by other means: the manifest fits its members, the weights do not fit the model."""
    folder = unpacked(archive, "cache")
    manifest = read_json(folder / MANIFEST)
    state = read_trained(folder / "model.safetensors")
    name, tensor = next((name, tensor) for name, tensor in state.items() if tensor.dim() == 2)
    save_trained({**state, name: tensor[1:]}, "wrong.safetensors")
    members: dict[str, Path | bytes] = {name: folder / name for name in manifest.pop("members")}
    write_archive("wrong.zip", {**members, "model.safetensors": Path("wrong.safetensors")}, manifest)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        pam_espnet.load("wrong.zip", models=llm(recipe))


def test_models_of_the_hub_are_named_by_their_commit(
    recipe: Path, exp: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A local cache in the hub's layout stands for the hub; nothing is fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--org--tiny"
    config = load_yaml(exp / "config.yaml")
    write_config({**config, "llm": "org/tiny"}, exp / "config.yaml")
    with pytest.raises(ConfigError, match="org/tiny: no such folder"):
        pack(exp, "a.zip")
    shutil.copytree(recipe / "downloads/tiny-llm", repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "LICENSE").unlink()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    pack(exp, "a.zip")
    folder = unpacked("a.zip")
    (model,) = read_json(folder / MANIFEST)["models"]
    assert (model["source"], model["revision"]) == ("org/tiny", commit)
    assert "see https://huggingface.co/org/tiny" in (folder / "LICENSES.md").read_text()
    assert answers(Path("a.zip"), data).keys() == decoded(recipe).keys()
    shutil.rmtree(repository)
    with pytest.raises(ConfigError, match=f"cannot be fetched(.|\n)*{commit}"):
        pam_espnet.load("a.zip")


def test_which_files_of_a_model_count(tmp_path: Path) -> None:
    def names(*files: str) -> list[str]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(json.dumps({"weight_map": {"a": "part-2.safetensors", "b": "part-1.safetensors"}}))
        return [path.relative_to(root).as_posix() for path in pretrained.model_files(root)]

    whole = ("config.json", "model.safetensors")
    assert names(*whole, "pytorch_model.bin", "provenance.json", "LICENSE.txt", "x/config.json", ".git") == [*whole]
    parts = ("model.safetensors.index.json", "part-1.safetensors", "part-2.safetensors")
    assert names(*parts, "model.fp32.safetensors", "pytorch_model.bin.index.json") == [*parts]
    assert names("pytorch_model.bin", "vocab.txt") == ["pytorch_model.bin", "vocab.txt"]
    assert names("net.onnx", "deep/er.bin") == ["deep/er.bin", "net.onnx"]


def test_an_encoder_in_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "crepe.pth").write_bytes(b"weights")
    model = pretrained.describe("crepe", "crepe.pth", tmp_path / "crepe.pth", None, None)
    assert set(model.files) == {"crepe.pth"} and "whoever packed this" in model.get
    assert pretrained.place([model], {}) == {"crepe": "crepe.pth"}
    shutil.move(tmp_path / "crepe.pth", tmp_path / "moved.pth")
    assert pretrained.place([model], {"crepe": "moved.pth"}) == {"crepe": "moved.pth"}


def test_an_encoder_named_llm_is_refused() -> None:
    with pytest.raises(PamError, match="give the encoder another name"):
        pretrained.paths_of({"llm": "x", "frontend_conf": {"encoders": {"llm": {"path": "y"}}}})


def test_yaml_of_the_archive_has_no_python_objects(archive: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        assert "!!" not in file.read("config.yaml").decode()
        assert isinstance(yaml.safe_load(file.read("config.yaml")), dict)
