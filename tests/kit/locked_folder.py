"""A folder that several processes of pytest share."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """``folder``, made if need be; no other process is in this context for it, so that nothing is fetched twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".tests.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder
