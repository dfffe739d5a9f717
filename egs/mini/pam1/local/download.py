"""Fetch the packages of packages.yaml by name, check their SHA-256 and unpack them; nothing is installed or run here.

Reads ``packages.yaml``; writes ``DOWNLOADS/packages/<archive>`` and ``DOWNLOADS/unpacked/<name>/``. Debian packages
come through ``apt-get download``, Python wheels through ``pip download``. A package whose folder holds a ``.completed``
marker of the pinned hash is skipped, so a killed run continues where it stopped.
"""

import argparse
import fnmatch
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import IO, cast

LOCAL = Path(__file__).resolve().parent
sys.path.insert(0, str(LOCAL.parents[3]))

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.data import archives  # noqa: E402
from pam_espnet.data.download import check_file  # noqa: E402
from pam_espnet.errors import ConfigError, DataError, PamError  # noqa: E402

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # Python's word for a machine -> Debian's
MAX_UNPACKED_BYTES = 4 << 30  # an archive that claims more than this is not one of ours


@dataclass(frozen=True)
class Package:
    """One entry of packages.yaml; ``size`` in bytes."""

    name: str
    client: str
    version: str
    file: str
    size: int
    sha256: str
    licence: str
    use: str
    sizes: tuple[str, ...] = ()  # of the corpus that need it; empty: all
    optional: bool = False  # only when asked for by name
    architecture: str = ""  # of the machine that it is for; empty: any


def read_packages(path: Path = LOCAL / "packages.yaml") -> list[Package]:
    """The list of packages."""
    import yaml

    packages = []
    optional = {item.name for item in fields(Package) if item.default is not MISSING}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        if not isinstance(entry, dict) or set(entry) | optional != set(Package.__annotations__):
            raise DataError(path, f"bad entry {entry!r}", hint=f"keys: {', '.join(Package.__annotations__)}")
        if entry["client"] not in CLIENTS:
            raise DataError(path, f"{entry['name']}: unknown client {entry['client']!r}", hint="debian or python")
        packages.append(Package(**{**entry, "sizes": tuple(entry.get("sizes", ()))}))
    return packages


def select(packages: list[Package], size: str) -> list[Package]:
    """Those that a size of the corpus needs (empty: any size), on this machine.

    Raises:
        ConfigError: one is needed that there is not for this machine.
    """
    wanted = [package for package in packages if not (size and package.sizes) or size in package.sizes]
    machine = ARCHITECTURES.get(platform.machine(), platform.machine())
    chosen = [package for package in wanted if package.architecture in ("", machine)]
    if missing := sorted({package.name for package in wanted} - {package.name for package in chosen}):
        there = ", ".join(package.architecture for package in wanted if package.name == missing[0])
        raise ConfigError(f"{missing[0]}: there is none for {machine}, only for {there}\n  -> --size quick needs none")
    return chosen


def find_unpacked(downloads: Path, name: str) -> Path:
    """Folder of an unpacked package.

    Raises:
        DataError: it is not there, or not complete.
    """
    folder = downloads / "unpacked" / name
    if not archives.is_complete(folder):
        raise DataError(folder, f"package {name} is not unpacked", hint=f"python local/download.py --only {name}")
    return folder


# ---- fetching -------------------------------------------------------------------------------------------------------


