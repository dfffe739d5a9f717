"""Packages that are damaged, unsafe, zipped again, or on a disk that cannot be written."""

import errno
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from read_only_disk import read_only
from tiny_package import answers, decoded, llm, rewrite, unpack

import pam_espnet
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.fileio import read_json, write_json
from pam_espnet.package import MANIFEST


def texts(found: dict[str, tuple[list[str], list[float]]]) -> dict[str, list[str]]:
    return {key: answer[0] for key, answer in found.items()}


# What is wrong with a package


@pytest.mark.parametrize("kept", [0, 100, 50_000, -1])
def test_truncated(package: Path, kept: int) -> None:
    Path("a.zip").write_bytes(package.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.zip: .*(cut short|damaged)(.|\n)*copy the package again"):
        pam_espnet.load("a.zip")


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "licences/llm/LICENSE"])
def test_changed_and_missing_members(package: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"a.zip: member {name}: changed"):
        pam_espnet.load(rewrite(package, Path("a.zip"), {name: b"x"}))
    with pytest.raises(DataError, match=f"a.zip: member {name}: missing"):
        pam_espnet.load(rewrite(package, Path("a.zip"), {name: None}))
    folder = unpack(package)
    (folder / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{folder}: member {name}: changed"):
        pam_espnet.load(folder)


def test_a_flipped_bit(package: Path) -> None:
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights, by far the largest member
    Path("a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip"):
        pam_espnet.load("a.zip")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil"])
def test_members_that_would_land_outside(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "in/here").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "in/here"))
    with pytest.raises(DataError, match=r"unsafe member .*evil"):
        pam_espnet.load(rewrite(package, Path("a.zip"), {name: b"x"}))
    assert not list(tmp_path.rglob("evil")) and not Path("/tmp/evil").exists()


def test_links_and_inflated_members(package: Path) -> None:
    shutil.copy(package, "link.zip")
    link = zipfile.ZipInfo("config.link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile("link.zip", "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"unsafe member 'config\.link'"):
        pam_espnet.load("link.zip")
    shutil.copy(package, "bomb.zip")
    with zipfile.ZipFile("bomb.zip", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(50_000_000))
    with pytest.raises(DataError, match="unpacks to more than"):
        pam_espnet.load("bomb.zip")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"not json", "no manifest"),
        (b"[]", "no manifest"),
        (b'{"format": 1}', "no manifest"),
        (b'{"format": 1, "members": {}, "models": [{"name": "llm"}]}', "no manifest"),
        (b'{"format": 1, "members": {}, "models": [], "decoding": {"options": "x", "dtype": null}}', "no manifest"),
        (b'{"format": 99, "members": {}}', "format 99"),
        (None, "it has no manifest.json"),
    ],
)
def test_manifests_that_cannot_be(package: Path, manifest: bytes | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pam_espnet.load(rewrite(package, Path("a.zip"), {MANIFEST: manifest}))


def test_members_outside_a_folder_are_not_read(package: Path) -> None:
    folder = unpack(package)
    manifest = read_json(folder / MANIFEST)
    manifest["members"]["../../x"] = {"sha256": "0"}
    write_json(folder / MANIFEST, manifest)
    with pytest.raises(DataError, match="unsafe member"):
        pam_espnet.load(folder)


def test_what_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "gone.zip", "no such package"), (tmp_path / "empty", "neither manifest.json")):
        with pytest.raises(ConfigError, match=message):
            pam_espnet.load(path)


# Machines and people that handle it


@pytest.mark.parametrize("prefix", ["", "mine/"])
def test_a_package_zipped_again_with_compression_loads(recipe: Path, package: Path, data: Path, prefix: str) -> None:
    with zipfile.ZipFile(package) as source, zipfile.ZipFile("again.zip", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(prefix + name, source.read(name))
        target.writestr("__MACOSX/._mine", b"x")
    assert texts(answers(Path("again.zip"), data, models=llm(recipe))) == texts(decoded(recipe))


def test_a_package_on_a_disk_that_cannot_be_written_loads(
    recipe: Path, package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left in the temporary folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with read_only(tmp_path / "disk", package) as disk:
        found = answers(disk / package.name, data, models=llm(recipe))
    assert texts(found) == texts(decoded(recipe)) and not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", ["tempfile.mkdtemp", "shutil.copyfileobj"])
def test_without_a_disk_to_unpack_to_it_says_what_to_do(
    package: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(step, fail)
    with pytest.raises(DataError, match=r"mine\.zip: (.|\n)*-> free some space, .*: TMPDIR=DIR"):
        pam_espnet.load(package)


def test_too_little_space_to_unpack_to(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(DataError, match=r"mine\.zip: .* 0\.0 GB are free\n  -> .*: TMPDIR=DIR"):
        pam_espnet.load(package)


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="xxx: no such package"):
        pam_espnet.load(300 * "x")
    for device in ("gpu", "cuda", "cuda:99"):
        with pytest.raises(ConfigError, match=f"--device {device}: "):
            pam_espnet.load("gone.zip", device=device)
