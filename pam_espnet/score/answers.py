"""Scores of answers that are one of a few values, a number or yes/no: accuracy, confusion matrix, error of numbers.

An answer is read strictly: the whole of it is one or two digits or a number word from "zero" to "ten", or it is "yes"
or "no"; letter case, surrounding space and a closing full stop do not matter. Anything else ("two or three", "many",
nothing) is *not a number* or *no answer*: wrong in the accuracy, no part of the mean absolute error, and counted. So
read the error together with that number of answers.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pam_espnet.score.intervals import Ratio, mean_of
from pam_espnet.score.result import TaskResult

NOT_A_NUMBER = "not a number"
NO_ANSWER = "no answer"
CHOICES = ("no", "yes")

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class UnusableReferenceError(ValueError):
    """The reference of utterance ``key`` cannot be scored; ``hint`` is what to write."""

    def __init__(self, message: str, key: str, hint: str) -> None:
        super().__init__(message)
        self.key, self.hint = key, hint


def _word(answer: str) -> str:
    return answer.strip().rstrip(".!").strip().lower()


def parse_count(answer: str) -> int | None:
    """The number that ``answer`` is, or None (see the module's rule)."""
    word = _word(answer)
    if re.fullmatch(r"[0-9]{1,2}", word):
        return int(word)
    return _WORDS.index(word) if word in _WORDS else None


def parse_choice(answer: str) -> str | None:
    """``yes`` or ``no``, or None when ``answer`` is neither (see the module's rule)."""
    return _word(answer) if _word(answer) in CHOICES else None


def _pairs[T](
    references: Mapping[str, str],
    hypotheses: Mapping[str, str],
    parse: Callable[[str], T | None],
    wrong: str,
    hint: str,
) -> list[tuple[T, T | None]]:
    """(true, answered) of each utterance."""
    pairs = []
    for key, reference in references.items():
        if (true := parse(reference)) is None:
            raise UnusableReferenceError(f"the reference of {key!r} {wrong}: {reference!r}", key, hint)
        pairs.append((true, parse(hypotheses[key])))
    return pairs


def _result[T](
    keys: list[str], pairs: Sequence[tuple[T, T | None]], rows: Sequence[T], values: Sequence[T], none: str
) -> TaskResult:
    """Accuracy (%), and ``details["confusion"]``: ``matrix[i][j]`` is how often the true ``rows[i]`` was answered with
    ``columns[j]``, the last of which is ``none``."""
    correct = [float(true == answer) for true, answer in pairs]
    confusion = {
        "rows": [str(row) for row in rows],
        "columns": [*(str(value) for value in values), none],
        "matrix": [[pairs.count((row, value)) for value in (*values, None)] for row in rows],
    }
    return TaskResult(
        keys,
        metrics={"accuracy": mean_of(correct, scale=100.0)},
        fields={"accuracy": {"correct": int(sum(correct))}},
        details={none.replace(" ", "_"): sum(answer is None for _, answer in pairs), "confusion": confusion},
    )


def score_choices(references: Mapping[str, str], hypotheses: Mapping[str, str]) -> TaskResult:
    """Accuracy (%) of yes-or-no answers over the utterances of ``references``; raises as ``score_counts``."""
    pairs = _pairs(references, hypotheses, parse_choice, "is neither yes nor no", "write yes or no")
    return _result(list(references), pairs, CHOICES, CHOICES, NO_ANSWER)


def score_counts(references: Mapping[str, str], hypotheses: Mapping[str, str]) -> TaskResult:
    """Accuracy (%) and mean absolute error of numbers, in ``details["per_count"]`` for each true number, too.
    Raises UnusableReferenceError: a reference is not a number."""
    hint = "write digits, or zero to ten in words"
    pairs = _pairs(references, hypotheses, parse_count, "is not a number", hint)
    rows = sorted({true for true, _ in pairs})
    answers = [answer for _, answer in pairs if answer is not None]
    result = _result(list(references), pairs, rows, sorted({*rows, *answers}), NOT_A_NUMBER)
    # an answer that is no number has no distance
    distance = np.array([0 if answer is None else abs(true - answer) for true, answer in pairs], dtype=np.float64)
    known = np.array([answer is not None for _, answer in pairs], dtype=np.float64)
    result.metrics["mae"] = Ratio(distance, known)
    result.fields["mae"] = {"left_out": int((known == 0).sum())}
    result.details["per_count"] = []
    for number in rows:
        own = np.array([true == number for true, _ in pairs])
        result.details["per_count"].append(
            {
                "count": number,
                "n": int(own.sum()),
                "accuracy": 100.0 * pairs.count((number, number)) / int(own.sum()),
                "mae": Ratio(distance[own], known[own]).value,
                "not_a_number": pairs.count((number, None)),
            }
        )
    return result
