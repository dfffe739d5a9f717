"""A trained experiment that answers prompts about audio.

Dimension letters: B utterances, N samples, U adapter frames, P prefix positions, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
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
from pam_espnet.decoder.prompt_layout import answer_ids
from pam_espnet.decoder.view import DecoderView
from pam_espnet.errors import ConfigError
from pam_espnet.espnet_model import ESPnetPaMModel
from pam_espnet.search.answer_scores import answer_log_probs
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import AnswerSet, Constraint, NoRepeatNgram


@dataclass
class Answer:
    """The n-best answers to one utterance, best first, with the block of the LLM that named each token; how its
    encoders were combined; which constraints fired and how often (over steps and hypotheses; ``length_cap`` is 1 where
    the best answer was cut)."""

    texts: list[str]
    tokens: list[list[int]]
    scores: list[float]
    depths: list[list[int]]
    routing: dict[str, Any]
    constraints: dict[str, int]
    answer_log_probs: dict[str, float] | None = None  # of every answer, where the task has a set of them


class SpeechLLM:
    """A trained model that answers prompts about audio.

    Args:
        model: built and loaded.
        options: how answers are decoded.
        device: a torch device.

        vocabulary_tasks: tasks whose answers the task vocabulary was made from; None for all.

    Raises:
        ConfigError: a task vocabulary is asked for, but the model has no list of the training answers' tokens, or the
            list lacks tokens of an answer set; an answer that is longer than ``max_new_tokens``.
    """

    def __init__(
        self,
        model: ESPnetPaMModel,
        options: AnswerOptions,
        device: str = "cpu",
        vocabulary_tasks: Collection[str] | None = None,
    ) -> None:
        self.model = model.to(device).eval()
        self.options = options
        self.device = device
        self.vocabulary_tasks = vocabulary_tasks
        if options.task_vocabulary and model.ctc is None:
            raise ConfigError("task_vocabulary: this model was trained without the warm start's list of tokens")
        vocabulary = model.ctc.token_ids.tolist() if options.task_vocabulary and model.ctc is not None else None
        self.decoder = DecoderView(model.decoder, vocabulary, options.exit)
        model.decoder.fused_blocks()  # now, or the first batch would be charged for it
        self._answer_sets = {
            task: [self.decoder.places(answer_ids(model.decoder.tokenizer, answer)[:-1]) for answer in answers]
            for task, answers in options.answer_sets.items()
        }
        for task, answers in self._answer_sets.items():
            if (longest := max(map(len, answers)) + 1) > options.beam.max_new_tokens:
                raise ConfigError(f"answer_sets.{task}: an answer needs {longest} tokens; raise max_new_tokens")

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
        warm_start = config.get("warm_start_conf") or {}
        return cls(model, options, device, warm_start.get("losses"))

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
        tasks = tasks or [""] * len(waves)
        known = self.vocabulary_tasks if self.options.task_vocabulary else None
        if known is not None and (strange := sorted(set(tasks) - set(known))):
            made_of, asked = ", ".join(known), ", ".join(strange) or "no task"
            raise ConfigError(f"task_vocabulary: it was made from answers of {made_of}, not of {asked}")
        caps = self.options.length_caps((lengths / self.model.frontend.sample_rate).tolist())
        if caps is not None:  # one of a set of answers is never cut
            sets = [self._answer_sets.get(task, [[]]) for task in tasks]
            caps = [max(cap, 1 + max(map(len, answers))) for cap, answers in zip(caps, sets, strict=True)]
        constraints = self._constraints(tasks)
        nbest = beam_search(
            self.decoder, placed.embeds, placed.prefix_lengths, self.options.beam, caps, constraints=constraints
        )
        log_probs = self._answer_log_probs(tasks, placed.embeds, placed.prefix_lengths)
        tokenizer, end = self.model.decoder.tokenizer, set(self.model.decoder.eos_ids)
        answers = []
        for b, hypotheses in enumerate(nbest):
            if not hypotheses:
                raise ConfigError(f"the decoding options leave no answer to {prompts[b]!r}: {self.options}")
            tokens = [self.decoder.tokens(one.tokens) for one in hypotheses]
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
                    answer_log_probs=log_probs.get(b),
                )
            )
        return answers

    def _answer_log_probs(self, tasks: Sequence[str], prefix: Tensor, lengths: Tensor) -> dict[int, dict[str, float]]:
        """Place in the batch -> log-probability of each answer, where the task has a set of answers."""
        found = {}
        for task, answers in self._answer_sets.items():
            if rows := [place for place, name in enumerate(tasks) if name == task]:
                own = lengths[rows]
                temperature = self.options.beam.temperature
                scores = answer_log_probs(self.decoder, prefix[rows, : int(own.max())], own, answers, temperature)
                names = self.options.answer_sets[task]
                for row, values in zip(rows, scores.tolist(), strict=True):
                    found[row] = {name: round(value, 6) for name, value in zip(names, values, strict=True)}
        return found

    def _constraints(self, tasks: Sequence[str]) -> list[Constraint]:
        found: list[Constraint] = []
        if self.options.no_repeat_ngram:  # an answer of a set may repeat itself
            free = [place for place, task in enumerate(tasks) if task not in self._answer_sets]
            found.append(NoRepeatNgram(self.options.no_repeat_ngram, free))
        for task, answers in self._answer_sets.items():
            if places := [place for place, name in enumerate(tasks) if name == task]:
                found.append(AnswerSet(answers, self.decoder.eos_ids, places))
        return found

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
