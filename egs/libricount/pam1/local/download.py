"""Fetch LibriCount from Zenodo (record 1216072), check its MD5 and unpack it to ``DOWNLOADS/LibriCount10-0dB/test``.

A folder with the marker of the right archive is kept; an interrupted download continues where it stopped. An archive
that was put into ``DOWNLOADS`` by hand is used.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

LOCAL = Path(__file__).resolve().parent
sys.path.insert(0, str(LOCAL.parents[3]))

from pam_espnet.cli import run_main  # noqa: E402

ARCHIVE = "LibriCount10-0dB.zip"
URLS = (
    f"https://zenodo.org/records/1216072/files/{ARCHIVE}?download=1",
    f"https://zenodo.org/record/1216072/files/{ARCHIVE}?download=1",
)
# as HEAR's own preprocessing of this record states it (hear-preprocess, hearsecrettasks/libricount.py)
MD5 = "md5:30c8f844dc59fa65d216d53db9dc37e2"


def get(downloads: Path, remove_archive: bool, urls: Sequence[str] = URLS, checksum: str = MD5) -> Path:
    """The folder of ``downloads`` with LibriCount, whole; fetched where it is not there.

    Raises:
        DataError: the archive is not the published one, or is damaged.
        PamError: it cannot be fetched.
    """
    from pam_espnet.data.archives import extract_zip, fresh_folder, is_complete
    from pam_espnet.data.download import RemoteFile, fetch

    folder = downloads / ARCHIVE.removesuffix(".zip")
    if is_complete(folder, checksum):
        print(f"download: {folder} is there already", flush=True)
        return folder
    archive = fetch(RemoteFile(ARCHIVE, urls, checksum), downloads)
    with fresh_folder(folder, checksum) as tmp:
        extract_zip(archive, tmp)
    if remove_archive:
        archive.unlink()
    print(f"download: unpacked {folder}", flush=True)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Download and unpack what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, default=Path("downloads"), help="folder to fill (downloads)")
    parser.add_argument("--remove_archive", choices=("true", "false"), default="false", help="once unpacked (false)")
    args = parser.parse_args(argv)
    get(args.downloads, args.remove_archive == "true")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
