"""Batches as the model takes them: sound and features as padded tensors, all else as numbers and strings of the host.

ESPnet's trainer moves the tensors of a batch to the device and leaves numbers and strings where they are. So the model
knows every length without reading it from the device, and what it needs there of prompts, answers and lengths is one
tensor, made in the processes that load data.

B utterances, N samples, T encoder frames, H layers, D width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from espnet2.train.collate_fn import common_collate_fn

from pam_espnet.frontend.frontend import output_lengths
from pam_espnet.llm.prompt_layout import PromptLayout, lay_out, layout
from pam_espnet.model import FEATURE_PREFIX


class PaMCollate:
    """Utterances as ``PaMPreprocessor`` gives them to a batch, see ``ESPnetPaMModel.forward``.

    Args:
        tokenizer, system: of the LLM.
        frame_rate, sample_rate: of the frontend, Hz.
    """

    def __init__(self, tokenizer: Any, system: str | None, frame_rate: float, sample_rate: int) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.frame_rate, self.sample_rate = frame_rate, sample_rate
        self._layouts: dict[str, PromptLayout] = {}  # of each wording; a template takes a millisecond

    def __call__(self, utterances: Sequence[tuple[str, dict[str, np.ndarray]]]) -> tuple[list[str], dict[str, Any]]:
        """Their keys, and the batch: ``speech`` (B,N) or ``feats_<encoder>`` (B,T,H*D) with lengths, ``num_samples``,
        ``prompt``, ``text``, ``task`` and ``layout``."""
        streams = [
            (key, {name: value for name, value in data.items() if name.startswith(("speech", FEATURE_PREFIX))})
            for key, data in utterances
        ]
        keys, batch = common_collate_fn(streams, float_pad_value=0.0)
        every = [data for _, data in utterances]
        prompts = [data["prompt"].astype(np.uint8).tobytes().decode("utf-8") for data in every]
        for prompt in set(prompts) - set(self._layouts):
            self._layouts[prompt] = layout(self.tokenizer, prompt, self.system)
        answers = [data["text"].tolist() for data in every]
        num_samples = [int(data["num_samples"][0]) for data in every]
        frames = output_lengths(torch.tensor(num_samples), self.frame_rate, self.sample_rate).tolist()
        batch.pop("speech_lengths", None)  # the same as num_samples
        batch |= {"num_samples": num_samples, "prompt": prompts, "text": answers}
        batch |= {"task": [int(data["task"][0]) for data in every]}
        return keys, {**batch, "layout": lay_out([self._layouts[prompt] for prompt in prompts], frames, answers)}
