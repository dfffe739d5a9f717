"""The routes, as the real client of OpenAI asks: answers, formats, streams, errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from served import asks, metrics, question, require_serve, serving, wav_bytes
from synthetic_voice import hiss, voice, write_talk

from pam_espnet.data.tasks import TASKS
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.decode.subtitles import to_srt, to_text, to_vtt
from pam_espnet.serve.answers import TOGETHER

if TYPE_CHECKING:
    from openai import OpenAI

pytestmark = pytest.mark.services
CAPTION = TASKS["caption"].default_prompt


@pytest.fixture(scope="module")
def url(speech: SpeechLLM) -> Iterator[str]:
    require_serve()
    with serving(speech) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with asks(url) as client:
        yield client


@pytest.fixture(scope="module")
def wave(tone: Callable[..., np.ndarray]) -> np.ndarray:
    return np.round(tone(0.8, 440) * 32768).astype(np.float32) / 32768


@pytest.fixture(scope="module")
def transcript(speech: SpeechLLM, wave: np.ndarray) -> str:
    return speech.answer([wave], [TASKS["asr"].default_prompt], ["asr"])[0].texts[0]


@pytest.fixture(scope="module")
def caption(speech: SpeechLLM, wave: np.ndarray) -> str:
    return speech.answer([wave], [CAPTION], [""])[0].texts[0]


def test_transcription(client: OpenAI, wave: np.ndarray, transcript: str) -> None:
    for audio_format in ("WAV", "FLAC"):
        file = ("a.bin", wav_bytes(wave, audio_format=audio_format))
        found = client.audio.transcriptions.create(model="tiny", file=file, language="en", temperature=0)
        assert found.text == transcript
        assert found.usage is not None and found.usage.to_dict() == {"type": "duration", "seconds": 0.8}
    text: Any = client.audio.transcriptions.create(model="tiny", file=file, response_format="text")
    assert text == transcript + "\n"


def test_a_transcription_as_it_grows(client: OpenAI, wave: np.ndarray, transcript: str) -> None:
    *deltas, done = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav_bytes(wave)), stream=True)
    assert len(deltas) > 1 and "".join(event.delta for event in deltas) == transcript
    assert done.type == "transcript.text.done" and done.text == transcript


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talk(tmp_path_factory.mktemp("talk"), 20)


def test_a_long_recording(client: OpenAI, speech: SpeechLLM, talk: Path) -> None:
    segments = speech.transcribe(talk)
    text = to_text(segments).rstrip("\n")
    asked = {"model": "tiny", "file": talk}
    seconds = pytest.approx(soundfile.info(talk).duration, abs=0.001)
    assert len(segments) > TOGETHER and segments[-1].end < seconds.expected - 1  # it ends with a pause
    found = client.audio.transcriptions.create(**asked)
    assert found.text == text and found.usage is not None and found.usage.to_dict()["seconds"] == seconds
    assert client.audio.transcriptions.create(**asked, response_format="srt") == to_srt(segments)
    assert client.audio.transcriptions.create(**asked, response_format="vtt") == to_vtt(segments)
    verbose = client.audio.transcriptions.create(**asked, response_format="verbose_json")
    assert verbose.text == text and verbose.segments is not None
    assert verbose.duration == seconds and verbose.usage is not None and verbose.usage.seconds == seconds
    found = [(one.start, one.end, one.text) for one in verbose.segments]
    assert found == [(round(one.start, 3), round(one.end, 3), one.text) for one in segments]
    *deltas, done = client.audio.transcriptions.create(**asked, stream=True)
    assert "".join(event.delta for event in deltas) == done.text == text


def test_a_short_recording_has_times_where_they_are_asked_for(client: OpenAI, wave: np.ndarray) -> None:
    file = ("a.wav", wav_bytes(np.concatenate([hiss(1.0), voice(1.0, 120), hiss(1.0)])))
    cues: Any = client.audio.transcriptions.create(model="tiny", file=file, response_format="srt")
    assert re.match(r"1\n00:00:00,\d{3} --> 00:00:02,\d{3}\n", cues) and cues.count("-->") == 1
    none: Any = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav_bytes(wave)), response_format="vtt")
    assert none == "WEBVTT\n\n"  # a tone is no speech
    empty = client.audio.transcriptions.create(
        model="tiny", file=("a.wav", wav_bytes(wave)), response_format="verbose_json"
    )
    assert empty.segments == [] and empty.duration == 0.8


def test_a_long_recording_is_no_question(client: OpenAI, talk: Path) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=r"file: too long: .* more than 30 s"):
        client.chat.completions.create(model="tiny", messages=question(talk.read_bytes(), CAPTION))


def test_a_question(client: OpenAI, speech: SpeechLLM, wave: np.ndarray, caption: str) -> None:
    found = client.chat.completions.create(model="tiny", messages=question(wav_bytes(wave), CAPTION))
    assert found.choices[0].message.content == caption
    assert found.choices[0].finish_reason == "length"  # of 6 tokens


def test_a_question_answered_as_it_grows(client: OpenAI, wave: np.ndarray, caption: str) -> None:
    messages = question(wav_bytes(wave), CAPTION)
    *chunks, last = client.chat.completions.create(model="tiny", messages=messages, stream=True)
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 1
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == caption
    assert last.choices[0].finish_reason == "length" and last.id == chunks[0].id


def test_a_task_has_a_prompt_and_an_answer_set(client: OpenAI, speech: SpeechLLM, wave: np.ndarray) -> None:
    messages = question(wav_bytes(wave))
    found = client.chat.completions.create(model="tiny", messages=messages, extra_body={"task": "count"})
    (expected,) = speech.answer([wave], [TASKS["count"].default_prompt], ["count"])
    assert found.choices[0].message.content == expected.texts[0] and expected.texts[0] in ("0", "1")
    assert found.choices[0].finish_reason == "stop"


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        ({"model": "whisper-1"}, 404, "the one that answers is 'tiny'"),
        ({"prompt": "Hello"}, 400, "prompt: .*at /v1/chat/completions"),
        ({"temperature": 0.5}, 400, "temperature: .*only 0"),
        ({"response_format": "diarized_json"}, 400, "response_format: .*'json', 'text', 'srt'"),
        ({"response_format": "srt", "stream": True}, 400, "^Error code: 400 - stream: only with response_format json"),
        ({"timestamp_granularities": ["word"]}, 400, "'segment'"),
        ({"include": ["logprobs"]}, 400, "include"),
        ({"extra_body": {"beams": "7"}}, 400, "beams: Extra inputs"),
        ({"file": ("a.wav", b"")}, 400, "file: cannot be read"),
        ({"file": ("a.wav", b"no audio")}, 400, "file: cannot be read: Format not recognised"),
        ({"file": ("a.wav", wav_bytes(np.zeros(16000)))}, 400, "file: digital silence"),
        ({"file": ("a.wav", wav_bytes(np.full(800, 0.1)))}, 400, "file: too short"),
        ({"file": ("a.wav", wav_bytes(np.full(16000, 0.1))[:9000])}, 400, "file: is cut short"),
        ({"file": ("/etc/passwd.gsm", b"no audio")}, 400, "file: cannot be read"),  # not opened by its suffix
    ],
)
def test_what_is_wrong_with_a_transcription_is_said(
    client: OpenAI, wave: np.ndarray, changed: dict[str, Any], status: int, message: str
) -> None:
    import openai

    asked = {"model": "tiny", "file": ("a.wav", wav_bytes(wave)), **changed}
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        client.audio.transcriptions.create(**asked)
    assert caught.value.status_code == status and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, r"messages\.0\.role: Input should be 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "0 input_audio parts"),
        ({"messages": question(b"", "What?") * 2}, "messages: List should have at most 1 item"),
        ({"messages": question(b"", "What?")}, "file: cannot be read"),
        ({"messages": question(wav_bytes(np.full(9000, 0.1)), 2001 * "a")}, "at most 2000 characters"),
        ({"messages": question(wav_bytes(np.full(9000, 0.1)), " ")}, "no text part to answer, and no task"),
        ({"extra_body": {"task": "song"}}, "task: one of asr, count"),
        ({"max_tokens": 3}, "answers are cut at 6"),
        ({"n": 2}, "n: Input should be 1"),
        ({"tools": []}, "tools: Extra inputs"),
    ],
)
def test_what_is_wrong_with_a_question_is_said(
    client: OpenAI, wave: np.ndarray, changed: dict[str, Any], message: str
) -> None:
    import openai

    asked = {"model": "tiny", "messages": question(wav_bytes(wave), CAPTION), **changed}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**asked)
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**asked, stream=True)


def test_bodies_that_are_no_requests(url: str, wave: np.ndarray) -> None:
    import httpx2

    messages = question(wav_bytes(wave), "\\ud800")
    lone = json.dumps({"model": "tiny", "messages": messages}).replace("\\\\ud800", "\\ud800")
    padded = question(wav_bytes(wave), CAPTION)
    padded[0]["content"][1]["input_audio"]["data"] += "!"
    json_type = {"content-type": "application/json"}
    for path, body, headers in (
        ("chat/completions", b"{", json_type),
        ("chat/completions", b"\xff", json_type),
        ("chat/completions", b"[" * 100_000, json_type),
        ("chat/completions", lone.encode(), json_type),
        ("chat/completions", json.dumps({"model": "tiny", "messages": padded}).encode(), json_type),
        ("audio/transcriptions", b"{}", json_type),
        ("audio/transcriptions", b"--x", {"content-type": "multipart/form-data; boundary=x"}),
        ("audio/transcriptions", b"--x", {"content-type": "multipart/form-data"}),
        ("audio/transcriptions", 30 * b"a=1&", {"content-type": "application/x-www-form-urlencoded"}),
    ):
        found = httpx2.post(f"{url}/v1/{path}", content=body, headers=headers)
        assert found.status_code == 400 and found.json()["error"]["message"], (path, body[:99], found.text)
    assert httpx2.get(f"{url}/v1/audio/transcriptions").status_code == 405
    assert httpx2.post(f"{url}/v1/embeddings").json()["error"]["message"] == "Not Found"
    assert httpx2.get(f"{url}/health").json() == {"status": "ok"}


def test_metrics_are_those_of_prometheus(url: str, client: OpenAI, wave: np.ndarray) -> None:
    before = metrics(url)
    client.audio.transcriptions.create(model="tiny", file=("a.wav", wav_bytes(wave)))
    after = metrics(url)
    assert after["pam_audio_seconds_total"] - before["pam_audio_seconds_total"] == pytest.approx(0.8)
    assert after["pam_batch_size_count"] == before["pam_batch_size_count"] + 1
    assert after["pam_decoding_seconds_total"] > before["pam_decoding_seconds_total"]
    assert after["pam_waiting"] == 0 and after["pam_places"] == 0
