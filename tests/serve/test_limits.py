"""What the server refuses before it reads, and what it gives back: places, connections, time."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from served import asks, metrics, question, require_serve, serving, until, wav_bytes

from pam_espnet.decode.speech_llm import SpeechLLM

pytestmark = pytest.mark.services
HEAD = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    require_serve()


@pytest.fixture
def wav(tone: Callable[..., np.ndarray]) -> bytes:
    return wav_bytes(tone(0.8, 440))


@pytest.fixture
def held(speech: SpeechLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The model does not begin to answer before this is set."""
    go, answer = threading.Event(), speech.answer

    def wait(*args: Any, **more: Any) -> Any:
        assert go.wait(60)
        return answer(*args, **more)

    monkeypatch.setattr(speech, "answer", wait)
    yield go
    go.set()


def limits(**changed: Any) -> Any:
    from pam_espnet.serve.limits import Limits

    return Limits(**changed)


def connect(url: str, text: str) -> socket.socket:
    """A connection over which ``text`` was sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(text.encode())
    return connection


def status(connection: socket.socket) -> int:
    """Of the response to it."""
    found = re.match(rb"HTTP/1.1 (\d+) ", connection.recv(65536))
    assert found is not None
    return int(found[1])


def test_a_key(speech: SpeechLLM, wav: bytes) -> None:
    import httpx2
    import openai

    with serving(speech, key="s3cret") as url:
        for key in ("wrong", "s3cret2", "s3cre"):
            with asks(url, key) as client, pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
                client.audio.transcriptions.create(model="tiny", file=("a.wav", wav))
        with asks(url, "s3cret") as client:
            assert client.audio.transcriptions.create(model="tiny", file=("a.wav", wav)).text
            assert client.models.list().data
        with connect(url, f"{HEAD}Authorization: Bearer gehe\u00edm\r\n\r\n") as strange:
            assert status(strange) == 401
        assert httpx2.get(f"{url}/metrics").status_code == 401
        assert httpx2.get(f"{url}/health").status_code == 200


def test_size_by_the_header_and_by_what_comes(speech: SpeechLLM, wav: bytes) -> None:
    import openai

    with serving(speech, limits(max_bytes=100_000)) as url:
        with connect(url, f"{HEAD}Content-Length: 100001\r\n\r\n") as unread:
            assert status(unread) == 413
        with connect(url, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n") as chunked:
            begin = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
            for part in (begin, *11 * [10_000 * b"a"]):
                chunked.sendall(b"%x\r\n%b\r\n" % (len(part), part))
            assert status(chunked) == 413
        for size in (100_001, 9_000_000):  # what is still under way must not hide the answer
            with asks(url) as client, pytest.raises(openai.APIStatusError, match="larger than 100000 bytes") as caught:
                client.chat.completions.create(model="tiny", messages=question(size * b"a", "Hi"))
            assert caught.value.status_code == 413
        with asks(url) as client:
            assert client.audio.transcriptions.create(model="tiny", file=("a.wav", wav)).text
        until(lambda: metrics(url)["pam_places"] == 0)


def test_seconds_before_anything_is_decoded(speech: SpeechLLM, tone: Callable[..., np.ndarray]) -> None:
    import openai

    with serving(speech, limits(max_seconds=2)) as url, asks(url) as client:
        with pytest.raises(openai.BadRequestError, match=r"file: too long: 2.10 s is more than 2 s"):
            client.audio.transcriptions.create(model="tiny", file=("a.wav", wav_bytes(tone(2.1, 300))))
        assert metrics(url)["pam_batch_size_count"] == 0
        assert client.audio.transcriptions.create(model="tiny", file=("a.wav", wav_bytes(tone(2.0, 300)))).text
    with serving(speech, limits(max_seconds=40)) as url, asks(url) as client:
        for kind in ("json", "srt"):
            file = ("a.flac", wav_bytes(tone(41, 300), audio_format="FLAC"))
            with pytest.raises(openai.BadRequestError, match=r"file: too long: 41.00 s is more than 40 s"):
                client.audio.transcriptions.create(model="tiny", file=file, response_format=kind)
        assert metrics(url)["pam_batch_size_count"] == 0


def test_places(speech: SpeechLLM, wav: bytes) -> None:
    """Half a request has one; others are told when to come again, and the client does."""
    import openai

    with serving(speech, limits(places=1)) as url:
        half = connect(url, f"{HEAD}Content-Length: 1000\r\n\r\n--x")
        until(lambda: metrics(url)["pam_places"] == 1)
        with asks(url) as client, pytest.raises(openai.RateLimitError, match="all 1 places are taken") as caught:
            client.audio.transcriptions.create(model="tiny", file=("a.wav", wav))
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with asks(url) as client, ThreadPoolExecutor() as pool:
            again = client.with_options(max_retries=3).audio.transcriptions
            late = pool.submit(lambda: again.create(model="tiny", file=("a.wav", wav)).text)
            half.close()
            assert late.result(60)
        until(lambda: metrics(url)["pam_places"] == 0)


def test_a_slow_upload_is_given_up(speech: SpeechLLM, wav: bytes) -> None:
    with serving(speech, limits(upload_seconds=0.5)) as url:
        with connect(url, f"{HEAD}Content-Length: 1000\r\n\r\n--x") as slow:
            assert status(slow) == 408
            until(lambda: metrics(url)["pam_places"] == 0)
        with asks(url) as client:
            assert client.audio.transcriptions.create(model="tiny", file=("a.wav", wav)).text


def test_an_answer_that_takes_too_long(speech: SpeechLLM, wav: bytes, held: threading.Event) -> None:
    import openai

    with serving(speech, limits(seconds=1)) as url, asks(url) as client:
        with ThreadPoolExecutor() as pool:
            asked = [
                pool.submit(client.audio.transcriptions.create, model="tiny", file=("a.wav", wav), stream=stream)
                for stream in (False, False, True)
            ]
            for one in asked:
                with pytest.raises(openai.InternalServerError, match="no answer within 1 s"):
                    one.result(30)
        until(lambda: metrics(url)["pam_places"] == metrics(url)["pam_waiting"] == 0)
        held.set()
        assert client.audio.transcriptions.create(model="tiny", file=("a.wav", wav)).text


def test_clients_that_go_away_free_their_places(speech: SpeechLLM, wav: bytes, held: threading.Event) -> None:
    import openai

    with serving(speech) as url:
        for stream in (False, True):
            with asks(url, timeout=1) as hasty, ThreadPoolExecutor() as pool:
                asked = [
                    pool.submit(hasty.audio.transcriptions.create, model="tiny", file=("a.wav", wav), stream=stream)
                    for _ in range(4)
                ]
                until(lambda: metrics(url)["pam_places"] == 4)
                for one in asked:
                    with pytest.raises(openai.APITimeoutError):
                        one.result(30)
            until(lambda: metrics(url)["pam_places"] == metrics(url)["pam_waiting"] == 0)
        held.set()
        with asks(url) as client:
            assert client.audio.transcriptions.create(model="tiny", file=("a.wav", wav)).text


def test_a_client_that_goes_away_in_the_middle_of_a_stream(
    speech: SpeechLLM, wav: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, left = threading.Event(), threading.Event()
    show, steps = speech._show, []

    def slow(on_partial: Any, found: Any) -> None:
        steps.append(found)
        show(on_partial, found)
        if found[0].settled:  # the client has something to read
            assert left.wait(30)

    monkeypatch.setattr(speech, "_show", slow)
    with serving(speech) as url, asks(url) as client:
        stream = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav), stream=True)
        assert next(iter(stream)).type == "transcript.text.delta"
        seen.set()
        before = len(steps)
        stream.close()
        until(lambda: metrics(url)["pam_places"] == 0)
        left.set()
        until(lambda: metrics(url)["pam_batch_size_count"] == 1)
        assert len(steps) == before + 1  # decoding has ended with it
        assert client.audio.transcriptions.create(model="tiny", file=("a.wav", wav)).text


def test_connections_without_a_request_are_closed(
    speech: SpeechLLM, wav: bytes, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pam_espnet.serve import server

    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    with serving(speech) as url:
        idle = [connect(url, text) for text in ("", "POST /v1", f"{HEAD}")]
        with asks(url) as client, ThreadPoolExecutor() as pool:
            asked = pool.submit(lambda: client.audio.transcriptions.create(model="tiny", file=("a.wav", wav)).text)
            for connection in idle:
                assert connection.recv(100) == b""  # closed
            held.set()
            assert asked.result(30)  # one that waits for its answer is not


def test_stopping_answers_what_is_there(speech: SpeechLLM, wav: bytes, held: threading.Event) -> None:
    def ask(url: str) -> str:
        with asks(url) as client:
            return client.audio.transcriptions.create(model="tiny", file=("a.wav", wav)).text

    with ThreadPoolExecutor() as pool:
        with serving(speech) as url:
            asked = pool.submit(ask, url)
            until(lambda: metrics(url)["pam_places"] == 1)
            threading.Timer(0.5, held.set).start()
        assert asked.result(30)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("serving", "decoding", "reading"))]
