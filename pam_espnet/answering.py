"""How answers are decoded: the beam search's options, and what a task's answers may be. One YAML holds them all.

    beam_size: 4              any option of ``search.options.BeamOptions``
    no_repeat_ngram: 0        no n-gram twice in an answer; 0 allows all
    tokens_per_second: 0      length cap from the audio's duration (plus eight tokens); 0 leaves max_new_tokens alone
    answer_sets:              task -> the only answers there are
      count: ["0", "1", "2", "3", "4"]
    task_vocabulary: false    only token types of the training answers (those of the warm start's head)
    exit:                     early exit, see decoder.exits.ExitOptions
      mode: never
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pam_espnet.data.tasks import task_spec
from pam_espnet.decoder.exits import ExitOptions
from pam_espnet.errors import ConfigError
from pam_espnet.search.options import BeamOptions

SPARE_TOKENS = 8  # for short clips, in which a word or two and the end token must fit


@dataclass(frozen=True)
class AnswerOptions:
    """Options of decoding; see the module's example.

    Attributes:
        beam: of the search.
        no_repeat_ngram: n, or 0.
        tokens_per_second: tokens allowed per second of audio, or 0.
        answer_sets: task -> its answers.
        task_vocabulary: whether the output layer is cut to the token types of the training answers.
        exit: when a token may be taken from a block before the last.
    """

    beam: BeamOptions = field(default_factory=BeamOptions)
    no_repeat_ngram: int = 0
    tokens_per_second: float = 0.0
    answer_sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    task_vocabulary: bool = False
    exit: ExitOptions = field(default_factory=ExitOptions)

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        if self.no_repeat_ngram < 0 or self.tokens_per_second < 0:
            raise ConfigError("no_repeat_ngram and tokens_per_second must not be negative; 0 turns them off")
        for task, answers in self.answer_sets.items():
            task_spec(task)
            if not answers or not all(isinstance(answer, str) and answer for answer in answers):
                raise ConfigError(f"answer_sets.{task}: must be a list of quoted, non-empty answers")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], source: str | Path = "decoding options") -> AnswerOptions:
        """From a flat mapping, as the YAML holds it.

        Raises:
            ConfigError: a key that nothing reads, or a value out of range; ``source`` is named.
        """
        own = {key: options[key] for key in cls.__dataclass_fields__ if key != "beam" and key in options}
        beam = {key: value for key, value in options.items() if key not in own}
        try:
            if "exit" in own:
                own["exit"] = ExitOptions(**own["exit"])
            return cls(beam=BeamOptions(**beam), **own)
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"{source}: {error}") from error

    def length_caps(self, seconds: Sequence[float]) -> list[int] | None:
        """A cap on the tokens of each utterance, or None for no cap of its own."""
        if self.tokens_per_second == 0:
            return None
        return [SPARE_TOKENS + math.ceil(duration * self.tokens_per_second) for duration in seconds]
