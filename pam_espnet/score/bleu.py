"""BLEU against several references, with the counts per utterance that an interval needs.

Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (ACL 2002): clipped n-gram precision
over the corpus, geometric mean over n, brevity penalty against the reference length closest to the hypothesis (the
shorter one of two equally close). An order without a match makes the score 0; pycocoevalcap adds 1e-15 to every count
instead, which gives up to 0.0002 there and the same figure elsewhere. Its tokens are those of ``score/captions.py``.

Dimension letters: N utterances, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_ORDER = 4


def ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Counts of all n-grams, n from 1 to 4."""
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )


def count_matches(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """Ten numbers of an utterance: clipped matches of n = 1..4, n-grams in the hypothesis of n = 1..4, its length, and
    that of the closest reference."""
    found = ngrams(hypothesis)
    allowed: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        allowed |= ngrams(reference)  # the most often in any one reference
    counts = [0] * (2 * MAX_ORDER)
    for gram, count in found.items():
        counts[len(gram) - 1] += min(count, allowed[gram])
        counts[MAX_ORDER + len(gram) - 1] += count
    closest = min((abs(len(reference) - len(hypothesis)), len(reference)) for reference in references)[1]
    return [*counts, len(hypothesis), closest]


@dataclass(frozen=True)
class Bleu:
    """BLEU of one order over N utterances; ``score.intervals.Statistics``."""

    table: np.ndarray  # (N, 2 * order + 2) as ``count_matches`` gives them, of n up to ``order``

    @classmethod
    def of(cls, counts: np.ndarray, order: int) -> Bleu:
        """From all ten numbers of each utterance (N,10), the columns of one order."""
        columns = [*range(order), *range(MAX_ORDER, MAX_ORDER + order), 2 * MAX_ORDER, 2 * MAX_ORDER + 1]
        return cls(counts[:, columns])

    def figures(self, sums: np.ndarray) -> np.ndarray:
        """(R, 2 * order + 2) -> (R,)."""
        order = (sums.shape[1] - 2) // 2
        matches, totals, length, closest = sums[:, :order], sums[:, order : 2 * order], sums[:, -2], sums[:, -1]
        with np.errstate(divide="ignore", invalid="ignore"):
            # A corpus too short for an n-gram matches nothing.
            precision = np.where(totals > 0, matches / totals, 0.0)
            brevity = np.where(length > 0, np.exp(np.minimum(0.0, 1.0 - closest / length)), 0.0)
            return brevity * np.exp(np.log(precision).mean(1))
