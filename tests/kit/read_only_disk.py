"""A disk that cannot be written."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def read_only(folder: Path, *files: Path) -> Iterator[Path]:
    """``folder`` with copies of ``files`` or folders, without permission to write; for root, whom permissions do not
    stop, a read-only file system is mounted there (EROFS, which is no PermissionError)."""
    folder.mkdir()
    root = os.geteuid() == 0
    if root and subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("this root may not mount a file system")
    try:
        for file in files:
            if file.is_dir():
                shutil.copytree(file, folder / file.name, symlinks=True)
            else:
                shutil.copy(file, folder)
        if root:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            folder.chmod(0o500)
        yield folder
    finally:
        if root:
            subprocess.run(["umount", folder], check=True)
        else:
            folder.chmod(0o700)
