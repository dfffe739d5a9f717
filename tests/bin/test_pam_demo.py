"""The page in a browser: its answers, and its messages when there is none."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from services import unavailable

import pam_espnet
from pam_espnet.bin.pam_demo import build_page, main, respond
from pam_espnet.errors import ConfigError, DataError

PROMPT = "Describe the sounds."


def test_it_answers_as_the_model_does(exp: Path, wave: np.ndarray, tmp_path: Path) -> None:
    model = pam_espnet.load(exp, options=exp / "decode.yaml")
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="PCM_16")
    text, weights = respond(model, str(tmp_path / "a.wav"), PROMPT, 30.0)
    (expected,) = model.answer([np.round(wave * 32768).astype(np.float32) / 32768], [PROMPT])
    assert text == expected.texts[0]
    assert set(weights) == {"one", "two"} and sum(weights.values()) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ConfigError, match="record or upload"):
        respond(model, None, PROMPT, 30.0)
    with pytest.raises(ConfigError, match="ask something"):
        respond(model, str(tmp_path / "a.wav"), " ", 30.0)
    with pytest.raises(DataError, match="too long"):
        respond(model, str(tmp_path / "a.wav"), PROMPT, 0.5)


def test_without_gradio_the_error_names_how_to_get_it(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"tools/setup\.sh --extras demo"):
        main(["--model", str(exp)])


@pytest.mark.services
def test_through_its_own_client(exp: Path, wave: np.ndarray, tmp_path: Path) -> None:
    if importlib.util.find_spec("gradio") is None:
        unavailable("gradio", "gradio is not installed: tools/setup.sh --extras demo")
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    model = pam_espnet.load(exp, options=exp / "decode.yaml")
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="PCM_16")
    page = build_page(model, 30.0)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False)
        text, weights = client.predict(handle_file(str(tmp_path / "a.wav")), PROMPT, api_name="/answer")
        assert text == respond(model, str(tmp_path / "a.wav"), PROMPT, 30.0)[0]
        assert {one["label"] for one in weights["confidences"]} == {"one", "two"}
        with pytest.raises(AppError, match="record or upload"):
            client.predict(None, PROMPT, api_name="/answer")
    finally:
        page.close()
