"""Scores of answers that are a number: accuracy, mean absolute error, confusion matrix.

An answer is read strictly: the whole answer is one or two digits, or a number word from "zero" to "ten"; letter case,
surrounding space and a closing full stop do not matter. Anything else ("two or three", "many", a digit loop, nothing)
is *not a number*: wrong in the accuracy, left out of the mean absolute error (it has no distance), and reported.
So read the error together with the number of answers that it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from pam_espnet.score.intervals import Ratio, mean_of
from pam_espnet.score.result import TaskResult

NOT_A_NUMBER = "not a number"

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_VALUE = {word: value for value, word in enumerate(_WORDS)}


def parse_count(answer: str) -> int | None:
    """The number that ``answer`` is, or None when it is not one (see the module's rule)."""
    answer = answer.strip().rstrip(".!").strip().lower()
    if re.fullmatch(r"[0-9]{1,2}", answer):
        return int(answer)
    return _VALUE.get(answer)


def score_counts(references: Mapping[str, str], hypotheses: Mapping[str, str]) -> TaskResult:
    """Accuracy (%) and mean absolute error over the utterances of ``references``.

    Args:
        references: utterance -> the true number, as text.
        hypotheses: utterance -> decoded answer, for at least the same utterances.

    Returns:
        ``details["per_count"]``: accuracy (%), error and answers that are no number, for each true number.
        ``details["confusion"]``: ``matrix[i][j]`` is how often the true number ``rows[i]`` was answered with
        ``columns[j]``; the last column is "not a number".

    Raises:
        ValueError: a reference is not a number.
    """
    keys = list(references)
    true: list[int] = []
    for key in keys:
        number = parse_count(references[key])
        if number is None:
            raise ValueError(f"the reference of {key} is not a number: {references[key]!r}")
        true.append(number)
    said = [parse_count(hypotheses[key]) for key in keys]

    correct = [float(left == right) for left, right in zip(true, said, strict=True)]
    distance = [0 if right is None else abs(left - right) for left, right in zip(true, said, strict=True)]
    known = [float(number is not None) for number in said]

    rows = sorted(set(true))
    numbers = sorted({*true, *(number for number in said if number is not None)})
    columns: list[int | None] = [*numbers, None]
    matrix = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for left, right in zip(true, said, strict=True):
        matrix[rows.index(left), columns.index(right)] += 1

    per_count = []
    for number in rows:
        own = [index for index, value in enumerate(true) if value == number]
        answered = sum(known[index] for index in own)
        per_count.append(
            {
                "count": number,
                "n": len(own),
                "accuracy": 100.0 * sum(correct[index] for index in own) / len(own),
                "mae": sum(distance[index] for index in own) / answered if answered else None,
                "not_a_number": len(own) - int(answered),
            }
        )
    silent = known.count(0.0)
    return TaskResult(
        keys,
        metrics={
            "accuracy": mean_of(correct, scale=100.0),
            "mae": Ratio(np.asarray(distance, dtype=np.float64), np.asarray(known)),
        },
        fields={"accuracy": {"correct": int(sum(correct))}, "mae": {"left_out": silent}},
        details={
            "not_a_number": silent,
            "per_count": per_count,
            "confusion": {
                "rows": [str(number) for number in rows],
                "columns": [*(str(number) for number in numbers), NOT_A_NUMBER],
                "matrix": matrix.tolist(),
            },
        },
    )
