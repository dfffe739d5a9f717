"""A tiny model behind the page, alone and with early exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from shown_page import EXIT
from tiny_model import write_exp

import pam_espnet
from pam_espnet.demo.answering import Answering

if TYPE_CHECKING:
    from pam_espnet.decode.speech_llm import SpeechLLM


@pytest.fixture(scope="session")
def exp(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exp(tmp_path_factory.mktemp("exp"), tiny_llm_dir)


@pytest.fixture(scope="session")
def model(exp: Path) -> SpeechLLM:
    """The model itself, to compare with."""
    return pam_espnet.load(exp, options=exp / "decode.yaml")


@pytest.fixture
def plain(exp: Path) -> Iterator[Answering]:
    with closing(Answering(pam_espnet.load(exp, options=exp / "decode.yaml"), 30.0)) as answering:
        yield answering


@pytest.fixture
def exiting(exp: Path) -> Iterator[Answering]:
    with closing(Answering(pam_espnet.load(exp, options=EXIT), 30.0)) as answering:
        yield answering


@pytest.fixture(scope="session")
def wav(tone: Callable[..., np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wav") / "a.wav"
    soundfile.write(path, tone(0.8, 440), 16000, subtype="PCM_16")
    return path


@pytest.fixture(scope="session")
def wave(wav: Path) -> np.ndarray:
    return soundfile.read(wav, dtype="float32")[0]
