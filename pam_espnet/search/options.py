"""Options of the beam search, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pam_espnet.errors import ConfigError


@dataclass(frozen=True)
class BeamOptions:
    """How to search; names and meaning follow transformers' ``generate``.

    beam_size 1 is greedy search: the first end token ends an answer.
    """

    beam_size: int = 4
    max_new_tokens: int = 128  # length cap, the end token included
    min_new_tokens: int = 0  # no end token before so many tokens
    nbest: int = 1  # hypotheses returned per utterance, at most beam_size
    length_penalty: float = 1.0  # score = sum of log-probabilities / length ** length_penalty
    early_stopping: bool | str = False  # True: stop at beam_size finished; False: heuristic; "never": exact
    temperature: float = 1.0  # divides the logits
    eos_ids: tuple[int, ...] | None = None  # tokens that end an answer; None: the decoder's own

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        for name in ("beam_size", "max_new_tokens", "nbest", "min_new_tokens"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("beam_size", "max_new_tokens", "nbest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.nbest > self.beam_size:
            raise ConfigError(f"nbest ({self.nbest}) must not be larger than beam_size ({self.beam_size})")
        if self.min_new_tokens < 0 or self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(f"min_new_tokens must be 0 to max_new_tokens, not {self.min_new_tokens}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(f"early_stopping must be true, false or 'never', not {self.early_stopping!r}")
        for name in ("length_penalty", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ConfigError(f"{name} must be a number, not {value!r}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, not {self.temperature}")
