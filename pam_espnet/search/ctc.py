"""The warm start's CTC head as a second model in the search (``search.joint``): it knows what was heard, and when.

An LLM that was fine-tuned on few transcripts goes on as its training text does; CTC gives no probability to what was
not heard. A token that the head does not know is passed over: its score is an option, and what follows is scored as if
it were not there. The prefix scores are ESPnet's (Watanabe et al., "Hybrid CTC/attention architecture for end-to-end
speech recognition", IEEE JSTSP 2017, algorithm 2).

B utterances, U adapter frames, D width, C classes (token types + 1 blank).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pam_espnet.engine.view import DecoderView
from pam_espnet.frontend.ctc_head import BLANK, EmbeddingCTC
from pam_espnet.search.joint import JointOptions

State = tuple[Any, float]  # forward probabilities of a prefix, and the log-probability of all that begin with it


class CTCScorer:
    """See ``search.joint.JointScorer``; made anew for every batch.

    Args:
        ctc: the head.
        view: the LLM as the search sees it.
        frames: audio embeddings (B,U,D) of the utterances that are covered.
        lengths: their valid frames (B,).
        utterances: their places in the search's batch.
        options: weight and number of candidates.
    """

    def __init__(
        self,
        ctc: EmbeddingCTC,
        view: DecoderView,
        frames: Tensor,
        lengths: Tensor,
        utterances: Sequence[int],
        options: JointOptions,
    ) -> None:
        from espnet2.legacy.nets.ctc_prefix_score import CTCPrefixScore

        self.options = options
        known = {token: number for number, token in enumerate(ctc.token_ids.tolist(), start=1)}
        end = len(known) + 1
        known |= dict.fromkeys(view.decoder.eos_ids, end)
        self._class = dict(zip(view.places(list(known), strict=False), known.values(), strict=True))
        log_probs = ctc.log_probs(frames).cpu().numpy()  # (B,U,C)
        self._prefix_scores = {}
        for place, rows, length in zip(utterances, log_probs, lengths.tolist(), strict=True):
            silent = np.full((length, 1), -np.inf, dtype=rows.dtype)  # no frame says that an answer ends
            heard = np.concatenate([rows[:length], silent], axis=1)
            self._prefix_scores[place] = CTCPrefixScore(heard, BLANK, end, np)
        self._end = end
        # Of each utterance: tokens -> state, of the hypotheses that can be asked for and of those that follow them.
        self._old: dict[int, dict[tuple[int, ...], State]] = {}
        self._new: dict[int, dict[tuple[int, ...], State]] = {
            place: {(): (one.initial_state(), 0.0)} for place, one in self._prefix_scores.items()
        }

    def covers(self, utterance: int) -> bool:
        """See ``JointScorer``."""
        return utterance in self._prefix_scores

    def score(self, utterance: int, tokens: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """See ``JointScorer``."""
        prefix = tuple(tokens)
        if prefix in self._new[utterance]:  # the first hypothesis of a step: what is shorter is not asked for again
            self._old[utterance], self._new[utterance] = self._new[utterance], {}
        forward, before = self._old[utterance][prefix]
        labels = [self._end, *(self._class[token] for token in prefix if token in self._class)]
        known = [token for token in candidates if token in self._class]
        wanted = np.array([self._class[token] for token in known], dtype=int)
        scorer = self._prefix_scores[utterance]
        with np.errstate(invalid="ignore"):  # of minus infinity and itself
            values, states = scorer(labels, wanted, forward)
        following = self._new[utterance]
        for token, value, state in zip(known, values.tolist(), states, strict=True):
            if value > scorer.logzero / 2:
                following[*prefix, token] = (state, value)
        following |= {(*prefix, token): (forward, before) for token in candidates if token not in self._class}
        return [self._score(following, (*prefix, token), before) for token in candidates]

    def _score(self, following: dict[tuple[int, ...], State], tokens: tuple[int, ...], before: float) -> float:
        if tokens[-1] not in self._class:
            return self.options.unknown
        return following[tokens][1] - before if tokens in following else -float("inf")
