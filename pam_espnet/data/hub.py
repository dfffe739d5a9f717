"""The Hugging Face hub through its own client: models by id at a commit, its refusals as errors that say what to do.

Nothing that is fetched is run: weights are read as safetensors, configurations as YAML and JSON.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pam_espnet.errors import ConfigError
from pam_espnet.fileio import DISK_ERRORS, read_json

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether ``text`` can be ``org/name`` of the hub; a path may look like one."""
    return bool(_ID.fullmatch(text)) and not text.lower().endswith(".zip")


def hub_folder(model_id: str, revision: str | None, **options: Any) -> Path:
    """The folder of a Hugging Face id in the local cache."""
    from huggingface_hub import snapshot_download

    with hub_errors(f"{model_id}: no such folder, and not from the Hugging Face hub", revision):
        return Path(snapshot_download(model_id, revision=revision, **options))


def fetch_listed(repo: str, revision: str | None, listing: str) -> Path:
    """The folder in the local cache of ``repo`` at ``revision`` (None: its newest commit) with the file ``listing``,
    and of its other files only the keys of "members" there. The folder's name is the commit.
    Raises ConfigError: there is no such model or revision, no access, no connection, or no room for it."""
    from huggingface_hub import hf_hub_download, snapshot_download

    with hub_errors(f"{repo}: no such package or experiment directory, and not from the Hugging Face hub", revision):
        found = Path(hf_hub_download(repo, listing, revision=revision))
        try:
            members = [str(name) for name in read_json(found)["members"]]
        except (ValueError, KeyError, TypeError):  # no manifest of a package: its reader says so
            return found.parent
        names = [glob.escape(name) for name in (listing, *members)]
        return Path(snapshot_download(repo, revision=found.parent.name, allow_patterns=names))


@contextmanager
def hub_errors(subject: str, revision: str | None = None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into ``ConfigError("<subject>: what is wrong, and what to do")``."""
    from huggingface_hub.errors import HTTPError, XetDownloadError

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError, XetDownloadError) as error:
        raise ConfigError(f"{subject}: {_explain(error, revision)}") from error


def _explain(error: Exception, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # one file of an upload
        return f"{error} {_explain(error.__cause__, revision)}"
    log_in = "log in (hf auth login) or set HF_TOKEN=... to a token that has access"
    if isinstance(error, errors.GatedRepoError):
        return f"its owners must grant access first\n  -> ask on its page at {constants.ENDPOINT}, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is none at {constants.ENDPOINT}, or it is private\n  -> check the name; if it is right, {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}\n  -> its page lists branches, tags and commits; without: the newest"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"it is not a package of pam_upload: {error.server_message or 'a file is missing'}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            why, do = "HF_HUB_OFFLINE is set", "unset it, or fetch it once on a machine with a connection"
        else:
            why, do = f"{constants.ENDPOINT} cannot be reached ({_cause(error)})", "check the connection"
        return f"not in the cache {constants.HF_HUB_CACHE} at this revision, and {why}\n  -> {do}"
    if isinstance(error, errors.HfHubHTTPError):
        status, words = error.response.status_code, error.server_message or str(error).splitlines()[0]
        do = log_in if status in (401, 403) else "see the message; if it is the hub's fault, try again later"
        return f"{constants.ENDPOINT} refused ({status}: {words})\n  -> {do}"
    if isinstance(error, errors.HTTPError):
        again = "run the same command again: what arrived whole is kept"
        return f"the connection broke ({error or type(error).__name__})\n  -> {again}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename}: {error.strerror}\n  -> free some space, or keep the cache elsewhere: HF_HOME=DIR"
    return str(error)


def _cause(error: BaseException) -> str:
    """The words of the first error behind ``error``."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
