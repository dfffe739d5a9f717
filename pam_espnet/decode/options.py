"""Decoding options: of the beam search, and what a task's answers may be. One YAML holds them all.

beam_size: 4              any option of ``search.hypothesis.BeamOptions``
no_repeat_ngram: 0        no n-gram twice in an answer; 0 allows all
tokens_per_second: 0      length cap from the audio's duration (plus eight tokens); 0 leaves max_new_tokens alone
answer_sets:              task -> the only answers there are
  count: ["0", "1", "2", "3", "4"]
task_vocabulary: false    only token types of the training answers (those of the warm start's head)
exit:                     early exit, see engine.exits.ExitOptions
  mode: never
draft:                    tokens that the LLM verifies instead of finding them one by one, see search.drafts
  kind: none
ctc:                      the warm start's CTC head beside the LLM, see search.ctc
  weight: 0
graphs: auto              the LLM's passes as CUDA graphs, see engine.static: auto (on CUDA, for Llama-type LLMs),
                          on (also on a CPU, where nothing is gained), off
batch_invariant: true     on CUDA: an answer does not depend on its batch; false allows faster products
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pam_espnet.config import check_number, drop_removed
from pam_espnet.data.tasks import task_spec
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.errors import ConfigError
from pam_espnet.search.ctc import CTCOptions
from pam_espnet.search.drafts import DraftOptions
from pam_espnet.search.hypothesis import BeamOptions

GRAPHS = ("auto", "on", "off")
SPARE_TOKENS = 8  # for short clips, in which a word or two and the end token must fit


@dataclass(frozen=True)
class AnswerOptions:
    """Options of decoding; see the module's example."""

    beam: BeamOptions = field(default_factory=BeamOptions)
    no_repeat_ngram: int = 0
    tokens_per_second: float = 0.0
    answer_sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    task_vocabulary: bool = False
    exit: ExitOptions = field(default_factory=ExitOptions)
    draft: DraftOptions = field(default_factory=DraftOptions)
    ctc: CTCOptions = field(default_factory=CTCOptions)
    graphs: str = "auto"
    batch_invariant: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        check_number(self.no_repeat_ngram, "no_repeat_ngram", at_least=0, whole=True)
        check_number(self.tokens_per_second, "tokens_per_second", at_least=0)
        for name in ("task_vocabulary", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: {getattr(self, name)!r}; must be true or false")
        if self.graphs not in GRAPHS:
            raise ConfigError(f"graphs: {self.graphs!r}; choose one of {', '.join(GRAPHS)}")
        if not isinstance(self.answer_sets, Mapping):
            raise ConfigError(f"answer_sets: {self.answer_sets!r}; must be a mapping of tasks to their answers")
        for task, answers in self.answer_sets.items():
            task_spec(task)
            texts = answers if isinstance(answers, list | tuple) else []
            if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
                raise ConfigError(f"answer_sets.{task}: must be a list of quoted, non-empty answers")
        if self.answer_sets and self.beam.min_new_tokens > 0:
            raise ConfigError("min_new_tokens: an answer set fixes how long answers are; set it to 0")
        if self.draft.kind != "none" and self.beam.beam_size != 1:
            raise ConfigError(f"draft: greedy search only; set beam_size to 1, not {self.beam.beam_size}")
        if self.draft.kind != "none" and self.exit.mode != "never":
            raise ConfigError("draft: the whole LLM verifies; set exit.mode to never, or draft.kind to none")
        if self.ctc.weight > 0 and self.draft.kind != "none":
            raise ConfigError("ctc.weight: the LLM alone verifies drafts; set draft.kind to none, or weight to 0")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], source: str | Path = "decoding options") -> AnswerOptions:
        """From a flat mapping, as the YAML holds it.
        Raises ConfigError: a key that nothing reads, or a value out of range; ``source`` is named."""
        options = drop_removed(options, {"compile": False}, "")
        if isinstance(options.get("exit"), Mapping):
            options["exit"] = drop_removed(options["exit"], {"fill": "propagate"}, "exit")
        fields = [key for key in cls.__dataclass_fields__ if key != "beam"]
        own = {key: options[key] for key in fields if options.get(key) is not None}
        if isinstance(own.get("graphs"), bool):  # YAML reads a bare on or off as true or false
            own["graphs"] = "on" if own["graphs"] else "off"
        beam = {key: value for key, value in options.items() if key not in fields}
        try:
            if "eos_ids" in beam:
                raise ConfigError("eos_ids: the LLM's own end tokens are used")
            for key, group in (("exit", ExitOptions), ("draft", DraftOptions), ("ctc", CTCOptions)):
                if key in own:
                    if not isinstance(own[key], Mapping):
                        raise ConfigError(f"{key}: {own[key]!r}; must be a mapping of its options")
                    own[key] = group(**{name: value for name, value in own[key].items() if value is not None})
            return cls(beam=BeamOptions(**beam), **own)
        except (TypeError, AttributeError, ConfigError) as error:
            raise ConfigError(f"{source}: {error}") from error

    def length_caps(self, seconds: Sequence[float]) -> list[int] | None:
        """A cap on the tokens of each utterance, or None for ``max_new_tokens`` alone."""
        if self.tokens_per_second == 0:
            return None
        return [SPARE_TOKENS + math.ceil(duration * self.tokens_per_second) for duration in seconds]
