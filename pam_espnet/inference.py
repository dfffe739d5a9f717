"""A trained experiment that answers prompts about audio.

Dimension letters: B utterances, N samples, U adapter frames, P prefix positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pam_espnet.build import build_model
from pam_espnet.checkpoint import MODEL_FILE, load_strict, read_trained
from pam_espnet.config import load_yaml
from pam_espnet.data.tables import one_line
from pam_espnet.espnet_model import ESPnetPaMModel
from pam_espnet.search.beam import beam_search
from pam_espnet.search.options import BeamOptions


@dataclass
class Answer:
    """The n-best answers to one utterance, best first, and how its encoders were combined."""

    texts: list[str]
    tokens: list[list[int]]
    scores: list[float]
    routing: dict[str, Any]


class SpeechLLM:
    """A trained model that answers prompts about audio.

    Args:
        model: built and loaded.
        options: of the beam search; ``max_new_tokens`` is a cap for every utterance.
        device: a torch device.
    """

    def __init__(self, model: ESPnetPaMModel, options: BeamOptions, device: str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.options = options
        self.device = device

    @classmethod
    def load(
        cls, exp_dir: str | Path, options: BeamOptions, device: str = "cpu", dtype: str | None = None
    ) -> SpeechLLM:
        """Build from ``config.yaml`` and load ``model.safetensors`` strictly.

        Args:
            exp_dir: experiment directory.
            options: see ``BeamOptions``.
            device: "cpu", "cuda", ...
            dtype: precision of the LLM in place of the configured one.

        Raises:
            ConfigError, CheckpointError: what is missing or does not fit, and which stage makes it.
        """
        config = load_yaml(Path(exp_dir) / "config.yaml")
        if dtype is not None:
            config["llm_conf"] = {**(config.get("llm_conf") or {}), "dtype": dtype}
        model = build_model(config)
        checkpoint = Path(exp_dir) / MODEL_FILE
        load_strict(model, read_trained(checkpoint), checkpoint)
        return cls(model, options, device)

    @torch.no_grad()
    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Answer one prompt per waveform (each (N,) float32 at the frontend's sample rate)."""
        lengths = torch.tensor([len(wave) for wave in waves])
        batch = torch.zeros(len(waves), int(lengths.max()))
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        audio = self.model.audio_embeddings(prompts, lengths.to(self.device), batch.to(self.device))
        placed = self.model.place(prompts, audio, None)
        nbest = beam_search(self.model.decoder, placed.embeds, placed.prefix_lengths, self.options)
        tokenizer, end = self.model.decoder.tokenizer, set(self.model.decoder.eos_ids)
        answers = []
        for b, hypotheses in enumerate(nbest):
            tokens = [[t for t in one.tokens if t not in end] for one in hypotheses]
            answers.append(
                Answer(
                    texts=[one_line(tokenizer.decode(t, skip_special_tokens=True)) for t in tokens],
                    tokens=[list(one.tokens) for one in hypotheses],
                    scores=[one.score for one in hypotheses],
                    routing=self._routing(audio.routing, b),
                )
            )
        return answers

    def _routing(self, routing: Any, b: int) -> dict[str, Any]:
        def numbers(row: Tensor) -> list[float]:
            return [round(value, 6) for value in row.tolist()]

        names = self.model.frontend.names
        return {
            "expert": int(routing.expert[b]),
            "expert_probs": numbers(routing.expert_probs[b]),
            "encoders": dict(zip(names, numbers(routing.encoder_weights[b]), strict=True)),
            "layers": {name: numbers(w[b]) for name, w in zip(names, routing.layer_weights, strict=True)},
        }
