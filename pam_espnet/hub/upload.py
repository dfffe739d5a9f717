"""Sending a package to the Hugging Face hub: one commit with its files and a model card, shown before it is sent."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError

import pam_espnet
from pam_espnet.data.hub import hub_errors, is_hub_id
from pam_espnet.data.pretrained import SHAREABLE
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_json, write_text
from pam_espnet.hub.card import model_card
from pam_espnet.package import MANIFEST, MODELS, save

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Repository:
    """What is on the hub: its newest commit (None: there is no repository), who sees it, files of the package there."""

    commit: str | None = None
    public: bool = False
    files: frozenset[str] = field(default_factory=frozenset)


def upload(
    exp: str | Path,
    repo: str,
    decoding: str = "beam",
    *,
    public: bool = False,
    with_models: bool = False,
    dry_run: bool = False,
    show: Callable[[str], None] = print,
) -> str | None:
    """Pack an experiment and send it to ``repo``, ``org/name``, made if need be; returns the commit, None in a dry run.

    Args:
        exp, decoding, with_models: as of ``package.save``.
        public: whether all may see a repository that is made now.
        dry_run: show what would be sent, without asking the hub anything.
        show: takes the lines that say what will be sent, before anything is.

    Raises:
        ConfigError: no token, or one that may not write there; a public repository without ``public``; one that holds
            something else; a broken connection, after which there is the older commit.
        others: those of ``package.save``.
    """
    if not is_hub_id(repo):
        raise ConfigError(f"{repo!r} is no name of a repository on the hub; it looks like org/name")
    if not (dry_run or get_token()):
        raise ConfigError("there is no token for the hub\n  -> log in (hf auth login) or set HF_TOKEN=...")
    api = HfApi(library_name="pam-espnet", library_version=pam_espnet.__version__)
    with tempfile.TemporaryDirectory(prefix="pam_upload_") as tmp:
        folder = Path(tmp) / "package"
        manifest = save(exp, folder, decoding, with_models)
        write_text(folder / CARD_FILE, model_card(folder, repo))
        there = Repository() if dry_run else _look_up(api, repo)
        if there.public and not public:
            raise ConfigError(f"{repo} is public: all would see what is sent\n  -> --public true if they may")
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        stale = sorted(there.files - set(files))
        for line in describe(repo, manifest, files, stale, there.public or (public and not there.commit), with_models):
            show(line)
        if dry_run:
            show(f"{CARD_FILE}:\n\n{files[CARD_FILE].read_text(encoding='utf-8')}\ndry run: nothing was sent")
            return None
        with hub_errors(f"{repo}: nothing of it is visible yet"):
            if there.commit is None:
                api.create_repo(repo, private=not public)
            # One commit, after all files have arrived: whoever loads it meanwhile gets the older one.
            made = api.create_commit(
                repo,
                [CommitOperationAdd(name, path) for name, path in files.items()] + [*map(CommitOperationDelete, stale)],
                commit_message=f"{manifest['experiment']}, as decode_{decoding} answers",
                parent_commit=there.commit,
            )
    show(f"sent: {constants.ENDPOINT}/{repo}/tree/{made.oid}")
    return made.oid


def _look_up(api: HfApi, repo: str) -> Repository:
    """What ``repo`` is now. Raises ConfigError: it holds something that is no package, or the hub refuses."""
    with hub_errors(repo):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:  # or no access, which making it will tell
            return Repository()
        names, members = {file.rfilename for file in info.siblings or ()}, set[str]()
        if MANIFEST in names:
            try:
                members = set(read_json(api.hf_hub_download(repo, MANIFEST, revision=info.sha))["members"])
            except (ValueError, KeyError, TypeError):
                logging.info(f"{repo}: its {MANIFEST} is another program's")
        if not members and names - {".gitattributes", CARD_FILE}:
            raise ConfigError(f"{repo} holds something that is no package\n  -> choose another name")
        return Repository(info.sha, not info.private, frozenset(names & members))


def describe(
    repo: str,
    manifest: Mapping[str, Any],
    files: Mapping[str, Path],
    stale: list[str],
    public: bool,
    with_models: bool,
) -> list[str]:
    """What will be sent, in lines: the target, each file with its size, what is removed, each pretrained model, and the
    commands in its report, which may have this machine's paths."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = f"{len(files)} files, {sum(sizes.values()):,} bytes"
    lines = [f"to {constants.ENDPOINT}/{repo} ({'public' if public else 'private'}): {total}"]
    lines += [f"  {size:>15,}  {name}" for name, size in sizes.items()]
    lines += [f"  {'removed':>15}  {name}" for name in stale]
    for model in manifest["models"]:
        if any(name.startswith(f"{MODELS}/{model['name']}/") for name in files):
            how = f"travels with it ({model['licence']})"
        elif model["revision"]:
            how = f"is fetched from {model['source']} at commit {model['revision']}"
        else:
            how = "is named by SHA-256; whoever loads it needs the folder"
        if with_models and model["licence"] not in SHAREABLE:
            how += f"; its licence ({model['licence'] or 'not known'}) is not one that is known to let it travel"
        lines.append(f"  {model['name']}: {how}")
    decodings = read_json(files["results.json"]).get("decodings", ())
    lines += [
        f"  a command that can be read in it: {command}" for command in {made["command"]: 0 for made in decodings}
    ]
    return lines
