"""Two hundred requests, many at once, a third of them broken, too large, too long, slow, cut off or left: the good ones
get the answers that they get alone, and afterwards nothing is left of any."""

from __future__ import annotations

import gc
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from served import asks, metrics, question, require_serve, serving, until, wav_bytes
from synthetic_voice import hiss, voice

from pam_espnet.data.tasks import TASKS
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.decode.subtitles import to_srt

if TYPE_CHECKING:
    from openai import OpenAI

pytestmark = pytest.mark.services
REQUESTS, AT_ONCE, PLACES = 200, 24, 16
MOST_BYTES, MOST_SECONDS = 200_000, 20
PROMPTS = [spec.default_prompt for spec in TASKS.values()] + ["What is this?"]
WATCHED = ("pam_espnet.serve.", "pam_espnet.decode.", "starlette.", "fastapi.", "uvicorn.", "concurrent.futures.")


class Sender:
    """Sends requests by their number, each of which is of one kind, and returns what came of it."""

    def __init__(self, url: str, client: OpenAI, files: list[bytes], talk: bytes) -> None:
        self.url, self.files, self.talk = url, files, talk
        self.client = client.with_options(max_retries=100)  # where no place is free
        self.long = wav_bytes(np.full(16000 * (MOST_SECONDS + 1), 0.1), audio_format="FLAC")

    def send(self, number: int) -> str:
        """The answer of a good one; of another its HTTP status, or "" where it does not wait for one."""
        if number % 3:
            return self._good(number)
        bad = (self._broken, self._large, self._too_long, self._slow, self._cut_off, self._hasty)
        return bad[number // 3 % len(bad)](number)

    def _good(self, number: int) -> str:
        kind, file = number % 5, self.files[number % len(self.files)]
        transcribe: Any = self.client.audio.transcriptions.create
        chat: Any = self.client.chat.completions.create
        messages = question(file, PROMPTS[number % len(PROMPTS)])
        if kind == 0:
            return str(transcribe(model="tiny", file=("a.wav", file)).text)
        if kind == 1:
            events = transcribe(model="tiny", file=("a.wav", file), stream=True)
            return "".join(one.delta for one in events if one.type == "transcript.text.delta")
        if kind == 2:
            return str(chat(model="tiny", messages=messages).choices[0].message.content)
        if kind == 3:
            chunks = chat(model="tiny", messages=messages, stream=True)
            return "".join(one.choices[0].delta.content or "" for one in chunks)
        return str(transcribe(model="tiny", file=("a.wav", self.talk), response_format="srt"))

    def _status(self, file: bytes) -> str:
        import openai

        with pytest.raises(openai.APIStatusError) as caught:
            self.client.audio.transcriptions.create(model="tiny", file=("a.wav", file))
        return str(caught.value.status_code)

    def _broken(self, number: int) -> str:
        return self._status(self.files[0][: 2000 + number])

    def _large(self, number: int) -> str:
        return self._status((MOST_BYTES + number) * b"x")

    def _too_long(self, number: int) -> str:
        return self._status(self.long)

    def _part(self, size: int) -> socket.socket:
        """A connection with the first ``size`` bytes of a file, and a few more."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        connection.sendall(f"{head}Content-Length: {MOST_BYTES}\r\n\r\n".encode() + form + size * b"x")
        return connection

    def _slow(self, number: int) -> str:
        while True:
            with self._part(1000) as connection:
                if (status := connection.recv(12)[9:].decode()) != "429":
                    return status
            time.sleep(0.5)

    def _cut_off(self, number: int) -> str:
        self._part(100_000).close()
        return ""

    def _hasty(self, number: int) -> str:
        import httpx2
        import openai

        hasty: Any = self.client.with_options(timeout=0.1, max_retries=0).audio.transcriptions.create
        with (
            suppress(openai.APIError, httpx2.TimeoutException),  # or a part of it came in time
            hasty(model="tiny", file=("a.wav", self.files[0]), stream=True) as events,
        ):
            next(iter(events))
        return ""


def live() -> Counter[str]:
    """Objects of the server by their class. Not the process's memory: torch keeps some for every new shape of a batch
    (about half of it oneDNN's cache of primitives), none when a shape comes again, and batches are up to chance."""
    gc.collect()
    kinds = (type(one) for one in gc.get_objects())
    return Counter(f"{one.__module__}.{one.__qualname__}" for one in kinds if str(one.__module__).startswith(WATCHED))


def test_two_hundred_requests(
    speech: SpeechLLM, tone: Callable[..., np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_serve()
    from pam_espnet.serve.limits import Limits

    waves = [np.round(tone(0.4 + 0.1 * i, 200 + 70 * i) * 32768).astype(np.float32) / 32768 for i in range(7)]
    files = [wav_bytes(wave) for wave in waves]
    soundfile.write(tmp_path / "talk.wav", np.concatenate([hiss(0.5), voice(0.9), hiss(0.5)]), 16000)
    subtitles = to_srt(speech.transcribe(tmp_path / "talk.wav"))
    assert subtitles.count("-->") == 1

    def alone(number: int) -> str:
        if number % 5 == 4:
            return subtitles
        prompt, task = (TASKS["asr"].default_prompt, "asr") if number % 5 < 2 else (PROMPTS[number % len(PROMPTS)], "")
        return speech.answer([waves[number % len(waves)]], [prompt], [task])[0].texts[0]

    good = [number for number in range(REQUESTS) if number % 3]
    expected = {number: alone(number) for number in good}
    threads = threading.active_count()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    limits = Limits(MOST_BYTES, MOST_SECONDS, PLACES, upload_seconds=3)
    talk = (tmp_path / "talk.wav").read_bytes()
    with serving(speech, limits) as url, ThreadPoolExecutor(AT_ONCE) as pool:

        def send(count: int) -> list[str]:
            with asks(url) as client:
                return list(pool.map(Sender(url, client, files, talk).send, range(count)))

        send(2 * AT_ONCE)  # until what is kept is there
        until(lambda: live()["pam_espnet.serve.server.Connection"] == 0, 60)
        before = live()
        found = send(REQUESTS)
        until(lambda: not live() - before, 60)
        counts = metrics(url)
        assert counts["pam_places"] == counts["pam_waiting"] == 0
    assert [(number, found[number]) for number in good if found[number] != expected[number]] == []
    bad = Counter(found[number] for number in range(0, REQUESTS, 3))
    assert bad == {"400": 12 + 11, "413": 11, "408": 11, "": 11 + 11}
    assert counts["pam_batch_size_sum"] > counts["pam_batch_size_count"]  # some were decoded together
    until(lambda: threading.active_count() == threads)
    assert os.listdir(tmp_path / "temporary") == []
