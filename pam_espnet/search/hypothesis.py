"""The beam of one utterance: its options, which hypotheses continue, which are finished, when to stop.

The rules are those of transformers' beam search (``GenerationMixin._beam_search``), for one utterance, so that
nothing here can depend on its neighbours. Pure Python: no tensors, no LLM.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError

IMPOSSIBLE = -1e9  # a candidate at or below this log-probability stands for "none"


@dataclass(frozen=True)
class BeamOptions:
    """How to search; names and meaning follow transformers' ``generate``.

    beam_size 1 is greedy search: the first end token ends an answer.
    """

    beam_size: int = 4
    max_new_tokens: int = 128  # length cap, the end token included
    min_new_tokens: int = 0  # no end token before n tokens
    nbest: int = 1  # hypotheses returned per utterance, at most beam_size
    length_penalty: float = 1.0  # score = sum of log-probabilities / length ** length_penalty
    early_stopping: bool | str = False  # True: stop at beam_size finished; False: heuristic; "never": exact
    temperature: float = 1.0  # divides the logits
    eos_ids: tuple[int, ...] | None = None  # tokens that end an answer; None: the engine's own

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        for name in ("beam_size", "max_new_tokens", "nbest"):
            check_number(getattr(self, name), name, at_least=1, whole=True)
        check_number(self.min_new_tokens, "min_new_tokens", at_least=0, at_most=self.max_new_tokens, whole=True)
        if self.nbest > self.beam_size:
            raise ConfigError(f"nbest ({self.nbest}) must not be larger than beam_size ({self.beam_size})")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(f"early_stopping must be true, false or 'never', not {self.early_stopping!r}")
        check_number(self.length_penalty, "length_penalty")
        check_number(self.temperature, "temperature", above=0)


@dataclass(frozen=True)
class Hypothesis:
    """A (partial) answer."""

    tokens: list[int] = field(default_factory=list)  # with the end token, if there is one
    score: float = 0.0  # running: sum of log-probabilities; finished: divided by length ** length_penalty
    log_probs: list[float] = field(default_factory=list)  # of each token
    ended: bool = False  # an end token was found; False: running, or cut at the length cap
    depths: list[int] = field(default_factory=list)  # of each token, the block that predicted it

    @property
    def answer(self) -> list[int]:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.ended else self.tokens


@dataclass(frozen=True)
class Candidate:
    """A running hypothesis continued by one token."""

    total: float  # sum of log-probabilities of the continued hypothesis
    parent: int  # index of the hypothesis among the running ones
    token: int
    log_prob: float  # of the token alone
    depth: int = 0  # block of the LLM that predicted it


@dataclass(frozen=True)
class Partial:
    """How far the search of an utterance is."""

    utterance: int  # index in its batch
    hypothesis: Hypothesis  # the best running one; once done, the answer (empty where the search found none)
    done: bool
    settled: int  # tokens that the answer begins with, whatever comes: those that all hypotheses share


def new_beams(
    options: BeamOptions, eos_ids: Collection[int], count: int, max_new_tokens: Iterable[int] | None
) -> list[UtteranceBeam]:
    """One for each of ``count`` utterances; ``max_new_tokens`` has their own length caps, below the options'."""
    caps = [options.max_new_tokens] * count if max_new_tokens is None else [int(cap) for cap in max_new_tokens]
    return [
        UtteranceBeam(options, eos_ids, max(1, min(cap, options.max_new_tokens)), utterance)
        for utterance, cap in enumerate(caps)
    ]


class UtteranceBeam:
    """The beam of one utterance.

    Args:
        eos_ids: tokens that end an answer.
        max_new_tokens: this utterance's own length cap.
        utterance: its index in the batch.
    """

    def __init__(self, options: BeamOptions, eos_ids: Collection[int], max_new_tokens: int, utterance: int = 0) -> None:
        self.options = options
        self.utterance = utterance
        self.eos_ids = frozenset(eos_ids)
        self.max_new_tokens = max_new_tokens
        self.running: list[Hypothesis] = [Hypothesis()]
        self.finished: list[Hypothesis] = []  # best first, at most beam_size
        self.done = False

    @property
    def length(self) -> int:
        """Tokens in each running hypothesis."""
        return len(self.running[0].tokens)

    def advance(self, candidates: Sequence[Candidate]) -> list[int]:
        """Take one step.

        Args:
            candidates: the best (1 + number of end tokens) * beam_size continuations, best first.

        Returns:
            the parents of the new running hypotheses; their last tokens are what the LLM reads next.
        """
        size, length = self.options.beam_size, self.length + 1
        parents: list[int] = []
        running: list[Hypothesis] = []
        for rank, one in enumerate(candidates):
            ended, capped = one.token in self.eos_ids, length == self.max_new_tokens
            if one.total <= IMPOSSIBLE or (len(running) == size and rank >= size):
                break
            if not (ended or capped):
                if len(running) < size:
                    parents.append(one.parent)
                    running.append(self._extend(one, one.total, ended=False))
            elif rank < size:  # a lower end is only a reserve, so that beam_size hypotheses can continue
                score = one.total / length**self.options.length_penalty
                self.finished.append(self._extend(one, score, ended))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: the older one wins a tie
        del self.finished[size:]
        self.running = running
        self.done = not running or (len(self.finished) == size and self._cannot_improve(running[0].score, length))
        return parents

    def nbest(self) -> list[Hypothesis]:
        """The best finished hypotheses, best first."""
        return self.finished[: self.options.nbest]

    def partial(self) -> Partial:
        """How far it is."""
        best = (self.finished if self.done else self.running) or [Hypothesis()]
        rivals = best[:1] if self.done else [*self.running, *self.finished]
        same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*(one.tokens for one in rivals), strict=False))
        return Partial(self.utterance, best[0], self.done, len(list(same)))

    def _extend(self, one: Candidate, score: float, ended: bool) -> Hypothesis:
        parent = self.running[one.parent]
        return Hypothesis(
            tokens=[*parent.tokens, one.token],
            score=score,
            log_probs=[*parent.log_probs, one.log_prob],
            ended=ended,
            depths=[*parent.depths, one.depth],
        )

    def _cannot_improve(self, best_running: float, length: int) -> bool:
        """Whether no running hypothesis is expected to beat the worst of the full pool of finished ones."""
        options = self.options
        if options.early_stopping is True or options.beam_size == 1:
            return True
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = self.max_new_tokens  # a longer answer divides a negative score by more: the best that can come
        return best_running / length**options.length_penalty <= self.finished[-1].score
