"""The archive: a zip of uncompressed members with ``manifest.json``, which has the SHA-256 of each.

The same members give the same bytes: order, times and permissions are fixed, and weights would not shrink anyway.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pam_espnet.data.archives import extract_zip, fresh_folder, is_complete
from pam_espnet.errors import DataError
from pam_espnet.fileio import atomic_path, exclusive, read_json, sha256_file

MANIFEST = "manifest.json"
FORMAT = 1  # goes up when older code cannot read what newer code writes
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that zip can express
_MODE = 0o100644 << 16  # a file that all may read


def write_archive(path: str | Path, members: Mapping[str, Path | bytes], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``members`` (name -> file or contents) and the manifest, atomically.

    Args:
        path: the archive to write.
        members: name in the archive -> file to copy, or contents.
        about: what else the manifest says.

    Returns:
        the manifest.
    """
    listed = {
        name: {
            "sha256": hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content),
            "bytes": len(content) if isinstance(content, bytes) else content.stat().st_size,
        }
        for name, content in sorted(members.items())
    }
    manifest = {"format": FORMAT, **about, "members": listed}
    first = {MANIFEST: (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode()}
    with atomic_path(path) as tmp, zipfile.ZipFile(tmp, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [*first.items(), *sorted(members.items())]:
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system, info.external_attr = 3, _MODE
            info.file_size = len(content) if isinstance(content, bytes) else content.stat().st_size
            with archive.open(info, "w") as target:
                if isinstance(content, bytes):
                    target.write(content)
                else:
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, target, 1 << 20)
    return manifest


def unpacked(archive: str | Path, cache: str | Path | None = None) -> Path:
    """The folder that holds what is in ``archive``: made now, or found whole from an earlier call.

    Args:
        archive: written by ``write_archive``.
        cache: where the folder goes (default: beside the archive); its name holds the archive's checksum.

    Raises:
        DataError: no archive, damaged, cut short, with members that would land outside or that its manifest does not
            list or lists otherwise; or no place to unpack it.
    """
    archive = Path(archive)
    if not zipfile.is_zipfile(archive):
        raise DataError(archive, "not an archive of pam_pack, or cut short", hint="copy or pack it again")
    key = sha256_file(archive)
    folder = Path(cache or archive.parent) / f"{archive.stem}.{key[:12]}"
    try:
        with exclusive(folder.with_name(f".{folder.name}.lock")):
            if is_complete(folder, key):
                try:
                    read_manifest(folder)
                except DataError as error:
                    logging.warning(f"{error.path}: {error.message}; unpacking {archive} again")
                else:
                    return folder
            with fresh_folder(folder, key) as tmp:
                extract_zip(archive, tmp, limit=archive.stat().st_size)  # members are not compressed
                _check_complete(archive, tmp)
    except PermissionError as error:
        hint = "give a folder that you may write: --cache DIR, or load(..., cache=DIR)"
        raise DataError(archive, f"cannot be unpacked into {folder.parent}: {error.strerror}", hint=hint) from error
    return folder


def _check_complete(archive: Path, folder: Path) -> None:
    """Compare what was unpacked with the manifest, member by member, both ways."""
    try:
        listed = {MANIFEST, *read_manifest(folder)["members"]}
    except DataError as error:
        where = error.path.relative_to(folder)
        raise DataError(archive, f"member {where}: {error.message}", hint="copy or pack it again") from error
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if strange := sorted(found - listed):
        raise DataError(archive, f"member {strange[0]!r} is not in its manifest", hint="pack it again")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an unpacked archive, each member compared with its SHA-256.

    Raises:
        DataError: no manifest, one of another format, or a member that is missing or was changed.
    """
    path, again = Path(folder) / MANIFEST, "unpack the archive again"
    if not path.is_file():
        raise DataError(path, "missing: this is no archive of pam_pack", hint="pack it with pam_espnet.bin.pam_pack")
    try:
        manifest = read_json(path)
        made = manifest["format"]
        members = {str(name): str(entry["sha256"]) for name, entry in manifest["members"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(path, f"no manifest of pam_pack ({error!r})", hint=again) from error
    if made != FORMAT:
        raise DataError(path, f"format {made}, this version reads {FORMAT}", hint="use the version that packed it")
    root = Path(folder).resolve()
    for name, expected in members.items():
        member = root / name
        if not member.resolve().is_relative_to(root):
            raise DataError(path, f"unsafe member {name!r}", hint="get the archive anew")
        if not member.is_file():
            raise DataError(Path(folder) / name, "missing, though the manifest lists it", hint=again)
        if sha256_file(member) != expected:
            raise DataError(Path(folder) / name, "changed: its SHA-256 is not the manifest's", hint=again)
    return manifest
