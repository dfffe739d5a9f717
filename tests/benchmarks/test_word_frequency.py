"""Errors are counted for words as often as training has them."""

from benchmarks.word_frequency import counts


def test_errors_by_frequency() -> None:
    training = ["press one", "press two press", "press three", "press four", "two cows"]
    references = {"a": "press one for cows", "b": "press two", "c": "zebra"}
    hypotheses = {"a": "press on for the cows now", "b": "two", "c": ""}
    table, insertions = counts(training, references, hypotheses)
    # "press" is in four texts; "one", "two", "cows" in one or two; "for", "zebra" in none
    assert table == {"none": (2, 1), "1 to 3": (3, 1), "more": (2, 1)}
    assert insertions == 2
