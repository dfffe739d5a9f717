"""Fetch LibriSpeech's archives, check their MD5 and unpack them to ``DOWNLOADS/LibriSpeech/<subset>``.

Reads ``local/archives.yaml`` and ``local/sizes.yaml``. A subset whose folder has a ``.completed`` marker is skipped;
an interrupted download continues where it stopped. An archive that was put into ``DOWNLOADS`` by hand is used.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOCAL = Path(__file__).resolve().parent
sys.path.insert(0, str(LOCAL.parents[3]))

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.config import load_yaml  # noqa: E402
from pam_espnet.errors import ConfigError, DataError  # noqa: E402

TEST_SETS = ("test-clean", "test-other")


def read_sizes(path: Path = LOCAL / "sizes.yaml") -> dict[str, dict[str, list[str]]]:
    """sizes.yaml: {size: {train: subsets, dev: subsets}}."""
    return load_yaml(path)


def subsets_of(size: str) -> list[str]:
    """All subsets that a size needs, the small ones first."""
    sizes = read_sizes()
    if size not in sizes:
        raise ConfigError(f"--size {size}: local/sizes.yaml has {', '.join(sizes)}")
    return [*TEST_SETS, *sizes[size]["dev"], *sizes[size]["train"]]


def remote_file(subset: str, table: dict[str, Any], mirror: str = "") -> Any:
    """The ``RemoteFile`` of a subset's archive; ``mirror`` is asked before those of ``table`` (archives.yaml).

    Raises:
        ConfigError: unknown subset.
    """
    from pam_espnet.data.download import RemoteFile

    entry = table["archives"].get(subset)
    if entry is None:
        raise ConfigError(f"{subset}: no such subset; local/archives.yaml has {', '.join(table['archives'])}")
    mirrors = [mirror.rstrip("/")] if mirror else []
    urls = [f"{base}/{entry['resource']}/{subset}.tar.gz" for base in (*mirrors, *table["mirrors"])]
    return RemoteFile(f"{subset}.tar.gz", urls, f"md5:{entry['md5']}", entry["size"])


def get_subset(subset: str, downloads: Path, remote: Any, remove_archive: bool) -> None:
    """Make ``DOWNLOADS/LibriSpeech/<subset>`` from its archive.

    Raises:
        DataError: the archive is damaged, or holds something else; or the folder is not from here.
        PamError: no mirror delivers it.
    """
    from pam_espnet.data.archives import extract_tar, is_complete, mark_complete
    from pam_espnet.data.download import fetch

    folder, begun = downloads / "LibriSpeech" / subset, downloads / f".{subset}.unpacking"
    if is_complete(folder, remote.checksum):
        print(f"download: {folder} is there already", flush=True)
        return
    if folder.exists() and not begun.exists():
        hint = f"use it with --librispeech {downloads.absolute()}, or move it away"
        raise DataError(folder, "is there, and was not unpacked by this program", hint=hint)
    archive = fetch(remote, downloads)
    shutil.rmtree(folder, ignore_errors=True)  # half of it, of a run that was stopped
    begun.touch()
    extract_tar(archive, downloads)
    if not folder.is_dir():
        raise DataError(archive, f"has no folder LibriSpeech/{subset} in it", hint="delete it and run this again")
    mark_complete(folder, remote.checksum)
    begun.unlink()
    if remove_archive:
        archive.unlink()
    print(f"download: unpacked {folder}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Download and unpack what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, default=Path("downloads"), help="folder to fill (downloads)")
    parser.add_argument("--size", default="clean100", help="all that this size needs (clean100)")
    parser.add_argument("--subsets", nargs="+", metavar="NAME", help="these subsets instead, such as train-clean-100")
    parser.add_argument("--mirror", default="", help="address to ask first, such as https://host/resources")
    parser.add_argument("--remove_archives", choices=("true", "false"), default="false", help="once unpacked (false)")
    args = parser.parse_args(argv)
    table = load_yaml(LOCAL / "archives.yaml")
    subsets = args.subsets or subsets_of(args.size)
    remotes = {subset: remote_file(subset, table, args.mirror) for subset in subsets}
    total = sum(remote.size for remote in remotes.values())
    size = f"{total / 1e9:.1f} GB as archives"
    print(f"download: {', '.join(subsets)} ({size}) -> {args.downloads / 'LibriSpeech'}", flush=True)
    for subset, remote in remotes.items():
        get_subset(subset, args.downloads, remote, args.remove_archives == "true")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
