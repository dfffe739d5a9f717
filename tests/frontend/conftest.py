"""Folders of tiny random models of the networks that converters write; the shapes are the real ones, narrower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def _write(folder: Path, net: Any, config: dict[str, Any], spread: float = 1.0) -> Path:
    """Random weights that keep a signal's size from layer to layer, so that a wrong frame shows at the last one."""
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            torch.nn.init.normal_(parameter, std=spread * fan_in**-0.5)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_yamnet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YAMNet with a sixteenth of its channels: 64 wide."""
    from pam_espnet.frontend.encoders.yamnet import CHANNELS, STRIDES, YAMNet

    channels = [wide // 16 for wide in CHANNELS]
    config = {"channels": channels, "strides": list(STRIDES)}
    return _write(tmp_path_factory.mktemp("models") / "yamnet", YAMNet(channels), config, spread=1.4)


@pytest.fixture(scope="session")
def tiny_pyannote_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The segmentation network with 8 filters and two LSTM layers of 6: 12 wide, 6 hidden states."""
    from pam_espnet.frontend.encoders.pyannote import PyanNet

    network = {"num_filters": 8, "channels": 5, "lstm_width": 6, "num_lstm_layers": 2, "linear_width": 9}
    return _write(tmp_path_factory.mktemp("models") / "pyannote", PyanNet(**network), {"network": network})


@pytest.fixture(scope="session")
def tiny_ge2e_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speaker encoder with three LSTM layers of 8: 8 wide, 4 hidden states."""
    from pam_espnet.frontend.encoders.ge2e import GE2E

    network = {"width": 8, "num_layers": 3}
    return _write(tmp_path_factory.mktemp("models") / "ge2e", GE2E(**network), {"network": network}, spread=3.0)
