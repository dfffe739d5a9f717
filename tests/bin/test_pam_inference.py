"""One question about one recording, from the command line; the answer while it grows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from pam_espnet.bin.pam_inference import answer_all, main
from pam_espnet.config import load_yaml
from pam_espnet.data.tasks import TASKS
from pam_espnet.decode.answers import PartialAnswer
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.search.hypothesis import BeamOptions

PROMPT = "Describe the sounds."


def ask(exp: Path, wav: Path, *more: str) -> int:
    return main([str(wav), "--model", str(exp), "--config", str(exp / "decode.yaml"), *more])


def test_answers(exp: Path, wave: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is the answer; another sample rate and a second channel change nothing but the resampling."""
    model = SpeechLLM.load(exp, AnswerOptions(BeamOptions(beam_size=2, max_new_tokens=6)))
    soundfile.write(tmp_path / "mono.wav", wave, 16000, subtype="PCM_16")
    soundfile.write(tmp_path / "stereo.flac", np.stack([wave, wave], axis=1), 16000, subtype="PCM_16")
    (expected,) = model.answer([np.round(wave * 32768).astype(np.float32) / 32768], [PROMPT])
    for name in ("mono.wav", "stereo.flac"):
        assert ask(exp, tmp_path / name, "--prompt", PROMPT) == 0
        assert capsys.readouterr().out == expected.texts[0] + "\n"
    soundfile.write(tmp_path / "slow.wav", wave[::2], 8000)
    assert ask(exp, tmp_path / "slow.wav", "--task", "caption") == 0
    assert capsys.readouterr().out.strip()
    assert ask(exp, tmp_path / "mono.wav", "--task", "count") == 0
    assert capsys.readouterr().out in ("0\n", "1\n")


