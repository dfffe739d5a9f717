"""What the page shows of an answer is what the model says of it."""

import asyncio
import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import soundfile

import pam_espnet
from pam_espnet.data.tasks import TASKS
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.demo.answering import NOTHING, Answering, View, shares
from pam_espnet.errors import ConfigError, DataError

PROMPT = "Describe the sounds."
COUNT = TASKS["count"].default_prompt


def all_views(answering: Answering, path: Path | None, prompt: str) -> list[View]:
    async def collect() -> list[View]:
        return [view async for view in answering.views(path and str(path), prompt)]

    return asyncio.run(collect())


def test_the_answer_grows_to_that_of_the_model(plain: Answering, model: SpeechLLM, wav: Path, wave: np.ndarray) -> None:
    (expected,) = model.answer([wave], [PROMPT])
    *growing, last = all_views(plain, wav, f" {PROMPT}\n")
    assert last.text == expected.texts[0]
    assert growing and all(last.text.startswith(view.text) for view in growing)
    assert [len(view.text) for view in growing] == sorted(len(view.text) for view in growing)
    assert last.encoders == expected.routing["encoders"]
    assert [*last.layers] == ["one, layer 0", "one, layer 1", "two, layer 0", "two, layer 1"]
    assert [*last.layers.values()] == [weight for row in expected.routing["layers"].values() for weight in row]
    assert last.depths == [], "early exit is off"


def test_alternatives_are_the_beam_with_its_probabilities(exp: Path, wav: Path, wave: np.ndarray) -> None:
    options = {"beam_size": 3, "nbest": 3, "max_new_tokens": 5, "length_penalty": 0.0}  # scores are log-probabilities
    (nbest,) = pam_espnet.load(exp, options=options).answer([wave], [PROMPT])
    parts = np.exp(nbest.scores) / np.exp(nbest.scores).sum()
    for penalty in (0.0, 1.0):  # all of them are cut at five tokens: the order is the same
        speech = pam_espnet.load(exp, options={**options, "nbest": 1, "length_penalty": penalty})
        with closing(Answering(speech, 30.0)) as answering:
            found = all_views(answering, wav, PROMPT)[-1].alternatives
        assert len(set(nbest.texts)) == 3
        assert found == pytest.approx(dict(zip(nbest.texts, parts, strict=True)), abs=1e-5)


def test_a_tasks_prompt_has_the_probabilities_of_its_set(
    plain: Answering, model: SpeechLLM, wav: Path, wave: np.ndarray
) -> None:
    (expected,) = model.answer([wave], [COUNT], ["count"])
    assert expected.answer_log_probs is not None
    odds = math.exp(expected.answer_log_probs["1"] - expected.answer_log_probs["0"])
    last = all_views(plain, wav, COUNT)[-1]
    assert last.text == expected.texts[0] and last.text in ("0", "1")
    assert last.alternatives == pytest.approx({"0": 1 / (1 + odds), "1": odds / (1 + odds)}, abs=1e-5)


def test_early_exit_shows_the_block_of_each_token(exiting: Answering, wav: Path, wave: np.ndarray) -> None:
    last = all_views(exiting, wav, PROMPT)[-1]
    (expected,) = exiting.speech.answer([wave], [PROMPT])
    assert [int(block) for _, block in last.depths] == expected.depths[0]
    assert {"1", "2"} == {block for _, block in last.depths}, "the test needs both"
    tokens = "".join(token for token, _ in last.depths)  # bytes of letters that are not whole differ
    assert [letter for letter in tokens if letter.isalnum()] == [letter for letter in last.text if letter.isalnum()]


def test_a_text_that_comes_twice_is_one_alternative() -> None:
    found = shares([("a", -1.0), ("", -1.0), ("a", -1.0), ("b", -900.0)])
    assert found == pytest.approx({"a": 2 / 3, NOTHING: 1 / 3, "b": 0.0})


def test_what_cannot_be_answered_is_said_and_nothing_keeps_waiting(plain: Answering, wav: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "long.wav", np.ones(31 * 16000) / 2, 16000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF and no more")
    for path, prompt, error, words in (
        (None, PROMPT, ConfigError, "record or upload"),
        (wav, " ", ConfigError, "ask something"),
        (tmp_path / "silent.wav", PROMPT, DataError, "recording: digital silence"),
        (tmp_path / "long.wav", PROMPT, DataError, "recording: too long: 31.00 s"),
        (tmp_path / "broken.wav", PROMPT, DataError, "recording: cannot be read"),
        (wav, PROMPT + "?" * 2000, ConfigError, "2020 characters"),
    ):
        with pytest.raises(error, match=words):
            all_views(plain, path, prompt)
    assert len(plain.queue) == 0 and plain.queue.healthy


def test_who_goes_away_withdraws_the_question(plain: Answering, wav: Path) -> None:
    async def leave() -> None:
        views = plain.views(str(wav), PROMPT)
        await anext(views)
        await views.aclose()

    asyncio.run(leave())
    assert all_views(plain, wav, PROMPT)[-1].text and plain.queue.healthy
