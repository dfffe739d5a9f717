"""Constraints on what an answer may be, as rules: which tokens may not follow a hypothesis, or which alone may.

Semantics are those of transformers' logits processors in beam search: forbidden tokens lose their probability, the
others keep theirs (nothing is renormalised), so scores with and without a constraint can be compared.

A rule depends on the tokens so far and is found on the host; a table of rules is what a device applies.

R rows (running hypotheses), W tokens in the longest rule, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from pam_espnet.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """What may follow a hypothesis.

    Attributes:
        tokens: vocabulary indices.
        only: nothing but ``tokens`` may follow; False: they may not.
    """

    tokens: frozenset[int]
    only: bool = False

    def forbids(self, token: int) -> bool:
        """Whether ``token`` may not follow."""
        return (token in self.tokens) != self.only


class Constraint(ABC):
    """Rules for the answers of some utterances.

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
    def rule(self, tokens: Sequence[int]) -> Rule | None:
        """Of what follows ``tokens``; None when everything may."""


def find_rules(constraints: Iterable[Constraint], utterance: int, tokens: Sequence[int]) -> dict[Constraint, Rule]:
    """The rules of those constraints that have one for what follows ``tokens`` in an answer of ``utterance``."""
    applying = (one for one in constraints if one.utterances is None or utterance in one.utterances)
    found = ((one, one.rule(tokens)) for one in applying)
    return {one: rule for one, rule in found if rule is not None}


def count_fired(rules: dict[Constraint, Rule], utterance: int, best: int) -> None:
    """Count the constraints whose rule forbids ``best``, the most likely token of a row before any constraint."""
    for constraint, rule in rules.items():
        constraint.fired[utterance] += rule.forbids(best)


def combine(rules: Iterable[Rule]) -> Rule | None:
    """One rule that forbids what any of ``rules`` forbids; None where there are none."""
    allowed: frozenset[int] | None = None
    banned: frozenset[int] = frozenset()
    for rule in rules:
        if not rule.only:
            banned |= rule.tokens
        else:
            allowed = rule.tokens if allowed is None else allowed & rule.tokens
    if allowed is not None:
        return Rule(allowed - banned, only=True)
    return Rule(banned) if banned else None


def rule_table(rules: Sequence[Rule | None], width: int = 8) -> Tensor:
    """Rules as one tensor (R,1+W) of whole numbers: 1 for ``only``, else 0; the tokens; -1 where they are fewer.

    W is ``width``, doubled until the longest rule fits.
    """
    while any(rule is not None and len(rule.tokens) > width for rule in rules):
        width *= 2
    free = [0] + [-1] * width
    full = ([int(rule.only), *rule.tokens] if rule else free for rule in rules)
    return torch.tensor([row + free[len(row) :] for row in full], dtype=torch.long).view(-1, 1 + width)


def forbidden(table: Tensor, vocabulary_size: int) -> Tensor:
    """(R,V) bool of what must not follow, from a ``rule_table`` on any device, without synchronising with it."""
    only, tokens = table[:, :1] == 1, table[:, 1:]
    # One column more than the vocabulary has, for the -1 of rules shorter than W.
    named = torch.zeros(len(table), vocabulary_size + 1, dtype=torch.bool, device=table.device)
    named.scatter_(1, tokens.masked_fill(tokens < 0, vocabulary_size), True)
    return named[:, :-1] != only


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

    def rule(self, tokens: Sequence[int]) -> Rule | None:
        """See ``Constraint``."""
        tokens, before = list(tokens), self.size - 1  # tokens that the next one makes an n-gram of
        if before == 0 or len(tokens) <= before:
            return Rule(frozenset(tokens)) if tokens and before == 0 else None
        context, found, at, last = tokens[-before:], set(), before - 1, len(tokens) - 1
        with suppress(ValueError):  # there is no more: a search by ``index`` costs a twentieth of comparing every place
            while True:
                at = tokens.index(context[-1], at, last)
                if tokens[at - before + 1 : at + 1] == context:
                    found.add(tokens[at + 1])
                at += 1
        return Rule(frozenset(found)) if found else None


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
        following: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            for at, token in enumerate(answer):
                following.setdefault(tuple(answer[:at]), set()).add(token)
            following.setdefault(tuple(answer), set()).update(eos_ids)
        self._rules = {past: Rule(frozenset(tokens), only=True) for past, tokens in following.items()}

    def rule(self, tokens: Sequence[int]) -> Rule | None:
        """See ``Constraint``."""
        return self._rules.get(tuple(tokens), Rule(frozenset(), only=True))
