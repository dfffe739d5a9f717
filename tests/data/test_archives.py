"""Unpacking: what is in an archive, what is refused, and errors about cut or damaged ones."""

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from pam_espnet.data import archives
from pam_espnet.data.archives import extract_tar, extract_zip, fresh_folder, is_complete
from pam_espnet.errors import DataError


def tar_gz(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tuple):
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
            else:
                tar.addfile(member)
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_tar(tmp_path: Path) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", ("a/b.txt", b"b"), link("a/c.txt", "b.txt", tarfile.SYMTYPE))
    for _ in range(2):  # over what is there, as after a killed run
        extract_tar(archive, tmp_path / "out")
        assert (tmp_path / "out/a/b.txt").read_bytes() == (tmp_path / "out/a/c.txt").read_bytes() == b"b"


@pytest.mark.parametrize(
    "member",
    [
        ("../evil", b"x"),
        ("a/../../evil", b"x"),
        link("evil", "../evil", tarfile.SYMTYPE),
        link("evil", "/etc/passwd", tarfile.SYMTYPE),
        link("evil", "../evil", tarfile.LNKTYPE),
        link("evil", "", tarfile.FIFOTYPE),
    ],
)
def test_tar_members_that_reach_outside(tmp_path: Path, member: tarfile.TarInfo | tuple[str, bytes]) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", ("good", b"x"), member)
    with pytest.raises(DataError, match=r"a\.tar\.gz: cannot be unpacked safely"):
        extract_tar(archive, tmp_path / "out")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "out/evil").exists()


def test_absolute_tar_names_land_inside(tmp_path: Path) -> None:
    extract_tar(tar_gz(tmp_path / "a.tar.gz", (f"{tmp_path}/evil", b"x")), tmp_path / "out")
    assert not (tmp_path / "evil").exists()
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["evil"]


@pytest.mark.parametrize("kept", [0, 10, 5_000, -1])
def test_cut_tar(tmp_path: Path, kept: int) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", ("a", os.urandom(20_000)))
    archive.write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.tar\.gz: .*(damaged|cut short)"):
        extract_tar(archive, tmp_path / "out")


def test_damaged_tar(tmp_path: Path) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", ("a", os.urandom(20_000)))
    content = bytearray(archive.read_bytes())
    content[10_000] ^= 255
    archive.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        extract_tar(archive, tmp_path / "out")


def test_too_much(tmp_path: Path) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", ("a", b"x" * 3000), ("b", b"x" * 3000))
    with pytest.raises(DataError, match="unpacks to more"):
        extract_tar(archive, tmp_path / "out", limit=5000)


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives.tarfile.TarFile, "extract", full)
    with pytest.raises(DataError, match="disk is full"):
        extract_tar(tar_gz(tmp_path / "a.tar.gz", ("a", b"x")), tmp_path / "out")


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_zip(tmp_path: Path) -> None:
    extract_zip(zipped(tmp_path / "a.zip", {"test/1_x.wav": b"w", "test/": b""}), tmp_path / "out")
    assert (tmp_path / "out/test/1_x.wav").read_bytes() == b"w"


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_zip_members_that_reach_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="unsafe member"):
        extract_zip(zipped(tmp_path / "a.zip", {"good": b"x", name: b"x"}), tmp_path / "out")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "out").exists()


def test_zip_links(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("evil")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="unsafe member"):
        extract_zip(tmp_path / "a.zip", tmp_path / "out")


def test_cut_and_damaged_zip(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"a": os.urandom(5000)})
    content = archive.read_bytes()
    damaged = content[:100] + bytes([content[100] ^ 255]) + content[101:]
    for bad in (b"", content[:3000], damaged):
        archive.write_bytes(bad)
        with pytest.raises(DataError, match=r"a\.zip: cannot be unpacked"):
            extract_zip(archive, tmp_path / "out")


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / ".x.tmp-1").mkdir()  # of a killed run

    def failing() -> None:
        with fresh_folder(tmp_path / "x", "k1") as tmp:
            (tmp / "half").touch()
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        failing()
    assert list(tmp_path.iterdir()) == []
    for key in ("k1", "k2"):
        with fresh_folder(tmp_path / "x", key) as tmp:
            (tmp / key).touch()
        assert is_complete(tmp_path / "x", key) and is_complete(tmp_path / "x") and (tmp_path / "x" / key).exists()
    assert not is_complete(tmp_path / "x", "k1") and not (tmp_path / "x/k1").exists()
