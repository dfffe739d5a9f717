"""Number answers: the parser's rule and scores counted by hand."""

from __future__ import annotations

import pytest

from pam_espnet.score.counting import NOT_A_NUMBER, parse_count, score_counts


@pytest.mark.parametrize(
    ("answer", "number"),
    [("3", 3), (" 3. ", 3), ("Three", 3), ("ten!", 10), ("zero", 0), ("12", 12), ("07", 7)]
    + [(text, None) for text in ("", "eleven", "-1", "3.5", "two or three", "3 people", "111", "²", "٣", ".")],
)
def test_parser(answer: str, number: int | None) -> None:
    assert parse_count(answer) == number


def test_scores_by_hand() -> None:
    references = {"a": "0", "b": "1", "c": "two", "d": "2"}
    hypotheses = {"a": "0", "b": "4", "c": "2", "d": "many"}
    result = score_counts(references, hypotheses)
    assert result.metrics["accuracy"].value == 50.0
    assert result.metrics["mae"].value == 1.0  # distances 0, 3, 0; "many" has none
    assert result.fields == {"accuracy": {"correct": 2}, "mae": {"left_out": 1}}
    assert result.details["per_count"] == [
        {"count": 0, "n": 1, "accuracy": 100.0, "mae": 0.0, "not_a_number": 0},
        {"count": 1, "n": 1, "accuracy": 0.0, "mae": 3.0, "not_a_number": 0},
        {"count": 2, "n": 2, "accuracy": 50.0, "mae": 0.0, "not_a_number": 1},
    ]
    assert result.details["confusion"] == {
        "rows": ["0", "1", "2"],
        "columns": ["0", "1", "2", "4", NOT_A_NUMBER],
        "matrix": [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 0, 1]],
    }


def test_no_number_at_all_leaves_the_error_undefined() -> None:
    result = score_counts({"a": "1"}, {"a": "?"})
    assert result.metrics["accuracy"].value == 0.0
    assert result.metrics["mae"].value is None
    assert result.details["per_count"][0]["mae"] is None


def test_a_reference_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="reference of a is not a number: 'some'"):
        score_counts({"a": "some"}, {"a": "1"})
