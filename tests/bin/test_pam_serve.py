"""The server as a command: its options, its key, how it stops."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from served import asks, metrics, require_serve, until, wav_bytes

from pam_espnet.bin.pam_serve import main
from pam_espnet.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--places", "0"], "--places"),
        (["--port", "70000"], "--port"),
        (["--timeout", "0"], "--timeout"),
        (["--max_mb", "-1"], "--max_mb"),
        (["--max_seconds", "0.05"], "--max_seconds"),
        (["--key_file", "nowhere"], "--key_file nowhere: cannot be read"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--model", "none", *words])


@pytest.mark.parametrize("content", ["", "two words", "geh\u00e4im"])
def test_a_key_is_one_word(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="must hold one word"):
        main(["--model", "none", "--key_file", str(tmp_path / "key")])


def test_without_its_packages_the_error_names_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pam_espnet.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError, match=r"tools/setup\.sh --extras serve"):
        main(["--model", "none"])


@pytest.mark.services
def test_a_signal_stops_it_when_its_requests_are_answered(exp: Path, wave: np.ndarray, tmp_path: Path) -> None:
    require_serve()
    (tmp_path / "key").write_text("s3cret\n")
    words = ["--model", str(exp), "--config", str(exp / "decode.yaml"), "--name", "mine", "--port", "0"]
    command = [sys.executable, "-m", "pam_espnet.bin.pam_serve", *words, "--key_file", str(tmp_path / "key")]
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "kit")])
    environment = {**os.environ, "PYTHONPATH": path}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def logged(pattern: str) -> str:
        assert server.stderr is not None
        while (found := re.search(pattern, line := server.stderr.readline())) is None:
            assert line, "it has ended"
        return found[1]

    try:
        url = logged(r"running on (http://127\.0\.0\.1:\d+)")
        with asks(url, "s3cret") as client:
            body = wav_bytes(wave)
            assert client.audio.transcriptions.create(model="mine", file=("a.wav", body)).text
            until(lambda: metrics(url, "s3cret")["pam_places"] == 0, 60)
            host, port = url.removeprefix("http://").split(":")
            head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\n"
            form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nmine\r\n--x\r\n'
            form += b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + body + b"\r\n--x--\r\n"
            with socket.create_connection((host, int(port)), timeout=60) as half:
                kind = f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(form)}\r\n\r\n"
                half.sendall((head + kind).encode() + form[:100])
                until(lambda: metrics(url, "s3cret")["pam_places"] == 1, 60)  # else it is an idle connection
                server.send_signal(signal.SIGTERM)
                logged("(Waiting for connections)")  # and no longer accepting any
                with pytest.raises(OSError, match="refused"):
                    socket.create_connection((host, int(port)), timeout=60)
                half.sendall(form[100:])
                assert half.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()
