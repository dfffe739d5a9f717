"""Every option of decode.yaml, through a whole model: with graphs the same answers as without."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_llm import random_lm
from tiny_model import tiny_config
from tiny_tokenizer import tiny_tokenizer

from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.engine.calibration import Calibration
from pam_espnet.model import ESPnetPaMModel, build_model
from pam_espnet.search.hypothesis import BeamOptions

TASKS = ["asr", "count", "caption", "asr", "count"]
PROMPTS = [f"What about {task}?" for task in TASKS]
SETS = {"count": ["0", "1", "two people", "4"]}
LAYERS = [1, 2]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"beam_size": 4, "nbest": 3},
    "greedy": {"beam_size": 1},
    "rules": {"length_penalty": 0.4, "early_stopping": "never", "min_new_tokens": 3, "temperature": 1.4},
    "n-gram guard": {"no_repeat_ngram": 2},
    "length caps": {"tokens_per_second": 1.5, "max_new_tokens": 20},
    "answer sets": {"answer_sets": SETS, "no_repeat_ngram": 2},
    "task vocabulary": {"task_vocabulary": True},
    "vocabulary and sets": {"task_vocabulary": True, "answer_sets": SETS},
    "exit at a block": {"exit": {"mode": "fixed", "layers": LAYERS[-1:]}},
    "exit by confidence": {"exit": {"mode": "confidence", "layers": LAYERS, "threshold": 0.3}},
    "exit by entropy": {"exit": {"mode": "entropy", "layers": LAYERS, "threshold": 0.5}},
    "exit by patience": {"exit": {"mode": "patience", "layers": LAYERS, "patience": 2}},
    "exit by gate": {"exit": {"mode": "gate", "calibration": "CALIBRATION"}},
    "drafts": {"beam_size": 1, "draft": {"kind": "ctc", "most": 5}},
    "ctc": {"ctc": {"weight": 0.4, "candidates": 15, "unknown": -4.0}},
    "ctc and sets": {"ctc": {"weight": 0.4}, "answer_sets": SETS, "task_vocabulary": True},
    "faster products": {"batch_invariant": False},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: str) -> ESPnetPaMModel:
    """Tiny encoders, an LLM whose heads suit a GPU, a head of the warm start."""
    folder = tmp_path_factory.mktemp("model")
    random_lm("tiny-qwen2" if device == "cpu" else "small-qwen2").save_pretrained(folder / "llm")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "llm")
    answers = [answer for texts in SETS.values() for answer in texts]
    known = sorted({token for answer in answers for token in tokenizer(answer)["input_ids"]} | set(range(30, 120)))
    (folder / "tokens").write_text(" ".join(map(str, known)))
    torch.manual_seed(0)
    config = tiny_config(folder / "llm", ctc_tokens=str(folder / "tokens"))
    return build_model({**config, "use_tf32": False}).eval()  # which would stay on for the tests that follow


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(size).astype(np.float32) * 0.1 for size in (16000, 24000, 9000, 40000, 20000)]


@pytest.fixture
def calibration(model: ESPnetPaMModel, tmp_path: Path) -> str:
    width = model.decoder.width
    gates = 3 * width**-0.5 * torch.randn(len(LAYERS), width + 1, generator=torch.Generator().manual_seed(2))
    Calibration(tuple(LAYERS), None, gates, 0.7).save(tmp_path / "exit.safetensors", {})
    return str(tmp_path / "exit.safetensors")


@pytest.mark.parametrize("name", OPTIONS)
def test_same_answers(model: ESPnetPaMModel, waves: list[np.ndarray], device: str, calibration: str, name: str) -> None:
    options = {"beam_size": 3, "nbest": 1, "max_new_tokens": 12, **OPTIONS[name]}
    if options.get("exit", {}).get("calibration"):
        options["exit"] = {**options["exit"], "calibration": calibration}
    eager, static = (
        SpeechLLM(model, AnswerOptions.from_dict({**options, "graphs": graphs}), device) for graphs in ("off", "on")
    )
    assert static.engine.graphs and not eager.engine.graphs
    expected, found = (one.answer(waves, PROMPTS, TASKS) for one in (eager, static))
    for one, other in zip(found, expected, strict=True):
        assert (one.texts, one.tokens, one.depths) == (other.texts, other.tokens, other.depths)
        assert (one.constraints, one.draft) == (other.constraints, other.draft)
        assert one.scores == pytest.approx(other.scores, abs=1e-2)
        assert (one.answer_log_probs is None) == (other.answer_log_probs is None)
        for answer, value in (one.answer_log_probs or {}).items():
            assert value == pytest.approx((other.answer_log_probs or {})[answer], abs=1e-3)


def test_no_option_is_left_out() -> None:
    """A new key of decode.yaml belongs into ``OPTIONS``."""
    named = {key for options in OPTIONS.values() for key in options} | {"graphs", "max_new_tokens"}
    known = {one.name for cls in (AnswerOptions, BeamOptions) for one in fields(cls)} - {"beam", "eos_ids"}
    assert named == known
