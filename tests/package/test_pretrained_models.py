"""The pretrained models that a package names: found, compared, fetched by commit."""

import shutil
from pathlib import Path

import pytest
from tiny_package import answers, decoded, llm, unpack

import pam_espnet
from pam_espnet.config import load_yaml, write_config
from pam_espnet.errors import CheckpointError, ConfigError
from pam_espnet.fileio import read_json, read_trained, save_trained, sha256_file, write_json
from pam_espnet.package import MANIFEST, save

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
