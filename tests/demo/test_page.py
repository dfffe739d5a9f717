"""The page through gradio's own client, as programs use it."""

from pathlib import Path

import numpy as np
import pytest
from shown_page import require_gradio, showing

from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.demo.answering import Answering
from pam_espnet.errors import ConfigError

PROMPT = "Describe the sounds."
pytestmark = pytest.mark.services


def test_each_model_answers_under_its_own_name(
    plain: Answering, exiting: Answering, model: SpeechLLM, wav: Path, wave: np.ndarray
) -> None:
    require_gradio()
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    with showing({"plain": plain, "gone": ConfigError("gone: no such package"), "exiting": exiting}) as url:
        client = Client(url, verbose=False)
        text, encoders, layers, alternatives, depths = client.predict(handle_file(str(wav)), PROMPT, api_name="/answer")
        assert text == model.answer([wave], [PROMPT])[0].texts[0]
        assert {one["label"] for one in encoders["confidences"]} == {"one", "two"}
        assert len(layers["confidences"]) == 4 and len(alternatives["confidences"]) == 2 and depths == []
        *_, depths = client.predict(handle_file(str(wav)), PROMPT, api_name="/answer_2")
        assert {one["class_or_confidence"] for one in depths} == {"1", "2"}
        for path, prompt, words in ((None, PROMPT, "record or upload"), (handle_file(str(wav)), " ", "ask something")):
            with pytest.raises(AppError, match=f"^exiting: {words}"):
                client.predict(path, prompt, api_name="/answer_2")
