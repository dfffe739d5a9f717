"""Shared fixtures of the tests of training: a small training and validation set."""

from pathlib import Path

import pytest
from tiny_model import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``train_args``: twelve utterances in "train", six in "dev", tasks mixed."""
    root = tmp_path_factory.mktemp("data")
    write_data(root, "train", size=4, seed=0)
    write_data(root, "dev", size=2, seed=1)
    return root