def test_several_recordings(
    exp: Path, tone: Callable[..., np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wavs = [str(tmp_path / f"{hz}.wav") for hz in (300, 900)]
    for wav, hz in zip(wavs, (300, 900), strict=True):
        soundfile.write(wav, tone(0.8, hz), 16000)
    alone = []
    for wav in wavs:
        assert ask(exp, Path(wav), "--task", "count") == 0
        alone.append(capsys.readouterr().out.strip())
    options = ["--model", str(exp), "--config", str(exp / "decode.yaml"), "--task", "count"]
    assert main([*wavs, *options]) == 0
    assert capsys.readouterr().out == "".join(f"{wav}\t{text}\n" for wav, text in zip(wavs, alone, strict=True))
    assert main([*options, *wavs, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["wav"] for one in found] == wavs and [one["answer"] for one in found] == alone
    for one in found:
        assert one["seconds_audio"] == 0.8 and one["prompt"] == TASKS["count"].default_prompt
        assert one["hypotheses"][0]["text"] == one["answer"]
        assert set(one["answer_log_probs"]) == {"0", "1"} and set(one["routing"]["encoders"]) == {"one", "two"}


@pytest.mark.parametrize("holds", [99, 2])
def test_a_gpu_answers_several_recordings_together(
    exp: Path,
    tone: Callable[..., np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    holds: int,
) -> None:
    """The same lines in the same order; ``holds``: recordings for which the GPU has memory."""
    wavs = [str(tmp_path / f"{index}.wav") for index in range(5)]
    for index, wav in enumerate(wavs):
        soundfile.write(wav, tone(0.5 + 0.1 * (index % 3), 300 + 100 * index) * (index != 3), 16000)  # one is silent
    options = [*wavs, "--model", str(exp), "--config", str(exp / "decode.yaml"), "--prompt", PROMPT, "--device", "cpu"]
    assert main(options) == 1
    expected, tried = capsys.readouterr(), []
    model = SpeechLLM.load(exp, AnswerOptions.from_dict(load_yaml(exp / "decode.yaml")))
    answer = model.answer

    def limited(waves: list[np.ndarray], *args: Any, **more: Any) -> Any:
        tried.append(len(waves))
        if len(waves) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return answer(waves, *args, **more)

    monkeypatch.setattr(model, "answer", limited)
    monkeypatch.setattr(model, "on_gpu", True)
    model.__dict__["free_memory"] = 1 << 40
    monkeypatch.setattr("pam_espnet.bin.pam_inference.load_model", lambda args: model)
    assert main(options) == 1
    found = capsys.readouterr()
    assert tried == ([4] if holds == 99 else [4, 2, 2])
    assert found.out == expected.out and len(found.out.splitlines()) == 4
    assert "3.wav: digital silence" in found.err


def test_a_wrong_question_about_one_costs_no_other_its_answer(
    exp: Path, wave: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where a batch is refused, its recordings are answered alone."""
    wavs = [str(tmp_path / f"{index}.wav") for index in range(3)]
    for index, wav in enumerate(wavs):
        soundfile.write(wav, wave[: 12000 - 1000 * index], 16000)
    model = SpeechLLM.load(exp, AnswerOptions(BeamOptions(beam_size=2, max_new_tokens=6)))
    answer = model.answer

    def picky(waves: list[np.ndarray], *args: Any, **more: Any) -> Any:
        if 11000 in map(len, waves):
            raise ConfigError("not this one")
        return answer(waves, *args, **more)

    monkeypatch.setattr(model, "answer", picky)
    found = answer_all(model, wavs, PROMPT, None, 30.0, None)
    assert [isinstance(one, ConfigError) for one in found] == [False, True, False]
    assert [one["seconds_audio"] for one in found if isinstance(one, dict)] == [0.75, 0.625]


def test_a_bar_where_there_are_several_on_a_terminal(
    exp: Path, wave: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("pam_espnet.bin.pam_inference.REFRESH", 0.0)
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    wavs = [str(tmp_path / "a.wav")] * 2
    assert main([*wavs, "--model", str(exp), "--config", str(exp / "decode.yaml"), "--prompt", PROMPT]) == 0
    out, err = capsys.readouterr()
    answers = {line.partition("\t")[2] for line in out.splitlines()}
    assert len(out.splitlines()) == 2 and len(answers) == 1 and "\r" not in out
    assert "1/2" in err and answers.pop()[:3] in err


def test_log_lines_go_to_standard_error(exp: Path, wave: np.ndarray, tmp_path: Path) -> None:
    """What takes its time before the first answer is logged; standard output is the answer alone."""
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    words = [str(tmp_path / "a.wav"), "--model", str(exp), "--config", str(exp / "decode.yaml"), "--task", "count"]
    command = [sys.executable, "-m", "pam_espnet.bin.pam_inference", *words]
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "kit")])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    assert done.stdout in ("0\n", "1\n")
    assert " INFO loaded " in done.stderr


def test_models_are_named_one_by_one(
    exp: Path, wave: np.ndarray, tiny_llm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    with pytest.raises(ConfigError, match="must look like llm=DIR, got 'llm'"):
        ask(exp, tmp_path / "a.wav", "--task", "count", "--models", "llm")
    with pytest.raises(ConfigError, match=r"nowhere"):
        ask(exp, tmp_path / "a.wav", "--task", "count", "--models", f"llm={tmp_path}/nowhere")
    assert ask(exp, tmp_path / "a.wav", "--task", "count", "--models", f"llm={tiny_llm_dir}") == 0
    assert capsys.readouterr().out in ("0\n", "1\n")


def test_the_answer_grows_on_a_terminal(
    exp: Path, wave: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "mono.wav", wave, 16000)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert ask(exp, tmp_path / "mono.wav", "--prompt", PROMPT) == 0
    out, err = capsys.readouterr()
    shown = [text for text in err.split("\r\033[K") if text]
    assert len(set(shown)) > 1 and max(map(len, shown)) < 200
    assert err.endswith("\r\033[K") and "\033" not in out


def test_partial_answers(exp: Path, wave: np.ndarray) -> None:
    model = SpeechLLM.load(exp, AnswerOptions(BeamOptions(beam_size=2, max_new_tokens=6)))
    steps: list[list[PartialAnswer]] = []
    waves, prompts = [wave, wave[:9000]], [PROMPT, "How many people are speaking?"]
    answers = model.answer(waves, prompts, on_partial=steps.append)
    assert [answer.texts for answer in answers] == [answer.texts for answer in model.answer(waves, prompts)]
    for index, answer in enumerate(answers):
        own = [one for partials in steps for one in partials if one.utterance == index]
        assert [one.done for one in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].text == answer.texts[0] and own[-1].score == answer.scores[0]
        assert [len(one.tokens) for one in own[:-1]] == list(range(1, len(own)))
        for one in own:  # what is called settled is not taken back
            assert one.tokens[: one.settled] == answer.tokens[0][: one.settled]
            assert own[-1].text.startswith(one.settled_text)
        assert own[-2].settled > 0 and own[-1].settled == len(answer.tokens[0])


def test_half_a_letter_is_not_shown() -> None:
    def decode(tokens: object) -> str:
        return "caf\ufffd"

    assert PartialAnswer(0, [1], -1.0, False, decode).text == "caf"
    assert PartialAnswer(0, [1], -1.0, True, decode).text == "caf\ufffd"


@pytest.mark.parametrize(
    ("samples", "more", "message"),
    [
        (None, ["--task", "asr"], "no file"),
        (np.zeros(16000), ["--task", "asr"], "silence"),
        (np.zeros(0), ["--task", "asr"], "empty"),
        (np.full(16000 * 3, 0.1), ["--task", "asr", "--max_seconds", "2"], "too long"),
        (np.full(900, 0.1), ["--task", "asr"], "too short"),
        (np.full(16000, 0.1), [], "--prompt"),
        (np.full(16000, 0.1), ["--prompt", " "], "--prompt is empty"),
        (np.full(16000, 0.1), ["--prompt", "caf\udce9"], "not UTF-8"),  # typed in a Latin-1 terminal
        (np.full(16000, 0.1), ["--task", "song"], "song"),
        (np.full(16000, 0.1), ["--task", "asr", "--max_seconds", "0"], "--max_seconds"),
    ],
)
def test_errors(exp: Path, tmp_path: Path, samples: np.ndarray | None, more: list[str], message: str) -> None:
    wav = tmp_path / "a.wav"
    if samples is not None:
        soundfile.write(wav, samples, 16000)
    with pytest.raises((ConfigError, DataError), match=message):
        ask(exp, wav, *more)


def test_what_is_no_audio_is_refused(exp: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("not audio")
    with pytest.raises(DataError, match="cannot be read"):
        ask(exp, tmp_path / "a.wav", "--task", "asr")


def test_one_bad_recording_costs_no_other_its_answer(
    exp: Path, wave: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    (tmp_path / "text.wav").write_text("not audio")
    wavs = [str(tmp_path / name) for name in ("a.wav", "empty.wav", 300 * "x", "text.wav", "a.wav")]
    for more in ((), ("--json",)):
        assert main([*wavs, "--model", str(exp), "--config", str(exp / "decode.yaml"), "--task", "count", *more]) == 1
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 2 and len(set(out.splitlines())) == 1
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 3
        for line, reason in zip(errors, ("empty.wav: empty", "xxx: no such", "text.wav: cannot be"), strict=True):
            assert reason in line


def test_a_file_name_need_not_be_utf8(
    exp: Path, wave: np.ndarray, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """A Latin-1 name, as old zip files give it; sound, and in another format that ffmpeg reads."""
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    soundfile.write(tmp_path / "a.mp3", wave, 16000)
    (tmp_path / "a.txt").write_text("not audio")
    wavs = []
    for suffix in ("wav", "mp3", "txt"):
        wavs.append(os.fsdecode(os.fsencode(tmp_path) + f"/caf\xe9.{suffix}".encode("latin-1")))
        (tmp_path / f"a.{suffix}").rename(wavs[-1])
    for more in ((), ("--json",)):
        assert main([*wavs, "--model", str(exp), "--config", str(exp / "decode.yaml"), "--task", "count", *more]) == 1
        out, err = capsysbinary.readouterr()
        backslash = b"\\\\" if more else b"\\"  # JSON doubles it
        assert b"caf" + backslash + b"xe9.wav" in out and b"caf" + backslash + b"xe9.mp3" in out
        assert len(out.splitlines()) == 2 and b"cannot be read" in err


@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_a_model_is_loaded(
    exp: Path, wave: np.ndarray, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("pam_espnet.package.load", None)
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    with pytest.raises(ConfigError, match=f"--device {device}: .*; cpu, cuda, cuda:N or auto"):
        ask(exp, tmp_path / "a.wav", "--task", "asr", "--device", device)
