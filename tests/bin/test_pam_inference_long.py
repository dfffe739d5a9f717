"""Recordings of any length from the command line: pieces, windows, formats, files."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from synthetic_voice import RATE, hiss, voice

from pam_espnet.bin.pam_inference import main
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.decode.subtitles import to_srt, to_table, to_text, to_vtt
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.search.hypothesis import BeamOptions


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    wave = np.concatenate([hiss(12.0), voice(1.5), hiss(10.0), voice(2.0, 160.0), hiss(8.0)])
    soundfile.write(path, wave, RATE)
    return path


@pytest.fixture(scope="module")
def model(exp: Path) -> SpeechLLM:
    options = AnswerOptions(BeamOptions(beam_size=2, max_new_tokens=6), answer_sets={"count": ["0", "1"]})
    return SpeechLLM.load(exp, options)


def ask(exp: Path, *words: str | Path) -> int:
    return main([*map(str, words), "--model", str(exp), "--config", str(exp / "decode.yaml")])


def test_a_transcript_and_subtitles(
    exp: Path, talk: Path, model: SpeechLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.transcribe(talk)
    assert len(expected) == 2
    for more, shown in ((), to_text), (("--format", "srt"), to_srt), (("--format", "vtt"), to_vtt):
        assert ask(exp, talk, "--task", "asr", *more) == 0
        assert capsys.readouterr().out == shown(expected)
    assert ask(exp, talk, "--task", "asr", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wav"] == str(talk) and found["answer"] + "\n" == to_text(expected)
    assert [one["end"] for one in found["segments"]] == [round(one.end, 3) for one in expected]
    assert found["segments"][0]["hypotheses"][0]["text"] == found["segments"][0]["answer"]


def test_a_table_of_windows(exp: Path, talk: Path, model: SpeechLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(exp, talk, "--task", "count") == 0
    default = capsys.readouterr().out
    assert default == to_table(model.transcribe(talk, task="count", window=10.0))
    assert len(default.splitlines()) == 5
    assert ask(exp, talk, "--prompt", "Describe the sounds.", "--window", "20") == 0
    assert [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["0.00", "20.00"],
        ["20.00", "33.50"],
    ]


def test_what_is_short_is_answered_as_a_whole(
    exp: Path, talk: Path, wave: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short and long ones in any order; --piece_seconds is what divides them."""
    soundfile.write(tmp_path / "short.wav", wave, RATE)
    assert ask(exp, tmp_path / "short.wav", talk, tmp_path / "none.wav", "--task", "asr") == 1
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(tmp_path / "short.wav"), str(talk)]
    assert "none.wav: no such" in err
    assert ask(exp, talk, "--task", "asr", "--piece_seconds", "40", "--json") == 0
    assert "segments" not in json.loads(capsys.readouterr().out)
    assert ask(exp, tmp_path / "short.wav", "--task", "asr", "--piece_seconds", "1", "--json") == 0
    assert "segments" not in json.loads(capsys.readouterr().out)


def test_files(exp: Path, talk: Path, wave: np.ndarray, tmp_path: Path, model: SpeechLLM) -> None:
    soundfile.write(tmp_path / "short.wav", wave, RATE)
    options = ["--task", "asr", "--out_dir", tmp_path / "out"]
    assert ask(exp, talk, tmp_path / "short.wav", *options, "--format", "srt") == 0
    assert ask(exp, talk, tmp_path / "short.wav", *options) == 0
    assert (tmp_path / "out/talk.srt").read_text() == to_srt(model.transcribe(talk))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "short.srt", "short.txt", "talk.srt", "talk.txt",
    ]  # fmt: skip


def test_errors(exp: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"too long: 33\.50 s is more than 30 s"):
        ask(exp, talk, "--task", "asr", "--max_seconds", "30")
    with pytest.raises(ConfigError, match=r"--task asr.*or give a --window"):
        ask(exp, talk, "--prompt", "What is it?")
    soundfile.write(tmp_path / "bad.wav", np.where(np.arange(40 * RATE) == 35 * RATE, np.nan, 0.1), RATE, "FLOAT")
    with pytest.raises(DataError, match=r"between 35\.0 and 40\.0 s are NaN"):
        ask(exp, tmp_path / "bad.wav", "--task", "count", "--window", "10")
    monkeypatch.setattr("pam_espnet.bin.pam_inference.load_model", None)
    other = tmp_path / "talk.flac"
    for words, message in (
        ([talk, other, "--format", "srt"], "--format srt: several recordings need --out_dir"),
        ([talk, other, "--out_dir", tmp_path], "two recordings would be written to .*talk.txt"),
        ([talk, "--window", "0"], "--window"),
        ([talk, "--piece_seconds", "0.5"], "--piece_seconds"),
    ):
        with pytest.raises(ConfigError, match=message):
            ask(exp, *words, "--task", "asr")


def test_a_bar_of_seconds_on_a_terminal(
    exp: Path, talk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert ask(exp, talk, "--task", "asr") == 0
    out, err = capsys.readouterr()
    assert "/34 " in err and "\r" not in out and len(out.splitlines()) == 1
