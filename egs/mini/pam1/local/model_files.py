"""Steps that converters share: tensors compared with transformers' model, tensors and configuration written.

A converter is a module with ``convert(source, folder)``: it reads one file of a package as data, without executing
anything in it, and writes what an encoder or the LLM loads into ``folder``. ``models.py`` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pam_espnet.errors import DataError
from pam_espnet.fileio import write_json

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "delete it and run the recipe's stage 1 again: it downloads and verifies the package"


def check_fit(source: Path, model_class: Any, config: Any, tensors: Mapping[str, Tensor], tied: str) -> None:
    """Compare names and shapes with transformers' model of ``config``; ``tied`` is its output layer, not stored.

    Raises:
        DataError: they differ.
    """
    import torch

    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in model_class(config).state_dict().items() if name != tied}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted({name for name, _ in found.items() ^ expected.items()}):
        message = f"does not fit {model_class.__name__}: {', '.join(wrong[:5])} ({len(wrong)} tensors in all)"
        raise DataError(source, message)


def save_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json``."""
    from safetensors.torch import save_file

    # A copy each: safetensors refuses tensors that share memory.
    save_file({name: tensor.clone() for name, tensor in sorted(tensors.items())}, folder / "model.safetensors")
    write_json(folder / "config.json", dict(config))
