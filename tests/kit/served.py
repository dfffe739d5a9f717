"""A server on loopback in a thread of the test, and what clients send it."""

from __future__ import annotations

import base64
import importlib.util
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from services import unavailable

if TYPE_CHECKING:
    from openai import OpenAI

    from pam_espnet.decode.speech_llm import SpeechLLM
    from pam_espnet.serve.limits import Limits


@contextmanager
def serving(speech: SpeechLLM, limits: Limits | None = None, key: str | None = None) -> Iterator[str]:
    """The URL of a server that answers with ``speech`` under the name "tiny"; it is stopped afterwards."""
    from pam_espnet.serve.limits import Limits
    from pam_espnet.serve.server import build_server

    server = build_server(speech, "tiny", limits or Limits(), key)
    thread = threading.Thread(target=server.run, name="serving")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def require_serve() -> None:
    """Skip a test, or fail it, where the server or its client is not installed."""
    for package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
        if importlib.util.find_spec(package) is None:
            unavailable("serve", f"{package} is not installed: tools/setup.sh --extras serve,clients")


@contextmanager
def asks(url: str, key: str = "none", timeout: float = 60) -> Iterator[OpenAI]:
    """OpenAI's client of a server; it asks once."""
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=timeout) as client:
        yield client


def metrics(url: str, key: str = "none") -> dict[str, float]:
    """What a server counts, read by Prometheus's own parser; names have no labels."""
    import httpx2
    from prometheus_client.parser import text_string_to_metric_families

    found = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}, timeout=60)
    families = text_string_to_metric_families(found.text)
    return {sample.name: sample.value for one in families for sample in one.samples}


def until(happened: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.01)


def wav_bytes(wave: np.ndarray, rate: int = 16000, audio_format: str = "WAV") -> bytes:
    """A file with ``wave`` (N,)."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, subtype="PCM_16", format=audio_format)
    return file.getvalue()


def question(wav: bytes, text: str | None = None) -> list[Any]:
    """Messages that ask ``text`` about a recording."""
    audio = {"data": base64.b64encode(wav).decode(), "format": "wav"}
    parts = [] if text is None else [{"type": "text", "text": text}]
    return [{"role": "user", "content": [*parts, {"type": "input_audio", "input_audio": audio}]}]
