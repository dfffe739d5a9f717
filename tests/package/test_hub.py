"""An experiment sent to the hub and loaded by name: huggingface_hub's client, a server on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_encoder
from huggingface_hub import ModelCard, constants
from model_hub import ModelHub, files_of
from tiny_package import LICENCE, answers, llm

import pam_espnet
from pam_espnet.bin import pam_export, pam_upload
from pam_espnet.config import load_yaml, write_config
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.fileio import read_json, sha256_file, write_json
from pam_espnet.hub.upload import upload
from pam_espnet.package import save

MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy"


@pytest.fixture
def hub_client(hub: ModelHub, hub_client: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A client with a token that may write."""
    hub_client.setenv("HF_TOKEN", hub.token)
    return hub_client


def send(exp: Path, repo: str = "me/mine", **options: bool) -> list[str]:
    """The lines that are shown."""
    lines: list[str] = []
    upload(exp, repo, show=lines.append, **options)
    return lines


# Sending


def test_sent_and_loaded(
    recipe: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch, data: Path, package: Path
) -> None:
    requests: list[str] = []
    exp = recipe / "exp/mine"

    def show(line: str) -> None:
        if "model.safetensors" in line:
            requests.extend(hub.requests)

    commit = upload(exp, "me/mine", show=show)
    assert "GET /api/models/me/mine" in requests and all(line.startswith("GET ") for line in requests)  # what is there
    repo = hub.repos["me/mine"]
    assert repo.private and list(repo.commits)[1:] == [commit]
    files = repo.commits[repo.head]
    save(exp, "folder")
    assert files == {**files_of(Path("folder")), ".gitattributes": b"", "README.md": files["README.md"]}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "pam-espnet" and 'load("me/mine", models={"llm": "DIR"})' in card.text
    expected = answers(package, data, models=llm(recipe))
    assert answers(Path("me/mine"), data, models=llm(recipe)) == expected
    assert answers(Path("me/mine"), data, models=llm(recipe), revision=commit) == expected
    hub_client.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answers(Path("me/mine"), data, models=llm(recipe)) == expected


