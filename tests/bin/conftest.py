"""A tiny experiment that command lines answer with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_exp


@pytest.fixture(scope="module")
def exp(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exp(tmp_path_factory.mktemp("exp"), tiny_llm_dir)


@pytest.fixture(scope="module")
def wave(tone: Callable[..., np.ndarray]) -> np.ndarray:
    return tone(0.8, 440)
