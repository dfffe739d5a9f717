"""A server on loopback that speaks the part of the Hugging Face hub's API that sending and fetching models takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubHandler, HubServer

type Files = dict[str, bytes]
LARGE = (".safetensors", ".png")  # what is stored outside of git


@dataclass
class Repo:
    """A repository: its commits, oldest first, and tags."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: Files) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def find(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        found = self.head if revision == "main" else self.tags.get(revision, revision)
        return found if found in self.commits else None


class ModelHub(HubServer):
    """Repositories of models; ``token`` opens private ones and may write below ``me/``.

    Attributes:
        refusal: what is answered to a commit in place of making it, or None.
    """

    token = "hf_right"

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.refusal: tuple[int, str] | None = None

    def add(self, name: str, files: Files, private: bool = False) -> str:
        """Make a repository with one commit."""
        self.large |= {_sha256(content): content for path, content in files.items() if path.endswith(LARGE)}
        self.repos[name] = Repo(private)
        return self.repos[name].commit(files)


class _Handler(HubHandler):
    server: ModelHub

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        content = self.rfile.read(min(size, self.passing(size)))
        if len(content) < size:
            self.hang_up()
            return
        self.server.large[_sha256(content)] = content
        self.send_json({})

    def answer(self, path: str, body: bytes) -> None:
        if self.headers.get("Authorization") and not self.knows_token:
            self.send_json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/whoami-v2":  # hf auth login
            token = {"displayName": "a token", "role": "write"}
            self.send_json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": token}})
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif found := re.fullmatch(r"/large/(\w{64})", path):
            self.send_file(self.server.large[found[1]], {})
        elif found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/(revision|tree|preupload|commit)/([^/]+))?", path):
            self.api(found[1], found[2] or "revision", found[3] or "main", body)
        elif found := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        elif found := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        else:
            self.send_json({"error": f"unknown: {path}"}, 404)

    def repo(self, name: str) -> Repo | None:
        """The repository, or None after an answer that does not tell a private one from none."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.knows_token):
            self.send_json({"error": "Repository not found"}, 404 if self.knows_token else 401, "RepoNotFound")
            return None
        return repo

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self.knows_token:
            self.send_json({"error": "Invalid username or password."}, 401)
        elif wanted["organization"] != "me":
            self.send_json({"error": f'You don\'t have the rights to create a model under "{name}"'}, 403)
        else:
            self.server.add(name, {".gitattributes": b""}, wanted["visibility"] == "private")
            self.send_json({"url": f"{self.server.address}/{name}"})

    def validate(self, content: str) -> None:
        """What the hub would find wrong in a card's metadata, of what is likely to be."""
        data, errors = yaml.safe_load(content.split("---\n")[1]), []
        if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
            errors.append('"license_name" and "license_link" are needed for "other"')
        for model in data.get("model-index", ()):
            errors += [f'"model-index[].results" of {model["name"]} is empty'] if not model["results"] else []
            for result in model["results"]:
                keys = {**result["task"], **result["dataset"], **result["metrics"][0]}
                errors += [] if {"type", "name", "value"} <= keys.keys() else [f"{result} is incomplete"]
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        self.send_json(answer, 400 if errors else 200)

    def api(self, name: str, what: str, revision: str, body: bytes) -> None:
        if (repo := self.repo(name)) is None:
            return
        if what in ("preupload", "commit") and not self.knows_token:
            self.send_json({"error": "Forbidden"}, 403)
        elif (oid := repo.find(revision)) is None:
            self.send_json({"error": f"Invalid rev id: {revision}"}, 404, "RevisionNotFound")
        elif what == "revision":
            siblings = [{"rfilename": path} for path in repo.commits[oid]]
            self.send_json({"id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings})
        elif what == "tree":
            self.send_json([_entry(path, content) for path, content in repo.commits[oid].items()])
        elif what == "preupload":
            files = [(file["path"], repo.commits[oid].get(file["path"])) for file in json.loads(body)["files"]]
            modes = [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None if old is None else _oid(path, old),
                }
                for path, old in files
            ]
            self.send_json({"files": modes})
        elif self.server.refusal:
            self.send_json({"error": self.server.refusal[1]}, self.server.refusal[0])
        else:
            self.commit(name, repo, [json.loads(line) for line in body.splitlines()])

    def commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.commits[repo.head])
        for key, value in [(line["key"], line["value"]) for line in lines]:
            if key == "header" and value.get("parentCommit", repo.head) != repo.head:
                self.send_json({"error": "A commit has happened since"}, 412)
                return
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files)
        self.send_json({"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = [{"oid": one["oid"], "size": one["size"]} for one in wanted["objects"]]
        for one in objects:
            if one["oid"] not in self.server.large:
                one["actions"] = {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}
        self.send_json({"objects": objects, "transfer": "basic"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self.repo(name)) is None:
            return
        if (oid := repo.find(revision)) is None:
            self.send_json({"error": f"Invalid rev id: {revision}"}, 404, "RevisionNotFound")
        elif (content := repo.commits[oid].get(path)) is None:
            self.send_json({"error": "Entry not found"}, 404, "EntryNotFound", {"X-Repo-Commit": oid})
        elif path.endswith(LARGE):  # at another host's address, as on the hub
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{_sha256(content)}"'}
            where = {"Location": f"{self.server.address.replace('127.0.0.1', 'localhost')}/large/{_sha256(content)}"}
            self.send_json({}, 302, "", {"X-Repo-Commit": oid, **linked, **where})
        else:
            self.send_file(content, {"X-Repo-Commit": oid, "ETag": f'"{_oid(path, content)}"'}, breaks=False)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    if path.endswith(LARGE):
        return _sha256(content)
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the API lists it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def files_of(folder: Path) -> Files:
    """All files of a folder, to put into a repository."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def in_this_process(server: ModelHub, cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """huggingface_hub, which reads its environment when it is imported, with this server, an empty cache and no token;
    nothing is waited for between its tries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(time, "sleep", lambda seconds: None)
        yield patch
        _http.close_session()
