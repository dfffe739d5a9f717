"""Arrays that people have, as the waveforms that a model is given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_config

import pam_espnet
from pam_espnet.config import write_config
from pam_espnet.decode.waveforms import as_waveform
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import save_trained
from pam_espnet.model import build_model

WAVE = (0.3 * np.sin(np.arange(16000) / 8)).astype(np.float32)
WITH_NAN = np.where(np.arange(16000) == 5, np.nan, WAVE)
WITH_INFINITY = np.where(np.arange(16000) == 5, -np.inf, WAVE)


@pytest.mark.parametrize(
    ("samples", "step"),
    [
        ((WAVE * 32767).astype("<i2"), 2 / 32767),
        ((WAVE * 32767).astype(">i2"), 2 / 32767),
        ((WAVE.astype("f8") * (2**31 - 1)).astype("i4"), 1e-7),
        ((WAVE * 127 + 128).astype("u1"), 1 / 60),
        (WAVE.astype("f8"), 0.0),
        (WAVE.astype("f2"), 1e-3),
        (WAVE.tolist(), 0.0),
        (torch.from_numpy(WAVE), 0.0),
    ],
)
def test_integers_are_scaled_by_their_range_and_floats_are_kept(samples: Any, step: float) -> None:
    found = as_waveform(samples, "wave")
    assert found.dtype == np.float32 and found.dtype.isnative
    assert np.abs(found - WAVE).max() <= step


def test_full_scale_of_integers() -> None:
    assert as_waveform(np.array([-32768, 0, 16384], "i2"), "wave").tolist() == [-1.0, 0.0, 0.5]
    assert as_waveform(np.array([0, 128, 192], "u1"), "wave").tolist() == [-1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (WAVE[None], r"has shape \(1, 16000\); must be mono, of shape \(N,\)\n  -> hand in wave\[0\]"),
        (np.stack([WAVE, WAVE], 1), r"has shape \(16000, 2\); must be mono.*\n.*mean"),
        (np.float32(0.5), r"has shape \(\)"),
        (WAVE[:0], "has no samples"),
        (WITH_NAN, "1 of 16000 samples are NaN or infinite"),
        (WITH_INFINITY, "1 of 16000 samples are NaN or infinite"),
        (WAVE * 32768, r"its peak is 9830.* within \[-1, 1\]\n  -> divide by .* 32768 for 16 bits"),
        ((WAVE * 32767).astype("i8"), "samples are int64; must be float in .*, or one of int16"),
        (WAVE.astype("c8"), "samples are complex64"),
        (WAVE > 0, "samples are bool"),
        (["a", "b"], "samples are <U1"),
        ([[0.1], [0.2, 0.3]], "is no array of samples"),
        (torch.zeros(3, requires_grad=True), "is no array of samples"),
    ],
)
def test_what_is_no_waveform_is_refused_in_words(samples: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"wave: {message}"):
        as_waveform(samples, "wave")


def test_a_model_checks_what_it_is_given(tiny_llm_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_llm_dir)
    save_trained(build_model(config).state_dict(), tmp_path / "model.safetensors")
    write_config(config, tmp_path / "config.yaml")
    model = pam_espnet.load(tmp_path, options={"beam_size": 2, "max_new_tokens": 4})
    prompts = ["Describe the sounds."]
    integers = (WAVE * 32768).astype("<i2")
    (expected,), (found,) = model.answer([integers / np.float32(32768)], prompts), model.answer([integers], prompts)
    assert found.texts == expected.texts and found.scores == expected.scores
    with pytest.raises(ConfigError, match="answer: waveform 1: has shape"):
        model.answer([WAVE, WAVE[None]], prompts * 2)
    with pytest.raises(ConfigError, match="answer: waveform 0: 1 of 16000 samples are NaN"):
        model.answer([WITH_NAN], prompts)
