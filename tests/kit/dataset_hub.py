"""A server on loopback that speaks the part of the Hugging Face hub's API that reading a dataset repository takes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_server import HubHandler, HubServer

COMMIT = "1" * 40


class DatasetHub(HubServer):
    """One repository, ``me/mine``, with the files of a folder at one commit; private where there is a ``token``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_Handler)
        self.folder = folder

    def entry(self, path: Path) -> dict[str, Any]:
        """A file or folder as the API lists it."""
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
        content = path.read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(HubHandler):
    server: DatasetHub

    def answer(self, path: str, body: bytes) -> None:
        url = urlsplit(self.path)
        if self.server.token and not self.knows_token:
            self.send_json({"error": "Invalid username or password."}, 401)
        elif found := re.fullmatch(r"/datasets/me/mine/resolve/([^/]+)/(.+)", path):
            file = self.server.folder / found[2]
            if file.is_file():
                digest = hashlib.sha1(file.read_bytes()).hexdigest()
                self.send_file(file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'})
            else:
                self.send_json({"error": "Entry not found"}, 404, "EntryNotFound")
        elif not path.startswith("/api/datasets/me/mine"):
            self.send_json({"error": "Repository not found"}, 404, "RepoNotFound")
        elif (found := re.search(r"/revision/([^/]+)", path)) and found[1] not in ("main", COMMIT):
            self.send_json({"error": f"Invalid rev id: {found[1]}"}, 404, "RevisionNotFound")
        elif "/paths-info/" in path:
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            files = [self.server.folder / name for name in wanted]
            self.send_json([self.server.entry(file) for file in files if file.exists()])
        elif "/tree/" in path:
            folder = self.server.folder / re.sub(r".*/tree/[^/]+/?", "", path)
            recursive = parse_qs(url.query).get("recursive") == ["true"]
            there = sorted(folder.rglob("*") if recursive else folder.glob("*"))
            status, code = (200, "") if folder.is_dir() else (404, "EntryNotFound")
            self.send_json([self.server.entry(file) for file in there], status, code)
        else:
            siblings = [{"rfilename": entry.relative_to(self.server.folder).as_posix()} for entry in self.files()]
            self.send_json(
                {
                    "id": "me/mine",
                    "sha": COMMIT,
                    "private": False,
                    "gated": False,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "disabled": False,
                }
            )

    def files(self) -> list[Path]:
        return sorted(file for file in self.server.folder.rglob("*") if file.is_file())
