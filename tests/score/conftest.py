"""Figures here are made without the optional parts that a machine may have, unless a test asks for them."""

from pathlib import Path

import pytest

from pam_espnet.score.parts import parts_folder


@pytest.fixture(scope="session")
def installed_parts() -> Path:
    """Where this machine's parts are, should it have any."""
    return parts_folder()


@pytest.fixture(autouse=True)
def _no_parts(installed_parts: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAM_PARTS", str(tmp_path_factory.getbasetemp() / "no-parts"))
