"""Scores of yes-or-no answers: accuracy and a confusion matrix.

An answer is read strictly: the whole answer is "yes" or "no"; letter case, surrounding space and a closing full stop do
not matter. Anything else ("yes, there are three", "maybe", nothing) is *no answer*: wrong, and reported. With as many
questions whose answer is yes as no, guessing gives 50 %.
"""

from __future__ import annotations

from collections.abc import Mapping

from pam_espnet.score.intervals import mean_of
from pam_espnet.score.result import TaskResult

CHOICES = ("no", "yes")
NO_ANSWER = "no answer"


def parse_choice(answer: str) -> str | None:
    """``yes`` or ``no``, or None when ``answer`` is neither (see the module's rule)."""
    word = answer.strip().rstrip(".!").strip().lower()
    return word if word in CHOICES else None


def score_choices(references: Mapping[str, str], hypotheses: Mapping[str, str]) -> TaskResult:
    """Accuracy (%) over the utterances of ``references``.

    Args:
        references: utterance -> "yes" or "no".
        hypotheses: utterance -> decoded answer, for at least the same utterances.

    Returns:
        ``details["confusion"]``: ``matrix[i][j]`` is how often ``rows[i]`` was answered with ``columns[j]``; the last
        column is "no answer".

    Raises:
        ValueError: a reference is neither yes nor no.
    """
    keys = list(references)
    true = [parse_choice(references[key]) for key in keys]
    if None in true:
        key = keys[true.index(None)]
        raise ValueError(f"the reference of {key} is neither yes nor no: {references[key]!r}")
    said = [parse_choice(hypotheses[key]) for key in keys]
    pairs = list(zip(true, said, strict=True))
    correct = [float(left == right) for left, right in pairs]
    columns = (*CHOICES, None)
    return TaskResult(
        keys,
        metrics={"accuracy": mean_of(correct, scale=100.0)},
        fields={"accuracy": {"correct": int(sum(correct))}},
        details={
            "no_answer": said.count(None),
            "confusion": {
                "rows": list(CHOICES),
                "columns": [*CHOICES, NO_ANSWER],
                "matrix": [[pairs.count((row, column)) for column in columns] for row in CHOICES],
            },
        },
    )
