"""A tiny experiment that command lines answer with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import tiny_config

from pam_espnet.config import write_config
from pam_espnet.fileio import save_trained
from pam_espnet.model import build_model


@pytest.fixture(scope="module")
def exp(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exp")
    config = tiny_config(tiny_llm_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_trained(build_model(config).state_dict(), path / "model.safetensors")
    write_config(config, path / "config.yaml")
    write_config({"beam_size": 2, "max_new_tokens": 6, "answer_sets": {"count": ["0", "1"]}}, path / "decode.yaml")
    return path


@pytest.fixture(scope="module")
def wave(tone: Callable[..., np.ndarray]) -> np.ndarray:
    return tone(0.8, 440)
