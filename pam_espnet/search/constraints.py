"""Constraints on what an answer may be: each forbids tokens, row by row, and counts where that changed something.

Semantics are those of transformers' logits processors in beam search: forbidden tokens lose their probability, the
others keep theirs (nothing is renormalised), so scores with and without a constraint can be compared.

R rows (running hypotheses), V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pam_espnet.errors import ConfigError


class Constraint(ABC):
    """Forbids tokens.

    Args:
        utterances: indices in the batch to which it applies; None for all.

    Attributes:
        name: in reports.
        fired: utterance -> how often, counted over steps and running hypotheses, the LLM's
            most likely next token was forbidden.
    """

    name: str

    def __init__(self, utterances: Collection[int] | None = None) -> None:
        self.utterances = None if utterances is None else frozenset(utterances)
        self.fired: Counter[int] = Counter()

    @abstractmethod
    def forbid(self, tokens: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
        """(V,) bool of what must not follow ``tokens``; None when everything may."""

    def apply(
        self, log_probs: Tensor, best: Sequence[int], utterances: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> None:
        """Set forbidden entries of ``log_probs`` (R,V) to minus infinity, in place.

        Args:
            log_probs: of each row's next token.
            best: each row's most likely next token before any constraint.
            utterances: of each row.
            tokens: of each row so far.
        """
        for row, (utterance, past) in enumerate(zip(utterances, tokens, strict=True)):
            if self.utterances is not None and utterance not in self.utterances:
                continue
            forbidden = self.forbid(past, log_probs.size(1), log_probs.device)
            if forbidden is not None:
                self.fired[utterance] += bool(forbidden[best[row]])
                log_probs[row].masked_fill_(forbidden, -torch.inf)


class NoRepeatNgram(Constraint):
    """No n-gram twice in one answer: the usual guard against loops.

    Args:
        size: n; 1 forbids every token that was there before.
    """

    name = "no_repeat_ngram"

    def __init__(self, size: int, utterances: Collection[int] | None = None) -> None:
        super().__init__(utterances)
        if size < 1:
            raise ConfigError(f"no_repeat_ngram must be at least 1, not {size}")
        self.size = size

    def forbid(self, tokens: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
        context = tuple(tokens[len(tokens) - self.size + 1 :]) if self.size > 1 else ()
        if len(tokens) < self.size:
            return None
        starts = range(len(tokens) - self.size + 1)
        found = [tokens[at + self.size - 1] for at in starts if tuple(tokens[at : at + self.size - 1]) == context]
        if not found:
            return None
        forbidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        forbidden[found] = True
        return forbidden


class AnswerSet(Constraint):
    """Only one of some answers.

    Args:
        answers: token sequences; each must be followed by an end token.
        eos_ids: the end tokens.
    """

    name = "answer_set"

    def __init__(
        self, answers: Collection[Sequence[int]], eos_ids: Sequence[int], utterances: Collection[int] | None = None
    ) -> None:
        super().__init__(utterances)
        if not answers or not all(answers):
            raise ConfigError("an answer set needs answers, none of them empty")
        self.next: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            for at, token in enumerate(answer):
                self.next.setdefault(tuple(answer[:at]), set()).add(token)
            self.next.setdefault(tuple(answer), set()).update(eos_ids)

    def forbid(self, tokens: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
        forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
        forbidden[sorted(self.next.get(tuple(tokens), ()))] = False
        return forbidden
