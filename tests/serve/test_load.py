"""Two hundred requests at once, a third of which are broken, too large, slow, cut off or left: the good ones get the
answers that they get alone, and afterwards nothing is left of any."""

from __future__ import annotations

import gc
import os
import socket
import tempfile
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from served import asks, metrics, question, require_serve, serving, until, wav_bytes

from pam_espnet.data.tasks import TASKS
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.serve.queue import Job

pytestmark = pytest.mark.services
REQUESTS, AT_ONCE, PLACES = 200, 40, 16
MOST_BYTES, PADDING = 1_500_000, 600_000
MOST_GROWTH = 8 << 20  # bytes; the good requests alone send ten times as much
PROMPTS = [spec.default_prompt for spec in TASKS.values()] + ["What is this?"]


def padded(wave: np.ndarray) -> bytes:
    """A WAV file with ``PADDING`` bytes behind its samples."""
    return wav_bytes(wave) + b"junk" + PADDING.to_bytes(4, "little") + PADDING * b"x"


class Client:
    """Sends request ``number`` and returns what came of it: a kind, and the answer of a good one."""

    def __init__(self, url: str, waves: list[np.ndarray]) -> None:
        self.url, self.waves = url, waves
        self.files = [padded(wave) for wave in waves]

    def send(self, number: int) -> tuple[str, str | None]:
        if number % 3:
            return self._good(number)
        bad = (self._broken, self._large, self._long, self._slow, self._cut_off, self._hasty)
        return bad[number // 3 % len(bad)](number)

    def _good(self, number: int) -> tuple[str, str | None]:
        file, prompt = self.files[number % len(self.files)], PROMPTS[number % len(PROMPTS)]
        with asks(self.url) as client:
            client = client.with_options(max_retries=100)
            kind = number % 4
            if kind < 2:
                transcribe: Any = client.audio.transcriptions.create
                found = transcribe(model="tiny", file=("a.wav", file), stream=kind == 1)
                text = "".join(one.delta for one in found if "delta" in one.type) if kind == 1 else found.text
            else:
                messages = question(file, prompt)
                chat: Any = client.chat.completions.create(model="tiny", messages=messages, stream=kind == 3)
                if kind == 3:
                    text = "".join(one.choices[0].delta.content or "" for one in chat)
                else:
                    text = chat.choices[0].message.content
        return "good", text

    def _status(self, file: bytes) -> tuple[str, None]:
        import openai

        with asks(self.url) as client:
            again = client.with_options(max_retries=100)
            with pytest.raises(openai.APIStatusError) as caught:
                again.audio.transcriptions.create(model="tiny", file=("a.wav", file))
        return str(caught.value.status_code), None

    def _broken(self, number: int) -> tuple[str, None]:
        return self._status(self.files[0][: 2000 + number])

    def _large(self, number: int) -> tuple[str, None]:
        return self._status((MOST_BYTES + number) * b"x")

    def _long(self, number: int) -> tuple[str, None]:
        return self._status(wav_bytes(np.full(16000 * 21, 0.1)))

    def _raw(self, length: int, sent: int) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        connection.sendall(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + sent * b"x")
        return connection

    def _slow(self, number: int) -> tuple[str, None]:
        with self._raw(500_000, 1000) as connection:
            return connection.recv(12)[9:].decode(), None

    def _cut_off(self, number: int) -> tuple[str, None]:
        self._raw(500_000, 100_000).close()
        return "cut off", None

    def _hasty(self, number: int) -> tuple[str, None]:
        import openai

        with asks(self.url, timeout=0.05) as client, suppress(openai.APIError):  # or it is answered in time
            client.audio.transcriptions.create(model="tiny", file=("a.wav", self.files[0]), stream=True)
        return "hasty", None


def memory() -> int:
    """Bytes that Python and numpy hold: requests, recordings, answers. (torch keeps more for each new shape.)"""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_two_hundred_requests(speech: SpeechLLM, tone: Callable[..., np.ndarray]) -> None:
    require_serve()
    from pam_espnet.serve.limits import Limits

    waves = [np.round(tone(0.4 + 0.13 * i, 200 + 70 * i) * 32768).astype(np.float32) / 32768 for i in range(9)]
    asked = [*dict.fromkeys(PROMPTS)]
    alone = {
        (index, prompt, task): speech.answer([wave], [prompt], [task])[0].texts[0]
        for index, wave in enumerate(waves)
        for prompt, task in [(TASKS["asr"].default_prompt, "asr"), *((prompt, "") for prompt in asked)]
    }

    def expected(number: int) -> str:
        if number % 4 < 2:
            return alone[number % len(waves), TASKS["asr"].default_prompt, "asr"]
        return alone[number % len(waves), PROMPTS[number % len(PROMPTS)], ""]

    threads, temporary = threading.active_count(), set(os.listdir(tempfile.gettempdir()))
    limits = Limits(MOST_BYTES, max_seconds=20, places=PLACES, upload_seconds=3)
    with serving(speech, limits) as url:
        client = Client(url, waves)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(client.send, range(REQUESTS // 4)))  # until buffers have their size
        before = memory()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(client.send, range(REQUESTS)))
        until(lambda: metrics(url)["pam_places"] == metrics(url)["pam_waiting"] == 0)
        counts = metrics(url)
        assert memory() - before < MOST_GROWTH
    wrong = [(number, text) for number, (kind, text) in enumerate(found) if kind == "good" and text != expected(number)]
    assert wrong == []
    kinds = Counter(kind for kind, _ in found)
    assert kinds["good"] == REQUESTS - len(range(0, REQUESTS, 3))
    assert (
        kinds["400"] == 23
        and kinds["413"] == 11
        and set(kinds) <= {"good", "400", "413", "408", "429", "cut off", "hasty"}
    )
    assert counts["pam_batch_size_sum"] > counts["pam_batch_size_count"]  # some were decoded together
    gc.collect()  # a job and its callbacks know each other
    assert not [one for one in gc.get_objects() if isinstance(one, Job)]
    assert threading.active_count() == threads
    assert not [name for name in set(os.listdir(tempfile.gettempdir())) - temporary if name.startswith("pam_serve_")]
