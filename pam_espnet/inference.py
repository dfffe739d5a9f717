"""A trained experiment that answers prompts about audio.

Dimension letters: B utterances, N samples, U adapter frames, P prefix positions, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pam_espnet.answering import AnswerOptions
from pam_espnet.build import build_model
from pam_espnet.checkpoint import MODEL_FILE, load_strict, read_trained
from pam_espnet.config import load_yaml
from pam_espnet.data.tables import one_line
from pam_espnet.decoder.llm import LLMDecoder
from pam_espnet.decoder.prompt_layout import answer_ids
from pam_espnet.decoder.restricted import RestrictedDecoder
from pam_espnet.errors import ConfigError
from pam_espnet.espnet_model import ESPnetPaMModel
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import AnswerSet, Constraint, NoRepeatNgram


@dataclass
class Answer:
    """The n-best answers to one utterance, best first, with the block of the LLM that named each token; how its
    encoders were combined; which constraints fired."""

    texts: list[str]
    tokens: list[list[int]]
    scores: list[float]
    depths: list[list[int]]
    routing: dict[str, Any]
    constraints: dict[str, int]


class SpeechLLM:
    """A trained model that answers prompts about audio.

    Args:
        model: built and loaded.
        options: how answers are decoded.
        device: a torch device.

    Raises:
        ConfigError: a task vocabulary is asked for, but the model has no list of the training answers' tokens, or the
            list lacks tokens of an answer set.
    """

    def __init__(self, model: ESPnetPaMModel, options: AnswerOptions, device: str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.options = options
        self.device = device
        self.decoder: LLMDecoder | RestrictedDecoder = model.decoder
        if options.task_vocabulary:
            if model.ctc is None:
                raise ConfigError("task_vocabulary: this model was trained without the warm start's list of tokens")
            self.decoder = RestrictedDecoder(model.decoder, model.ctc.token_ids.tolist())
        model.decoder.exit_early(options.exit, self.decoder.logits)
        self._answer_sets = {
            task: [self._to_places(answer_ids(model.decoder.tokenizer, answer)[:-1]) for answer in answers]
            for task, answers in options.answer_sets.items()
        }

    @classmethod
    def load(
        cls, exp_dir: str | Path, options: AnswerOptions, device: str = "cpu", dtype: str | None = None
    ) -> SpeechLLM:
        """Build from ``config.yaml`` and load ``model.safetensors`` strictly.

        Args:
            exp_dir: experiment directory.
            options: see ``AnswerOptions``.
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
    def answer(
        self, waves: Sequence[np.ndarray], prompts: Sequence[str], tasks: Sequence[str] | None = None
    ) -> list[Answer]:
        """Answer one prompt per waveform.

        Args:
            waves: each (N,) float32 at the frontend's sample rate.
            prompts: as many.
            tasks: as many names; without them no answer set applies.
        """
        lengths = torch.tensor([len(wave) for wave in waves])
        batch = torch.zeros(len(waves), int(lengths.max()))
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        audio = self.model.audio_embeddings(prompts, lengths.to(self.device), batch.to(self.device))
        placed = self.model.place(prompts, audio, None)
        constraints = self._constraints(tasks or [])
        nbest = beam_search(
            self.decoder,
            placed.embeds,
            placed.prefix_lengths,
            self.options.beam,
            self.options.length_caps((lengths / self.model.frontend.sample_rate).tolist()),
            constraints=constraints,
        )
        tokenizer, end = self.model.decoder.tokenizer, set(self.model.decoder.eos_ids)
        answers = []
        for b, hypotheses in enumerate(nbest):
            tokens = [self._to_ids(one.tokens) for one in hypotheses]
            fired: Counter[str] = Counter({"length_cap": int(not hypotheses[0].ended)})
            for constraint in constraints:
                fired[constraint.name] += constraint.fired[b]
            answers.append(
                Answer(
                    texts=[
                        one_line(tokenizer.decode([t for t in one if t not in end], skip_special_tokens=True))
                        for one in tokens
                    ],
                    tokens=tokens,
                    scores=[one.score for one in hypotheses],
                    depths=[one.depths for one in hypotheses],
                    routing=self._routing(audio.routing, b),
                    constraints={name: times for name, times in fired.items() if times},
                )
            )
        return answers

    def _constraints(self, tasks: Sequence[str]) -> list[Constraint]:
        found: list[Constraint] = []
        if self.options.no_repeat_ngram:
            found.append(NoRepeatNgram(self.options.no_repeat_ngram))
        for task, answers in self._answer_sets.items():
            if places := [place for place, name in enumerate(tasks) if name == task]:
                found.append(AnswerSet(answers, self.decoder.eos_ids, places))
        return found

    def _to_places(self, ids: list[int]) -> list[int]:
        return self.decoder.places(ids) if isinstance(self.decoder, RestrictedDecoder) else ids

    def _to_ids(self, tokens: list[int]) -> list[int]:
        return self.decoder.ids[tokens].tolist() if isinstance(self.decoder, RestrictedDecoder) else list(tokens)

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
