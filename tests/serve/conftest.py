"""A tiny model that servers answer with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_exp

import pam_espnet
from pam_espnet.decode.speech_llm import SpeechLLM


@pytest.fixture(scope="session")
def speech(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SpeechLLM:
    exp = write_exp(tmp_path_factory.mktemp("exp"), tiny_llm_dir)
    return pam_espnet.load(exp, options=exp / "decode.yaml")
