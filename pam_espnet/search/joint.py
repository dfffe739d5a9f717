"""A second model beside the LLM, in the search: both score every continuation, the weighted sum counts.

Joint decoding of CTC and attention (Hori, Watanabe and Hershey, ACL 2017), with an LLM for the attention decoder.

It knows token ids; it knows no audio, no text and no LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pam_espnet.errors import ConfigError


@dataclass(frozen=True)
class JointOptions:
    """How a second model is heard.

    Attributes:
        weight: of its log-probabilities, the LLM's have the rest; 0 leaves it out.
        candidates: of each running hypothesis, the LLM's most likely continuations that it scores.
        unknown: log-probability of tokens that it does not know.
    """

    weight: float = 0.0
    candidates: int = 40
    unknown: float = -5.0

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        if not isinstance(self.weight, int | float) or not 0 <= self.weight < 1:
            raise ConfigError(f"ctc.weight: {self.weight!r}; must be 0 to below 1, 0 turns it off")
        if not isinstance(self.candidates, int) or self.candidates < 1:
            raise ConfigError(f"ctc.candidates: {self.candidates!r}; must be a whole number, at least 1")
        if not isinstance(self.unknown, int | float) or not -100 <= self.unknown <= 0:
            raise ConfigError(f"ctc.unknown: {self.unknown!r}; must be a log-probability, -100 to 0")


class JointScorer(Protocol):
    """The second model; ``ctc_scorer.CTCScorer`` is one."""

    options: JointOptions

    def covers(self, utterance: int) -> bool:
        """Whether it has heard this utterance; to the others it has nothing to say."""

    def score(self, utterance: int, tokens: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Log-probability of each of ``candidates`` behind ``tokens``, a continuation that was scored before."""
