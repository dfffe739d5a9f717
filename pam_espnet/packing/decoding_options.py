"""What an experiment was decoded with, from the keys of its decode directories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json

DEFAULT_DECODING = "beam"
# Beside the options themselves, in the key of a decode directory (``bin/pam_decode.py``).
_DTYPE, _CALIBRATION = "dtype", "exit_calibration_sha256"


@dataclass(frozen=True)
class UsedOptions:
    """How a decode directory's answers were found.

    Attributes:
        options: as in ``conf/decode.yaml``.
        dtype: precision of the LLM; None is the configured one.
        calibration_sha256: of the file of early exit, where one was used.
        checkpoint_sha256: of the weights that answered; None where nothing was decoded.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    calibration_sha256: str | None = None
    checkpoint_sha256: str | None = None


def read_used_options(exp_dir: str | Path, name: str = DEFAULT_DECODING) -> UsedOptions:
    """The options of ``<exp_dir>/decode_<name>``, which must be the same in all its sets.

    Raises:
        DataError: no such directory, or sets that were decoded differently.
    """
    folder = Path(exp_dir) / f"decode_{name}"
    keys = sorted(folder.glob("*/key.json"))
    if not keys:
        there = ", ".join(sorted(path.name for path in Path(exp_dir).glob("decode_*"))) or "none"
        raise DataError(folder, f"no decoded sets here (there are: {there})", hint="decode first: ./run.sh --stage 4")
    found = [(key, read_json(key)) for key in keys]
    first, used = found[0]
    for path, other in found[1:]:
        if changed := [part for part in ("search", "checkpoint_sha256") if other[part] != used[part]]:
            message = f"decoded with another {changed[0]} than {first.parent.name}"
            raise DataError(path, message, hint=f"decode all sets alike: rm -r {folder}, then ./run.sh --stage 4")
    options = {key: value for key, value in used["search"].items() if key not in (_DTYPE, _CALIBRATION)}
    search = used["search"]
    return UsedOptions(options, search.get(_DTYPE), search.get(_CALIBRATION), used["checkpoint_sha256"])
