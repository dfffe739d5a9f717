"""The tiny recipe of ``tiny_package``, and a package of its experiment."""

import shutil
from pathlib import Path

import pytest
from tiny_model import write_data
from tiny_package import make_recipe

from pam_espnet.package import save


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "test", size=1)


@pytest.fixture(scope="session")
def recipe(tiny_llm_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree") / "egs" / "tiny" / "pam1"
    make_recipe(root, tiny_llm_dir, data)
    return root


@pytest.fixture(scope="session")
def package(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "mine.zip"
    save(recipe / "exp/mine", path)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def exp(recipe: Path, tmp_path: Path) -> Path:
    """A copy of the recipe's experiment that a test may spoil."""
    shutil.copytree(recipe, tmp_path / "egs/tiny/pam1")
    return tmp_path / "egs/tiny/pam1/exp/mine"
