"""What decoding returns for an utterance: its n-best answers, and how far they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    """The n-best answers to one utterance, best first."""

    texts: list[str]
    tokens: list[list[int]]  # the LLM's ids
    scores: list[float]
    depths: list[list[int]]  # of each token, the LLM's block that predicted it
    routing: dict[str, Any]  # how the encoders were combined
    constraints: dict[str, int]  # how often each fired, over steps and hypotheses; length_cap: the best answer was cut
    answer_log_probs: dict[str, float] | None = None  # of every answer, where the task has a set of them
    draft: dict[str, Any] | None = None  # what drafts were worth, and their kind, where they are on


@dataclass(frozen=True)
class PartialAnswer:
    """How far the answer to an utterance is; ``text`` costs nothing until it is read."""

    utterance: int  # index among the waveforms
    tokens: list[int]  # ids of the best running hypothesis, of the answer once ``done``
    score: float  # sum of log-probabilities; once done, divided by length ** length_penalty
    done: bool
    decode: Callable[[Sequence[int]], str]
    settled: int = 0  # how many of the tokens cannot change any more

    @property
    def text(self) -> str:
        """The words so far; bytes of a letter that is not whole yet are left out."""
        return self._text(self.tokens)

    @property
    def settled_text(self) -> str:
        """The words that cannot change any more, whatever else the search finds."""
        return self._text(self.tokens[: self.settled])

    def _text(self, tokens: Sequence[int]) -> str:
        text = self.decode(tokens)
        return text if self.done else text.rstrip("\ufffd")
