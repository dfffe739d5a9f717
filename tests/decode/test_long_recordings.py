"""Recordings of any length: their pieces answered as alone, in order, with their times."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from synthetic_voice import RATE, hiss, voice, write_talk
from tiny_model import write_exp

import pam_espnet
from pam_espnet.decode.long_recordings import answer_pieces
from pam_espnet.decode.segments import Piece
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.decode.subtitles import to_srt, to_table, to_text, to_vtt, values
from pam_espnet.errors import ConfigError, DataError

PROMPT = "Transcribe the speech."


@pytest.fixture(scope="module")
def speech(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SpeechLLM:
    exp = write_exp(tmp_path_factory.mktemp("exp"), tiny_llm_dir)
    return pam_espnet.load(exp, options=exp / "decode.yaml")


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talk(tmp_path_factory.mktemp("talk"), 12)


def test_each_piece_is_answered_as_alone(speech: SpeechLLM, talk: Path) -> None:
    found = speech.transcribe(talk)
    assert len(found) == 12
    assert all(one.end <= other.start for one, other in pairwise(found))
    for one in found:
        wave, _ = soundfile.read(talk, start=round(one.start * 22050), stop=round(one.end * 22050))
        assert np.sqrt(np.mean(wave**2)) > 0.05 and 1.0 <= one.end - one.start < 3.0
    read: list[Piece] = []

    def pieces(number: int) -> list[Piece]:
        from pam_espnet.decode.long_recordings import cut_recording

        read[:] = read or list(cut_recording(speech, talk, None, 30.0))
        return [read[number]]

    for number in (0, 5, 11):
        (alone,) = answer_pieces(speech, pieces(number), PROMPT, "asr")
        assert alone.text == found[number].text and alone.answer is not None and found[number].answer is not None
        assert alone.answer.scores == pytest.approx(found[number].answer.scores, abs=1e-4)


def test_segments_come_as_they_are_decoded(speech: SpeechLLM, talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    answer = speech.answer

    def counted(waves: list[np.ndarray], prompts: list[str], tasks: list[str] | None) -> object:
        batches.append(len(waves))
        return answer(waves, prompts, tasks)

    monkeypatch.setattr(speech, "answer", counted)
    segments = speech.segments(talk)
    assert batches == []
    next(segments)
    assert batches == [8]
    assert len(list(segments)) == 11 and batches == [8, 4]


def test_windows(speech: SpeechLLM, talk: Path) -> None:
    """Every window is there; what is digitally silent is not decoded, and has no answer."""
    windows = speech.transcribe(talk, task="count", window=2.5)
    assert [one.start for one in windows] == [2.5 * number for number in range(len(windows))]
    silent = [one for one in windows if one.answer is None]
    assert silent and all(one.text == "" for one in silent)
    assert {one.text for one in windows if one.answer} <= {"0", "1"}
    assert all(one.answer.answer_log_probs for one in windows if one.answer)


def test_nothing_is_said(speech: SpeechLLM, tmp_path: Path) -> None:
    """Silence, noise and a tone are no speech: nothing is decoded."""
    for wave in (np.zeros(40 * RATE), hiss(40.0), 0.3 * np.sin(np.arange(40 * RATE) / 20), hiss(0.05), np.zeros(0)):
        soundfile.write(tmp_path / "a.wav", wave, RATE)
        assert speech.transcribe(tmp_path / "a.wav") == []


def test_long_speech_is_cut_into_pieces_that_follow_each_other(speech: SpeechLLM, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", voice(25.0), RATE)
    found = speech.transcribe(tmp_path / "a.wav", max_seconds=10.0)
    assert max(one.end - one.start for one in found) <= 10.0
    assert any(one.end == other.start for one, other in pairwise(found)) and found[-1].end > 24.5
    assert sum(one.end - one.start for one in found) > 22


def test_errors(speech: SpeechLLM, tmp_path: Path, talk: Path) -> None:
    soundfile.write(tmp_path / "loud.wav", 500 * voice(3.0), RATE, subtype="FLOAT")
    for path, message in ((tmp_path / "none.wav", "no such"), (tmp_path / "loud.wav", r"loud.wav: .* s: beyond full")):
        with pytest.raises(DataError, match=message):
            speech.transcribe(path)
    with pytest.raises(ConfigError, match="give a prompt, or a task"):
        speech.segments(talk, task=None)
    with pytest.raises(ConfigError, match="unknown task 'song'"):
        speech.segments(talk, task="song")
    for bad in ({"window": 0.0}, {"max_seconds": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            speech.segments(talk, **bad)


def test_formats(speech: SpeechLLM, talk: Path) -> None:
    found = speech.transcribe(talk)
    spoken = [one for one in found if one.text]
    assert to_text(found) == " ".join(one.text for one in spoken) + "\n"
    assert len(to_table(found).splitlines()) == len(found) + 1
    content = json.loads(json.dumps(values(found)))
    assert [one["answer"] for one in content["segments"]] == [one.text for one in found]
    assert content["answer"] + "\n" == to_text(found) and content["routing"]["encoders"].keys() == {"one", "two"}
    assert to_srt(found).count(" --> ") == to_vtt(found).count(" --> ") == len(spoken)