def test_a_second_time(exp: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    """The same is no commit; what is not in the package any more is removed, what others added is not."""
    first = upload(exp, "me/mine", show=str)
    assert upload(exp, "me/mine", show=str) == first
    repo = hub.repos["me/mine"]
    repo.commit({**repo.commits[repo.head], "examples/dog.wav": b"RIFF"})
    (exp / "RESULTS.md").write_text("# mine\n")  # without its picture
    lines = send(exp)
    assert any(line.split() == ["removed", "routing.png"] for line in lines)
    assert "examples/dog.wav" in repo.commits[repo.head] and "routing.png" not in repo.commits[repo.head]


def test_pretrained_models_travel_where_their_licences_allow(
    exp: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch, data: Path, recipe: Path
) -> None:
    lines = send(exp, with_models=True)
    assert not [name for name in hub.repos["me/mine"].commits[hub.repos["me/mine"].head] if name.startswith("models/")]
    assert any("its licence (not known) is not one that is known to let it travel" in line for line in lines)
    folder = exp.parents[1] / "downloads/tiny-llm"
    (folder / "LICENSE").write_text(MIT)
    lines = send(exp, with_models=True)
    assert "  llm: travels with it (mit)" in lines
    shutil.rmtree(exp.parents[1])  # another machine
    assert answers(Path("me/mine"), data).keys() == answers(recipe / "exp/mine", data).keys()
    assert pam_espnet.load("me/mine", models=llm(recipe))
    files = hub.repos["me/mine"].commits[hub.repos["me/mine"].head]
    assert files["licences/llm/LICENSE"].decode() == MIT and "models={" not in files["README.md"].decode()


def test_licences(exp: Path) -> None:
    folder = exp.parents[1] / "downloads/tiny-llm"
    for name, text, licence, travels in (
        ("LICENSE", "Tiny.\n\nApache License\n Version 2.0, January 2004", "apache-2.0", True),
        ("LICENSE", f'{MIT}\n\n"Commons Clause" License Condition', None, False),
        ("LICENSE", LICENCE, None, False),
        ("README.md", "---\nlicense: llama3.2\n---\nlicense: mit\n", "llama3.2", False),
        ("README.md", "---\nlanguage: en\nlicense: 'cc-by-4.0'\n---\n", "cc-by-4.0", True),
    ):
        (folder / name).write_text(text)
        (model,) = save(exp, "packed", with_models=True)["models"]
        assert (model["licence"], Path("packed/models/llm").is_dir()) == (licence, travels), text


def test_a_dry_run_asks_the_hub_nothing(
    exp: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_client.delenv("HF_TOKEN")
    made = {"decode": "greedy", "command": "./run.sh --librispeech /home/me/corpora"}
    write_json(exp / "results.json", {**read_json(exp / "results.json"), "decodings": [made, made]})
    args = ["--exp", str(exp), "--repo", "me/mine"]
    assert pam_upload.main([*args, "--dry_run"]) == 0 and not hub.requests
    shown = capsys.readouterr().out
    assert f"to {hub.address}/me/mine (private): " in shown and "nothing was sent" in shown
    for name in ("model.safetensors", "README.md", "manifest.json", "licences/llm/LICENSE"):
        assert f"  {name}\n" in shown
    assert "llm: is named by SHA-256" in shown and "# mine\n" in shown  # the card
    assert shown.count("a command that can be read in it: ./run.sh --librispeech /home/me/corpora\n") == 1
    with pytest.raises(ConfigError, match=r"no token for the hub\n.*hf auth login"):
        pam_upload.main(args)
    assert not hub.requests
    with pytest.raises(ConfigError, match="'mine' is no name of a repository on the hub; it looks like org/name"):
        pam_upload.main([*args, "--repo", "mine"])


def test_who_may_see_it(recipe: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    exp = recipe / "exp/mine"
    hub.add("me/mine", {"README.md": b"# soon\n"})
    with pytest.raises(ConfigError, match=r"me/mine is public: all would see what is sent\n.*--public true"):
        send(exp)
    assert len(hub.repos["me/mine"].commits) == 1 and not [line for line in hub.requests if "POST" in line]
    assert f"to {hub.address}/me/mine (public): " in send(exp, public=True)[0]
    assert "(public)" in send(exp, "me/new", public=True)[0] and not hub.repos["me/new"].private
    hub.repos["me/new"].private = True
    assert "(private)" in send(exp, "me/new", public=True)[0]


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_something_else_is_not_overwritten(
    recipe: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch, name: str
) -> None:
    hub.add("me/mine", {"README.md": b"# mine\n", name: b"{}"}, private=True)
    with pytest.raises(ConfigError, match="me/mine holds something that is no package"):
        send(recipe / "exp/mine")
    assert not [line for line in hub.requests if "POST" in line]


def test_what_the_hub_refuses(recipe: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    exp = recipe / "exp/mine"
    with pytest.raises(ConfigError, match=r"they/mine: nothing of it is visible yet: .*refused \(403: You don't have"):
        send(exp, "they/mine")
    hub_client.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match=r"refused \(401: Invalid username or password.*\n.*HF_TOKEN=..."):
        send(exp)
    hub_client.setenv("HF_TOKEN", hub.token)
    hub.refusal = (413, "too large")
    with pytest.raises(ConfigError, match=r"nothing of it is visible yet: .*refused \(413: too large"):
        send(exp)
    assert len(hub.repos["me/mine"].commits) == 1


def test_a_broken_connection_leaves_the_older_commit(exp: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    first = upload(exp, "me/mine", show=str)
    (exp / "routing.png").write_bytes(b"\x89PNG" + os.urandom(50_000))
    hub.breaks = [10_000, *[0] * 20]
    with pytest.raises(
        ConfigError, match=r"me/mine: nothing of it is visible yet: .*routing\.png.* the connection broke"
    ):
        send(exp)
    assert hub.repos["me/mine"].head == first
    hub.breaks, hub.requests = [], []
    assert upload(exp, "me/mine", show=str) == hub.repos["me/mine"].head != first
    assert hub.repos["me/mine"].commits[hub.repos["me/mine"].head]["routing.png"] == (exp / "routing.png").read_bytes()


# Loading


def test_no_code_is_taken_from_the_hub(recipe: Path, exp: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    """Neither a file of the repository nor one that the manifest lists becomes a module."""
    config = load_yaml(exp / "config.yaml")
    config["frontend_conf"]["encoders"]["one"]["type"] = "evil:Encoder"
    write_config(config, exp / "config.yaml")
    manifest = save(exp, "mine")
    Path("mine/evil.py").write_text("raise SystemExit('it ran')\n")
    manifest["members"]["evil.py"] = {"sha256": sha256_file(Path("mine/evil.py"))}
    write_json("mine/manifest.json", manifest)
    hub.add("me/mine", files_of(Path("mine")))
    with pytest.raises(ConfigError, match=r"cannot import encoder evil:Encoder: No module named 'evil'\n.*install"):
        pam_espnet.load("me/mine", models=llm(recipe))


def test_a_changed_file_and_a_wrong_revision(recipe: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    save(recipe / "exp/mine", "mine")
    hub.add("me/mine", {**files_of(Path("mine")), "config.yaml": b"llm: x\n"})
    with pytest.raises(DataError, match=r"member config\.yaml: changed"):
        pam_espnet.load("me/mine", models=llm(recipe))
    with pytest.raises(ConfigError, match="has no revision 'v9'"):
        pam_espnet.load("me/mine", revision="v9")
    with pytest.raises(ConfigError, match="mine is on this machine: a revision is for ids of the Hugging Face hub"):
        pam_espnet.load("mine", revision="v9")


def test_an_export_at_a_revision(recipe: Path, hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    save(recipe / "exp/mine", "mine")
    first = hub.add("me/mine", files_of(Path("mine")))
    hub.repos["me/mine"].commit({"README.md": b"# gone\n"})
    args = ["--model", "me/mine", "--models", f"llm={llm(recipe)['llm']}", "--vllm", "merged"]
    with pytest.raises(ConfigError, match="not a package of pam_upload"):
        pam_export.main(args)
    assert pam_export.main([*args, "--revision", first]) == 0
    assert Path("merged/model.safetensors").is_file() and f"/{first}/model.safetensors" in " ".join(hub.requests)


@pytest.mark.slow
def test_as_commands(exp: Path, data: Path, hub: ModelHub, tmp_path: Path) -> None:
    """Both commands with the client's own variables."""
    (exp.parents[1] / "downloads/tiny-llm/LICENSE").write_text(MIT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    folders = [str(Path(module.__file__ or "").parent) for module in (tiny_encoder, pam_espnet)]
    environment |= {"HF_TOKEN": hub.token, "PYTHONPATH": os.pathsep.join([folders[0], str(Path(folders[1]).parent)])}

    def call(module: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"pam_espnet.bin.{module}", *args]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )

    done = call("pam_upload", "--exp", str(exp), "--repo", "me/mine", "--with_models", "true")
    assert done.returncode == 0, done.stderr
    head = hub.repos["me/mine"].head
    assert f"sent: {hub.address}/me/mine/tree/{head}\n" in done.stdout
    wave = next(data.rglob("*.flac"))
    done = call(
        "pam_inference", "--model", "me/mine", "--revision", head, str(wave), "--task", "count", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("0", "1", "2") and f"me/mine: commit {head}" in done.stderr
    done = call("pam_inference", "--model", "me/mine", "--revision", "v9", str(wave), "--task", "count")
    assert done.returncode == 1 and "error: me/mine: " in done.stderr and "has no revision 'v9'" in done.stderr
    assert "Traceback" not in done.stderr
