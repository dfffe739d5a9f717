"""Matrices in Kaldi ark files. The only module that knows kaldiio.

Shapes: matrices are (rows, columns) float32.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import kaldiio
import numpy as np

from pam_espnet.data.tables import read_table, write_table
from pam_espnet.errors import DataError
from pam_espnet.fileio import atomic_path

_BINARY = b"\0B"  # how a binary Kaldi object begins; kaldiio would also read pickles and run commands


def write_matrices(ark: str | Path, scp: str | Path, matrices: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Write (key, matrix) pairs to an ark file and its index, one matrix in memory at a time.

    Both files appear under their names only when they are complete, the ark first: where the index exists, the ark
    is whole. Paths in the index begin with ``ark`` as it was given.

    Returns:
        The index, {key: "<ark>:<byte offset>"}.
    """
    index = {}
    with atomic_path(ark) as tmp, open(tmp, "wb") as file:
        for key, matrix in matrices:
            place = io.StringIO()
            kaldiio.save_ark(file, {key: np.ascontiguousarray(matrix, dtype=np.float32)}, scp=place)
            index[key] = f"{ark}:{place.getvalue().strip().rsplit(':', 1)[1]}"
    write_table(scp, index)
    return index


def read_matrix(place: str) -> np.ndarray:
    """Read the matrix (rows, columns) at ``"<ark>:<byte offset>"``.

    Raises:
        DataError: not such a place, missing or damaged ark.
    """
    ark, _, offset = place.rpartition(":")
    hint = "make the features again (./run.sh --rebuild_cache true)"
    if not offset.isdigit():
        raise DataError(place, "is not '<ark file>:<byte offset>'", hint=hint)
    try:
        with open(ark, "rb") as file:
            file.seek(int(offset))
            if file.read(len(_BINARY)) != _BINARY:
                raise DataError(ark, f"no binary matrix at byte {offset}", hint=hint)
        return kaldiio.load_mat(place)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(ark, f"cannot be read at byte {offset}: {error}", hint=hint) from error


def read_matrices(scp: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, matrix) in the order of an index."""
    for key, place in read_table(scp).items():
        yield key, read_matrix(place)
