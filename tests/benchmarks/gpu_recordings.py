"""From recordings to answers, all with random weights: encoders of the sizes of Whisper-large-v3, WavLM-large and
wav2vec2-large, adapters, the benchmark's LLM.
"""

from typing import Any

import numpy as np
from benchmarks.gpu_rows import Rows
from benchmarks.gpu_searches import Searches
from random_encoders import LARGE, SMALL, random_frontend

from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.model import ESPnetPaMModel

SECONDS, BATCH = 12.0, 32
PROMPT = "Transcribe the speech."


def measure(searches: Searches, rows: Rows, tiny: bool) -> None:
    """Seconds of audio per second, and what of the time encoders take."""
    seconds, batch, tokens = (1.0, 3, searches.tokens) if tiny else (SECONDS, BATCH, searches.tokens)
    frontend = random_frontend(searches.llm.width, searches.device, SMALL if tiny else LARGE)
    model = ESPnetPaMModel(frontend, searches.llm, ("asr",)).to(searches.device).eval()
    rng = np.random.default_rng(1)
    waves = [0.1 * rng.standard_normal(int(16000 * seconds)).astype(np.float32) for _ in range(batch)]
    prompts = [PROMPT] * batch
    precision = str(next(frontend.encoder(frontend.names[0]).parameters()).dtype).removeprefix("torch.")
    options: dict[str, Any] = {"beam_size": 4, "max_new_tokens": tokens, "min_new_tokens": tokens, "graphs": "on"}
    for invariant in (True, False):  # recordings encoded one by one, or together
        chosen = AnswerOptions.from_dict({**options, "batch_invariant": invariant})
        answerer = SpeechLLM(model, chosen, searches.device)
        answerer.answer(waves, prompts)
        encoders = min(searches.milliseconds(lambda one=answerer: one.encode(waves, prompts)) for _ in range(2))
        whole = min(searches.milliseconds(lambda one=answerer: one.answer(waves, prompts)) for _ in range(2))
        rows.add(
            "recordings", batch_invariant=invariant, batch=batch, seconds_each=seconds, beam=4, tokens=tokens,
            encoders=precision, audio_s_per_s=round(1000 * seconds * batch / whole, 1), ms_all=whole,
            ms_encoders=encoders,
        )  # fmt: skip
        answerer.release()
        del answerer
        searches.tidy()
