"""Pretrained models by folder or Hugging Face id: their folder on this machine, their files with SHA-256, licences."""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pam_espnet.data.hub import hub_folder
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import sha256_file

HERE = Path()
_NOTES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "PROVENANCE")  # beginnings of names, in any case
# Licences, by the hub's names, under which a copy may be passed on with the notices that are copied along.
SHAREABLE = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "mit")
_RESTRICTED = r"commons clause|non-?commercial"
_TEXTS = {
    "apache-2.0": r"Apache License.{0,40}Version 2\.0",
    "mit": r"Permission is hereby granted, free of charge, to any person",
    "bsd-3-clause": r"Redistribution and use in source and binary forms.*Neither the name",
    "bsd-2-clause": r"Redistribution and use in source and binary forms",
}
_OTHER_WEIGHTS = (".bin", ".h5", ".msgpack", ".onnx", ".ot")  # not read where there are safetensors


def find(path: str | Path, *folders: Path | None) -> Path:
    """``path`` in the first of ``folders`` in which it exists; as it is where it exists in none."""
    candidates = (folder / path for folder in folders if folder is not None)
    return next((candidate for candidate in candidates if candidate.exists()), Path(path))


def describe(name: str, path_or_id: str, recipe: Path | None, revision: str | None) -> tuple[dict[str, Any], Path]:
    """A model's entry in the manifest, and its folder or file on this machine."""
    root, commit, given = find(path_or_id, HERE, recipe), None, Path(path_or_id)
    source, get = path_or_id, "from whoever packed this; its source was not noted"
    if not root.exists():
        root = hub_folder(path_or_id, revision, local_files_only=True)
        commit, get = root.name, f"from https://huggingface.co/{path_or_id}/tree/{root.name}; loading fetches it"
    elif given.is_absolute() or ".." in given.parts:
        source = given.name
    elif recipe is not None and given.parts[:1] == ("downloads",):
        get = f"in {'/'.join(recipe.resolve().parts[-3:])}: ./run.sh --stage 1 --stop_stage 1 makes {source}"
    base = root.parent if root.is_file() else root
    files = {path.relative_to(base).as_posix(): sha256_file(path) for path in _model_files(root)}
    entry = {"name": name, "source": source, "revision": commit, "licence": licence_of(root)}
    return {**entry, "files": files, "get": get}, root


def licence_of(root: Path) -> str | None:
    """The licence of a model's folder by the hub's name for it: what its README declares, or else what the text of its
    licence file is; None where neither is known, and for a single file."""
    notes = [path for path in sorted(root.glob("*")) if path.is_file() and path.name.upper().startswith(_NOTES)]
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in notes}
    metadata = re.match(r"---\n(.*?)\n---", texts.get("README.md", ""), re.DOTALL)
    if metadata and (found := re.search(r"^license: *[\"']?([\w.-]+)", metadata[1], re.MULTILINE)):
        return found[1]
    for name, text in texts.items():
        if name.upper().startswith(_NOTES[:3]) and not re.search(_RESTRICTED, text, re.IGNORECASE):
            for licence, words in _TEXTS.items():
                if re.search(words, text, re.DOTALL):
                    return licence
    return None


def copy_model(root: Path, files: Iterable[str], folder: Path) -> None:
    """Copy ``files`` of the folder or file ``root`` to ``folder``."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root if root.is_file() else root / name, folder / name)


def _model_files(root: Path) -> list[Path]:
    """Files that decide what a model computes: all visible ones but licences, and one format of weights."""
    if root.is_file():
        return [root]
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.upper().startswith(_NOTES)]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    safe = any(path.suffix == ".safetensors" for path in found)
    return [path for path in found if not (safe and path.name.removesuffix(".index.json").endswith(_OTHER_WEIGHTS))]


def check_files(root: Path, files: Mapping[str, str]) -> None:
    """Raises ConfigError where the folder or file ``root`` does not hold ``files`` (name -> SHA-256)."""
    for name, expected in files.items():
        path = root if root.is_file() and len(files) == 1 else root / name
        if not path.is_file():
            raise ConfigError(f"there is no {path if root.exists() else root}")
        if (found := sha256_file(path)) != expected:
            raise ConfigError(f"{path} is another one: its SHA-256 is {found}")


def copy_notes(root: Path | None, folder: Path) -> None:
    """Copy licence files and READMEs that are directly in the folder ``root``."""
    for path in root.iterdir() if root is not None and root.is_dir() else ():
        if path.is_file() and path.name.upper().startswith(_NOTES):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path.name)
