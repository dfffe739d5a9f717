"""Fetching from the Hugging Face hub with its own client, from a server on loopback: revisions, refusals, caches."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from model_hub import ModelHub
from read_only_disk import read_only

from pam_espnet.data.hub import fetch_listed, hub_folder, is_hub_id
from pam_espnet.errors import ConfigError

WEIGHTS = os.urandom(300_000)
FILES = {
    "manifest.json": json.dumps(
        {"members": {"config.yaml": {}, "model.safetensors": {}, "notes/[a] *.md": {}}}
    ).encode(),
    "config.yaml": b"llm: x\n",
    "model.safetensors": WEIGHTS,
    "notes/[a] *.md": b"a",
    "notes/b.md": b"b",
    "evil.py": b"raise SystemExit\n",
}


def fetch(repo: str = "me/mine", revision: str | None = None) -> Path:
    return fetch_listed(repo, revision, "manifest.json")


def refused(repo: str = "me/mine", revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        fetch(repo, revision)
    assert str(caught.value).startswith(
        f"{repo}: no such package or experiment directory, and not from the Hugging Face"
    )
    return str(caught.value)


def test_what_is_an_id() -> None:
    assert is_hub_id("me/mine") and is_hub_id("my-org/mine_2.1")
    for path in ("mine", "a/b/c", "/me/mine", "./mine", "../mine", "me/mine.zip", "me/", "me/mine ", "mé/mine"):
        assert not is_hub_id(path), path


def test_only_what_is_listed_is_fetched(hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    commit = hub.add("me/mine", FILES)
    folder = fetch()
    assert folder.name == commit
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: content for name, content in FILES.items() if name not in ("evil.py", "notes/b.md")}
    assert not [line for line in hub.requests if "evil" in line]


def test_a_branch_moves_a_tag_and_a_commit_do_not(hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    first = hub.add("me/mine", FILES)
    hub.repos["me/mine"].tags["v1"] = first
    assert fetch().name == first
    second = hub.repos["me/mine"].commit({**FILES, "config.yaml": b"llm: y\n"})
    assert fetch().name == second and (fetch() / "config.yaml").read_bytes() == b"llm: y\n"
    assert fetch(revision="v1").name == fetch(revision=first).name == fetch(revision=first).name == first
    message = refused(revision="v2")
    assert "has no revision 'v2'" in message and "lists branches, tags and commits" in message


def test_private_repositories_and_tokens(hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    hub.add("me/mine", FILES, private=True)
    message = refused()
    assert f"there is none at {hub.address}, or it is private" in message and "HF_TOKEN=..." in message
    hub_client.setenv("HF_TOKEN", "hf_wrong")
    message = refused()
    assert "refused (401" in message and "hf auth login" in message
    hub_client.setenv("HF_TOKEN", hub.token)
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert "there is none at" in refused("me/other")


def test_a_broken_connection(hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub_client.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.add("me/mine", FILES)
    hub.breaks = [200_000, *[0] * 9]
    message = refused()
    assert "the connection broke" in message and "what arrived whole is kept" in message
    hub.breaks, hub.requests = [120_000], []
    folder = fetch()
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [line.split()[-1] for line in hub.requests if line.startswith("GET /large/")][-1] == "bytes=100000-"
    assert not [line for line in hub.requests if line.startswith("GET") and line.endswith("config.yaml")]


def test_offline(hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session, constants

    hub.add("me/mine", FILES)
    folder = fetch()
    hub_client.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests = []
    assert fetch() == fetch(revision=folder.name) == folder and not hub.requests
    message = refused("me/other")
    assert "not in the cache" in message and "HF_HUB_OFFLINE is set" in message
    hub_client.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.shutdown()
    hub.server_close()
    close_session()  # the connection that is open
    assert fetch() == folder  # what is there is taken
    message = refused("me/other")
    assert f"{hub.address} cannot be reached (" in message and "check the connection" in message


def test_a_cache_that_cannot_be_written(hub: ModelHub, hub_client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    commit = hub.add("me/mine", FILES)
    fetch()
    with read_only(tmp_path / "full", tmp_path / "cache") as disk:
        hub_client.setattr(constants, "HF_HUB_CACHE", str(disk / "cache"))
        assert fetch() == disk / f"cache/models--me--mine/snapshots/{commit}"
    with read_only(tmp_path / "empty") as disk:
        hub_client.setattr(constants, "HF_HUB_CACHE", str(disk))
        message = refused()
        assert str(disk) in message and "HF_HOME=DIR" in message and not list(disk.iterdir())


def test_what_is_no_package(hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    hub.add("me/other", {"config.json": b"{}"})
    assert "not a package of pam_upload" in refused("me/other")
    hub.add("me/odd", {"manifest.json": b"[]"})
    assert [path.name for path in fetch("me/odd").iterdir()] == ["manifest.json"]  # its reader says what is wrong


def test_a_pretrained_model_by_id(hub: ModelHub, hub_client: pytest.MonkeyPatch) -> None:
    commit = hub.add("org/tiny", FILES)
    assert hub_folder("org/tiny", commit, allow_patterns=["config.yaml"]).name == commit
    with pytest.raises(ConfigError, match="org/tiny: no such folder, and not from the Hugging Face hub: it has no rev"):
        hub_folder("org/tiny", "v9")
