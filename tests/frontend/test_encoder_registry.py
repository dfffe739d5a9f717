"""Encoders by name and by import path, and what a wrong configuration is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from pam_espnet.errors import CheckpointError, ConfigError
from pam_espnet.frontend.encoders.base import load_folder, model_folder_or_id
from pam_espnet.frontend.encoders.registry import build_encoder


def test_import_path_needs_no_registration() -> None:
    encoder = build_encoder("tiny_encoder:TinyEncoder", layers=[1])
    assert (encoder.layers, encoder.width) == ((1,), 8)


def test_unknown_type_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'whispr'; known are .*whisper"):
        build_encoder("whispr")


@pytest.mark.parametrize("target", ["no_such_module:Encoder", "tiny_encoder:Absent", ":Encoder"])
def test_import_path_that_leads_nowhere(target: str) -> None:
    with pytest.raises(ConfigError, match="cannot import"):
        build_encoder(target)


def test_import_path_to_something_else() -> None:
    with pytest.raises(ConfigError, match="not a subclass"):
        build_encoder("pathlib:Path")


def test_unknown_option_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'sede'.*seed"):
        build_encoder("tiny_encoder:TinyEncoder", sede=1)


def test_folder_or_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder_or_id("microsoft/wavlm-base-plus") == "microsoft/wavlm-base-plus"
    assert model_folder_or_id("gpt2") == "gpt2"
    (tmp_path / "downloads").mkdir()
    for folder in ("downloads/gone", "downloads/models/gone", "./gone", str(tmp_path / "gone")):
        with pytest.raises(ConfigError, match="gone"):
            model_folder_or_id(folder)
    (tmp_path / "downloads" / "here").mkdir()
    assert model_folder_or_id("downloads/here") == "downloads/here"


def test_incomplete_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="incomplete"):
        load_folder(tmp_path)


def test_registry_imports_no_transformers() -> None:
    code = "import sys, pam_espnet.frontend.encoders.registry; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
