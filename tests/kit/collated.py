"""A batch of silence as workers give it to ESPnet's trainer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

PROMPTS = {"asr": "Transcribe the speech.", "count": "How many people are speaking?"}
TEXTS = {"asr": "you have", "count": "2"}


def collated(model: Any, sizes: Sequence[int]) -> dict[str, Any]:
    """Clips of ``sizes`` samples, the tasks in turn."""
    from pam_espnet.llm.prompt_layout import answer_ids
    from pam_espnet.train.collate import PaMCollate
    from pam_espnet.train.iterator import prompt_bytes

    decoder, frontend = model.decoder, model.frontend
    collate = PaMCollate(decoder.tokenizer, decoder.system, frontend.frame_rate, frontend.sample_rate)
    utterances = []
    for index, size in enumerate(sizes):
        task = list(TEXTS)[index % 2]
        data = {
            "speech": np.zeros(size, np.float32), "num_samples": np.array([size]),
            "prompt": prompt_bytes(PROMPTS[task]), "text": np.array(answer_ids(decoder.tokenizer, TEXTS[task])),
            "task": np.array([model.tasks.index(task)]),
        }  # fmt: skip
        utterances.append((f"utt{index}", data))
    return collate(utterances)[1]
