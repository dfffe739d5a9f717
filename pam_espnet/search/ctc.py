"""CTC beside the LLM in the search: both score every continuation, the weighted sum counts.

Joint decoding of CTC and attention (Hori, Watanabe and Hershey, ACL 2017), with an LLM for the attention decoder. An
LLM that was fine-tuned on few transcripts continues as its training text does; CTC gives no probability to words that
the audio does not contain. A token that CTC does not know is passed over: its score is an option, and what follows is
scored as if it were not there. The prefix scores are ESPnet's (Watanabe et al., "Hybrid CTC/attention architecture for
end-to-end speech recognition", IEEE JSTSP 2017, algorithm 2).

U adapter frames, C classes (token types + 1 blank, class 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pam_espnet.config import check_number

BLANK = 0
State = tuple[Any, float]  # forward probabilities of a prefix, and the log-probability of all that begin with it


@dataclass(frozen=True)
class CTCOptions:
    """How much CTC counts.

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
        check_number(self.weight, "ctc.weight", at_least=0, below=1)
        check_number(self.candidates, "ctc.candidates", at_least=1, whole=True)
        check_number(self.unknown, "ctc.unknown", at_least=-100, at_most=0)


class CTCScorer:
    """Of the utterances of one batch that CTC covers.

    Args:
        log_probs: utterance -> (U,C) log-probabilities of its frames.
        class_of: vocabulary index -> class, of the tokens that CTC knows.
        eos_ids: vocabulary indices of the end tokens.
        options: weight and number of candidates.
    """

    def __init__(
        self,
        log_probs: Mapping[int, np.ndarray],
        class_of: Mapping[int, int],
        eos_ids: Sequence[int],
        options: CTCOptions,
    ) -> None:
        from espnet2.legacy.nets.ctc_prefix_score import CTCPrefixScore

        self.options = options
        self._end = max(rows.shape[1] for rows in log_probs.values())  # one class more: no frame predicts an end
        self._class_of = {**class_of, **dict.fromkeys(eos_ids, self._end)}
        self._scorers = {}
        for utterance, rows in log_probs.items():
            no_end = np.full((len(rows), 1), -np.inf, dtype=rows.dtype)
            self._scorers[utterance] = CTCPrefixScore(np.concatenate([rows, no_end], axis=1), BLANK, self._end, np)
        # Of each utterance: tokens -> state, of the hypotheses that can be asked for and of those that follow them.
        self._old: dict[int, dict[tuple[int, ...], State]] = {}
        self._new: dict[int, dict[tuple[int, ...], State]] = {
            utterance: {(): (one.initial_state(), 0.0)} for utterance, one in self._scorers.items()
        }

    def covers(self, utterance: int) -> bool:
        """Whether it scores this utterance."""
        return utterance in self._scorers

    def joint(
        self, utterance: int, past: Sequence[int], values: Sequence[float], tokens: Sequence[int]
    ) -> list[float]:
        """Weighted sums of the LLM's log-probabilities of ``tokens`` and CTC's; what is forbidden stays so."""
        weight = self.options.weight
        possible = [token for token, value in zip(tokens, values, strict=True) if value > -np.inf]
        scores = dict(zip(possible, self.score(utterance, past, possible), strict=True))
        return [
            (1 - weight) * value + weight * scores[token] if value > -np.inf else value
            for token, value in zip(tokens, values, strict=True)
        ]

    def score(self, utterance: int, tokens: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Log-probability of each of ``candidates`` behind ``tokens``, a continuation that was scored before."""
        prefix = tuple(tokens)
        if prefix in self._new[utterance]:  # the first hypothesis of a step: what is shorter is not asked for again
            self._old[utterance], self._new[utterance] = self._new[utterance], {}
        forward, before = self._old[utterance][prefix]
        labels = [self._end, *(self._class_of[token] for token in prefix if token in self._class_of)]
        known = [token for token in candidates if token in self._class_of]
        wanted = np.array([self._class_of[token] for token in known], dtype=int)
        scorer = self._scorers[utterance]
        with np.errstate(invalid="ignore"):  # of minus infinity and itself
            values, states = scorer(labels, wanted, forward)
        following = self._new[utterance]
        for token, value, state in zip(known, values.tolist(), states, strict=True):
            if value > scorer.logzero / 2:
                following[*prefix, token] = (state, value)
        following |= {(*prefix, token): (forward, before) for token in candidates if token not in self._class_of}
        return [self._conditional(following, (*prefix, token), before) for token in candidates]

    def _conditional(self, following: dict[tuple[int, ...], State], tokens: tuple[int, ...], before: float) -> float:
        if tokens[-1] not in self._class_of:
            return self.options.unknown
        return following[tokens][1] - before if tokens in following else -float("inf")
