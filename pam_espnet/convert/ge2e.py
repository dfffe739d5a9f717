"""Resemblyzer's ``pretrained.pt`` (package ``resemblyzer``) -> folder for ``pam_espnet.frontend.encoders.ge2e``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pam_espnet.convert.common import load_torch, model_folder, rename, save_model

if TYPE_CHECKING:
    from torch import Tensor

NUM_LAYERS = 3


def convert(source: Path, out: Path, licence: str) -> None:
    """Split the stacked LSTM into single layers and keep what the encoder uses.

    Left out: the optimiser's state and the two numbers of the training loss (``similarity_*``).

    Args:
        source: ``pretrained.pt``.
        out: folder to make.
        licence: text of the model's licence (Apache-2.0; the package's ``LICENSE``).

    Raises:
        DataError: no such file, or not this checkpoint.
        ConfigError: no licence text.
    """
    with model_folder(out, source=source, licence=licence, source_format="ge2e") as folder:
        weights = load_torch(source, "model_state")
        tensors: dict[str, Tensor] = {}
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            for layer in range(NUM_LAYERS):
                tensors |= rename(weights, {f"lstm.{name}_l{layer}": f"lstms.{layer}.{name}_l0"}, source)
        tensors |= rename(weights, {f"linear.{name}": f"projection.{name}" for name in ("weight", "bias")}, source)
        network = {"width": tensors["projection.weight"].shape[0], "num_layers": NUM_LAYERS}
        save_model(folder, tensors, {"model_type": "ge2e", "sample_rate": 16000, "network": network})
