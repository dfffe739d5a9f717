"""METEOR 1.5 for English: matched by its Java program, scored here.

Denkowski and Lavie, "Meteor Universal: Language Specific Translation Evaluation for Any Target Language" (WMT 2014).
The program prints for each utterance what was matched with the best reference; the score is a function of the sums of
these counts, so that a corpus figure has an interval. It is the corpus figure of pycocoevalcap.

Dimension letters: N utterances, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pam_espnet.score.parts import UnavailableError, find_part, run_java

COLUMNS, CHUNKS = 23, 20
# Parameters of the English task: the weight of precision in the mean, exponent and weight of the fragmentation penalty,
# weight of content against function words, weights of the matchers (exact, stem, synonym, paraphrase).
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])


@dataclass(frozen=True)
class Meteor:
    """The score over N utterances; ``score.intervals.Statistics``."""

    # (N,23): words of hypothesis and reference, function words of both, then per matcher the content words matched in
    # hypothesis and reference and the function words of both, then chunks, and words matched in both
    table: np.ndarray

    @classmethod
    def of(cls, printed: np.ndarray) -> Meteor:
        """From what the program prints; a hypothesis equal to a reference has no chunks, as in the program's sums."""
        whole = (printed[:, CHUNKS] == 1) & (printed[:, 21:23] == printed[:, 0:2]).all(1)
        table = printed.copy()
        table[whole, CHUNKS] = 0
        return cls(table)

    def figures(self, sums: np.ndarray) -> np.ndarray:
        """(R,23) -> (R,), 0 where nothing matches."""
        words, functions = sums[:, 0:2], sums[:, 2:4]
        matched = sums[:, 4:20].reshape(-1, 4, 2, 2)  # matcher, content or function, hypothesis or reference
        weighed = np.einsum("rmkh,m,k->rh", matched, MATCHERS, np.array([DELTA, 1 - DELTA]))
        totals = DELTA * (words - functions) + (1 - DELTA) * functions
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = (weighed / totals).T
            mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
            fragmentation = sums[:, CHUNKS] / sums[:, 21:23].mean(1)
            score = mean * (1 - GAMMA * fragmentation**BETA)
        return np.where(np.isfinite(score), score, 0.0)


def meteor(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Meteor:
    """Match tokens of N hypotheses with those of their references.
    Raises UnavailableError: the program or a Java runtime is not installed, or it fails."""
    jar = find_part("meteor", "meteor-1.5.jar")
    lines = []
    for given, wanted in zip(hypotheses, references, strict=True):
        sentences = [" ".join(tokens) for tokens in (*wanted, given)]
        lines.append(" ||| ".join(["SCORE", *sentences]) + "\n")
    arguments = ["-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    printed = run_java(arguments, "".join(lines), seconds=600 + 0.5 * len(lines), cwd=jar.parent.resolve())
    try:
        rows = [[float(number) for number in line.split()] for line in printed.splitlines() if line.strip()]
    except ValueError as error:
        raise UnavailableError(f"METEOR printed what is no counts: {error}") from error
    if len(rows) != len(lines) or any(len(row) != COLUMNS for row in rows):
        raise UnavailableError(f"METEOR printed {len(rows)} lines of counts for {len(lines)} captions")
    return Meteor.of(np.array(rows))
