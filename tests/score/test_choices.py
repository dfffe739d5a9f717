"""Yes-or-no answers: the parser's rule and scores counted by hand."""

from __future__ import annotations

import pytest

from pam_espnet.score.choices import NO_ANSWER, parse_choice, score_choices


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("yes", "yes"), (" No. ", "no"), ("YES!", "yes")]
    + [(text, None) for text in ("", "maybe", "yes, three", "yes no", "true", ".")],
)
def test_parser(answer: str, choice: str | None) -> None:
    assert parse_choice(answer) == choice


def test_scores_by_hand() -> None:
    references = {"a": "yes", "b": "yes", "c": "no", "d": "no"}
    result = score_choices(references, {"a": "Yes.", "b": "no", "c": "no", "d": "there are two"})
    assert result.metrics["accuracy"].value == 50.0 and result.fields == {"accuracy": {"correct": 2}}
    assert result.details == {
        "no_answer": 1,
        "confusion": {"rows": ["no", "yes"], "columns": ["no", "yes", NO_ANSWER], "matrix": [[1, 0, 1], [1, 1, 0]]},
    }


def test_a_reference_must_be_a_choice() -> None:
    with pytest.raises(ValueError, match="reference of a is neither yes nor no: 'two'"):
        score_choices({"a": "two"}, {"a": "yes"})
