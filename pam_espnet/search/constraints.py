"""Constraints on what an answer may be: each forbids tokens, row by row, and counts where that changed something.

Semantics are those of transformers' logits processors in beam search: forbidden tokens lose their probability, the
others keep theirs (nothing is renormalised), so scores with and without a constraint can be compared.

It knows token ids; it knows no text and no LLM.

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

    Attributes:
        name: in reports.
        fired: utterance (its place in the batch) -> how often the most likely next token of a running hypothesis was
            forbidden.
    """

    name: str

    def __init__(self) -> None:
        self.fired: Counter[int] = Counter()

    @abstractmethod
    def forbid(self, tokens: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
        """(V,) bool of what must not follow ``tokens``; None when everything may."""

    def apply(self, log_probs: Tensor, utterances: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Set forbidden entries of ``log_probs`` (R,V) to minus infinity, in place.

        Args:
            log_probs: of each row's next token.
            utterances: whose row it is.
            tokens: of each row so far.
        """
        best = log_probs.argmax(dim=-1).tolist()
        for row, (utterance, past) in enumerate(zip(utterances, tokens, strict=True)):
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

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ConfigError(f"no_repeat_ngram must be at least 1, not {size}")
        self.size = size

    def forbid(self, tokens: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
        """See Constraint."""
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
        utterances: for which places in the batch; None for all.
    """

    name = "answer_set"

    def __init__(
        self, answers: Collection[Sequence[int]], eos_ids: Sequence[int], utterances: Collection[int] | None = None
    ) -> None:
        super().__init__()
        if not answers or not all(answers):
            raise ConfigError("an answer set needs answers, none of them empty")
        self.utterances = None if utterances is None else frozenset(utterances)
        self.next: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            for at, token in enumerate(answer):
                self.next.setdefault(tuple(answer[:at]), set()).add(token)
            self.next.setdefault(tuple(answer), set()).update(eos_ids)

    def apply(self, log_probs: Tensor, utterances: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """See Constraint."""
        rows = [r for r, one in enumerate(utterances) if self.utterances is None or one in self.utterances]
        if len(rows) == len(utterances):
            super().apply(log_probs, utterances, tokens)
        elif rows:
            chosen = log_probs[rows]
            super().apply(chosen, [utterances[row] for row in rows], [tokens[row] for row in rows])
            log_probs[rows] = chosen

    def forbid(self, tokens: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
        """See Constraint."""
        forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
        forbidden[sorted(self.next.get(tuple(tokens), ()))] = False
        return forbidden