def _run(command: list[str], cwd: Path) -> str:
    """Run a client; return "" when it succeeded, else the end of what it printed."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if done.returncode == 0:
        return ""
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:]) or f"exit status {done.returncode}"


def fetch_debian(package: Package, folder: Path, downloads: Path) -> None:
    """``apt-get download`` into ``folder``: with the system's package lists, then with fresh ones in ``downloads``."""
    pinned = f"{package.name}={package.version}"
    if shutil.which("apt-get") is None:
        raise PamError(
            f"{package.name}: there is no apt-get here. On a machine with Debian 12 type\n"
            f"    apt-get download {pinned}\n  and copy the file to {downloads / 'packages'}/"
        )
    apt = ["apt-get", "-q", *(["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else [])]
    if not _run([*apt, "download", pinned], folder):
        return
    print(f"  {package.name}: the system's package lists are missing or old; fetching fresh ones", flush=True)
    state = (downloads / "apt").absolute()  # in the system they would need root
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    apt += ["-o", f"Dir::State::lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"]
    update = _run([*apt, "update"], folder)
    # The newest version is tried last: should its archive differ, the hash check names what to do.
    for wanted in (pinned, package.name):
        problem = _run([*apt, "download", wanted], folder)
        if not problem:
            return
    raise PamError(
        f"{package.name}: apt-get could not download it:\n{problem}\n{update}\n"
        "  -> check the network and the package sources, run 'apt-get update' (as root), then the same command again"
    )


def pip_command() -> list[str]:
    """A Python that has pip: this one, else the first of PATH (an environment made by uv has none).

    Raises:
        PamError: no pip at all.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("python3", "python"):
        for folder in os.get_exec_path():
            python = shutil.which(name, path=folder)
            if python and not _run([python, "-m", "pip", "--version"], LOCAL):
                return [python, "-m", "pip"]
    raise PamError("no Python with pip was found; install one (apt-get install python3-pip) and run this again")


def fetch_python(package: Package, folder: Path, downloads: Path) -> None:
    """``pip download`` of exactly this wheel into ``folder``, whatever interpreter pip runs on."""
    command = [*pip_command(), "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    # The one wheel that is not "any" is opened as a zip file only, so its platform does not matter here.
    if tags := re.search(r"-(manylinux[^-]+)\.whl$", package.file):
        for tag in tags.group(1).split("."):
            command += ["--platform", tag]
    problem = _run([*command, "--dest", str(folder.absolute()), f"{package.name}=={package.version}"], folder)
    if problem:
        raise PamError(f"{package.name}: pip could not download it:\n{problem}\n  -> check the network, run this again")


CLIENTS = {"debian": fetch_debian, "python": fetch_python}


def check_archive(path: Path, package: Package) -> None:
    """Refuse an archive of another SHA-256 than the pinned one."""
    check_file(
        path,
        f"sha256:{package.sha256}",
        what=f"the pinned archive of {package.name} {package.version} ({package.size} bytes, {package.file})",
        hint="damaged: delete the file and run this again. Another version: this corpus is defined by the pinned one; "
        "get it from Debian 12 (bookworm) or PyPI, or, to define another corpus, edit local/packages.yaml",
    )


def fetch(package: Package, downloads: Path) -> Path:
    """The package's archive under ``DOWNLOADS/packages``, downloaded if it is not there, checked either way."""
    folder = downloads / "packages"
    archive = folder / package.file
    if archive.exists():
        check_archive(archive, package)
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{package.name}.", dir=folder) as tmp:
        CLIENTS[package.client](package, Path(tmp), downloads)
        (got,) = [path for path in Path(tmp).iterdir() if path.suffix in (".deb", ".whl")]
        check_archive(got, package)
        os.replace(got, archive)
    return archive


# ---- unpacking ------------------------------------------------------------------------------------------------------


def unpack_deb(archive: Path, folder: Path) -> None:
    """Unpack a .deb's files; an unsafe or damaged archive is refused."""
    if shutil.which("dpkg-deb") is None:
        raise PamError("dpkg-deb is needed to open .deb files; install the package 'dpkg' of your distribution")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        archives.extract_tar(archive, folder, stream=cast(IO[bytes], process.stdout), limit=MAX_UNPACKED_BYTES)
    if process.returncode != 0:
        raise DataError(archive, "dpkg-deb could not read it", hint="delete the file and run this again")


def unpack_wheel(archive: Path, folder: Path) -> None:
    """Unpack a wheel's files, as ``unpack_deb``."""
    archives.extract_zip(archive, folder, limit=MAX_UNPACKED_BYTES)


def unpack(package: Package, archive: Path, downloads: Path) -> Path:
    """Unpack into a temporary folder, mark it complete, then rename it to ``DOWNLOADS/unpacked/<name>``."""
    folder = downloads / "unpacked" / package.name
    with archives.fresh_folder(folder, package.sha256) as tmp:
        (unpack_deb if package.client == "debian" else unpack_wheel)(archive, tmp)
    return folder


def is_complete(package: Package, downloads: Path) -> bool:
    """Whether the package lies unpacked with the pinned hash in its marker."""
    return archives.is_complete(downloads / "unpacked" / package.name, package.sha256)


def download_all(packages: list[Package], downloads: Path) -> None:
    """Fetch, check and unpack ``packages``; print what was done."""
    from tqdm import tqdm

    begin = time.monotonic()
    missing = [package for package in packages if not is_complete(package, downloads)]
    size = sum(package.size for package in missing)
    todo = f"{len(missing)} to fetch ({size / 1e6:.0f} MB)"
    print(f"download: {len(packages)} packages, {todo} -> {downloads}", flush=True)
    with tqdm(total=size, unit="B", unit_scale=True, disable=not missing) as bar:
        for package in missing:
            bar.set_postfix_str(package.name)
            unpack(package, fetch(package, downloads), downloads)
            bar.update(package.size)
    print("licences:")
    for package in packages:
        print(f"  {package.name} {package.version}: {package.licence}")
    print(f"download: done in {time.monotonic() - begin:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Download what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, default=Path("downloads"), help="folder to fill (downloads)")
    parser.add_argument("--size", default="", help="the packages of this size of the corpus (of all sizes)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only these packages of packages.yaml; * stands for any letters"
    )
    args = parser.parse_args(argv)
    packages = read_packages()
    if args.only:
        known = dict.fromkeys(package.name for package in packages)
        named: set[str] = set()
        for pattern in args.only:
            if not (found := fnmatch.filter(known, pattern)):
                raise ConfigError(f"--only: no package {pattern!r} in packages.yaml; known: {', '.join(known)}")
            named.update(found)
        packages = select([package for package in packages if package.name in named], "")
    else:
        packages = select([package for package in packages if not package.optional], args.size)
    download_all(packages, args.downloads)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
