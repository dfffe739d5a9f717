"""What every converter does around the weights: a folder that is whole or absent, its licence, where it came from.

A converter reads one foreign file and fills the folder; it knows nothing of downloads and of the encoders' forward.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pam_espnet.errors import ConfigError, DataError
from pam_espnet.fileio import sha256_file, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def model_folder(out: Path, *, source: Path, licence: str, source_format: str) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``out``; when the block ends well, it becomes ``out``.

    ``LICENSE`` (the text handed in) and ``provenance.json`` (converter, name and SHA-256 of the source file, SHA-256 of
    every file written) are added. An older ``out`` is replaced only when the new one is complete.

    Args:
        out: folder to make, e.g. ``downloads/models/yamnet``.
        source: the file that is converted.
        licence: text of the model's licence (or its notice); travels with the weights.
        source_format: name of the converter, as in ``pam_convert --format``.

    Raises:
        ConfigError: the licence is empty: weights without one are not passed on.
        DataError: ``source`` is not a file.
    """
    out, source = Path(out), Path(source)
    if not licence.strip():
        raise ConfigError(f"--licence: no licence text for {source}; give the licence file of the package")
    if not source.is_file():
        raise DataError(source, "no such file", hint="run stage 1 of the recipe: it downloads and unpacks the packages")
    tmp, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        write_text(tmp / "LICENSE", licence.rstrip() + "\n")
        for path in tmp.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        made = {path.name: sha256_file(path) for path in sorted(tmp.iterdir())}
        provenance = {"converter": source_format, "source": source.name, "source_sha256": sha256_file(source)}
        write_json(tmp / "provenance.json", {**provenance, "files_sha256": made})
        if out.exists():
            os.replace(out, old)
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load_torch(source: Path, key: str) -> dict[str, Tensor]:
    """The state dict under ``key`` of a torch checkpoint; nothing but tensors and plain containers is unpickled.

    Raises:
        DataError: the file is no such checkpoint.
    """
    import pickle

    import torch

    try:
        return torch.load(source, map_location="cpu", weights_only=True)[key]
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise DataError(source, f"no torch checkpoint with safe weights under {key!r}: {error}") from error


def rename(weights: Mapping[str, Tensor], names: Mapping[str, str], source: Path) -> dict[str, Tensor]:
    """The tensors that ``names`` (old -> new) picks, as contiguous float32.

    Raises:
        DataError: one is missing.
    """
    missing = sorted(set(names) - set(weights))
    if missing:
        raise DataError(source, f"lacks the weights {', '.join(missing)}: another model than this converter knows")
    return {new: weights[old].float().contiguous() for old, new in names.items()}


def save_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json``."""
    from safetensors.torch import save_file

    # A copy each: safetensors refuses tensors that share memory.
    save_file({name: tensor.clone() for name, tensor in sorted(tensors.items())}, folder / "model.safetensors")
    write_json(folder / "config.json", dict(config))
