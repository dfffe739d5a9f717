"""Matrices in Kaldi ark files, written and checked here, read by ESPnet's data set. No other module imports kaldiio.

Shapes: matrices are (rows, columns) float32.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import kaldiio
import numpy as np

from pam_espnet.data.tables import write_table
from pam_espnet.errors import DataError
from pam_espnet.fileio import atomic_path

REBUILD_HINT = "compute it again (./run.sh --rebuild_cache true), or name another directory"


def write_matrices(ark: str | Path, scp: str | Path, matrices: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Write (key, matrix) pairs to an ark file and its index, one matrix in memory at a time; return the index,
    {key: "<ark>:<byte offset>"}. The ark gets its name before the index does: where the index exists, the ark is whole.
    Paths in the index begin with ``ark`` as it was given."""
    index = {}
    with atomic_path(ark) as tmp, open(tmp, "wb") as file:
        for key, matrix in matrices:
            line = io.StringIO()
            kaldiio.save_ark(file, {key: np.ascontiguousarray(matrix, dtype=np.float32)}, scp=line)
            index[key] = f"{ark}:{line.getvalue().strip().rsplit(':', 1)[1]}"
    write_table(scp, index)
    return index


def check_matrix(matrix: np.ndarray, what: str) -> None:
    """Check a matrix that was read; ``what`` names it in messages.
    Raises DataError: another dtype or shape than this module writes, or values that are not finite."""
    problem = ""
    if matrix.dtype != np.float32:
        problem = f"dtype {matrix.dtype} where float32 is expected"
    elif matrix.ndim != 2 or 0 in matrix.shape:
        problem = f"shape {matrix.shape} where (frames, layers x width) is expected"
    elif not np.isfinite(matrix).all():
        problem = "values that are NaN or infinite"
    if problem:
        raise DataError(what, f"has {problem}", hint=REBUILD_HINT)
