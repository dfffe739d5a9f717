"""Numbers and yes-or-no answers: the parsers' rule and scores counted by hand."""

import pytest

from pam_espnet.score.answers import NO_ANSWER, NOT_A_NUMBER, parse_choice, parse_count, score_choices, score_counts


@pytest.mark.parametrize(
    ("answer", "number"),
    [("3", 3), (" 3. ", 3), ("Three", 3), ("ten!", 10), ("zero", 0), ("12", 12), ("07", 7)]
    + [(text, None) for text in ("", "eleven", "-1", "3.5", "two or three", "3 people", "111", "²", "٣", ".")],
)
def test_numbers(answer: str, number: int | None) -> None:
    assert parse_count(answer) == number


def test_scores_of_numbers_by_hand() -> None:
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
    with pytest.raises(ValueError, match="reference of 'a' is not a number: 'some'"):
        score_counts({"a": "some"}, {"a": "1"})


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("yes", "yes"), (" No. ", "no"), ("YES!", "yes")]
    + [(text, None) for text in ("", "maybe", "yes, three", "yes no", "true", ".")],
)
def test_choices(answer: str, choice: str | None) -> None:
    assert parse_choice(answer) == choice


def test_scores_of_choices_by_hand() -> None:
    references = {"a": "yes", "b": "yes", "c": "no", "d": "no"}
    result = score_choices(references, {"a": "Yes.", "b": "no", "c": "no", "d": "there are two"})
    assert result.metrics["accuracy"].value == 50.0 and result.fields == {"accuracy": {"correct": 2}}
    assert result.details == {
        "no_answer": 1,
        "confusion": {"rows": ["no", "yes"], "columns": ["no", "yes", NO_ANSWER], "matrix": [[1, 0, 1], [1, 1, 0]]},
    }


def test_a_reference_must_be_a_choice() -> None:
    with pytest.raises(ValueError, match="reference of 'a' is neither yes nor no: 'two'"):
        score_choices({"a": "two"}, {"a": "yes"})
