"""Word and character errors on cases counted by hand."""

import numpy as np
import pytest

from pam_espnet.score.wer import align, count_errors, has_loop, is_refusal, normaliser_record, score_wer


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("the cat sat", "the cat sat", [0, 0, 0, 3]),
        ("the cat sat", "the dog sat", [1, 0, 0, 3]),
        ("the cat sat", "the sat", [0, 1, 0, 3]),
        ("the cat sat", "the black cat sat", [0, 0, 1, 3]),
        ("the cat sat", "", [0, 3, 0, 3]),
        ("", "who is there", [0, 0, 3, 0]),
        ("", "", [0, 0, 0, 0]),
        ("the cat", "the\tcat\n", [0, 0, 0, 2]),  # any white space parts words
        ("The cat", "the cat", [1, 0, 0, 2]),  # as given: letter case counts
    ],
)
def test_words(reference: str, hypothesis: str, errors: list[int]) -> None:
    assert count_errors([reference], [hypothesis]).tolist() == [errors]


def test_characters_count_the_space_between_words() -> None:
    assert count_errors(["ab c", ""], ["abc", "x"], "characters").tolist() == [[0, 1, 0, 4], [0, 0, 1, 0]]


def test_corpus_figures_raw_and_normalised() -> None:
    references = {"a": "mister smith has twenty one dogs", "b": "it's a test", "c": ""}
    hypotheses = {"a": "Mr. Smith has 21 dogs", "b": "", "c": "uh"}
    result = score_wer(references, hypotheses)
    # a: mister/Mr., smith/Smith, twenty/21 and one missing; b: three missing; c: one too much
    assert result.fields["wer"] == {"substitutions": 3, "deletions": 4, "insertions": 1, "words": 9}
    assert result.metrics["wer"].value == pytest.approx(100 * 8 / 9)
    # normalised, a is right; "it's a test" has four words; "uh" is a hesitation and goes
    assert result.fields["wer_normalised"] == {"substitutions": 0, "deletions": 4, "insertions": 0, "words": 9}
    assert result.metrics["wer_normalised"].numerator.tolist() == [0, 4, 0]
    assert result.details["empty_hypotheses"] == 1
    assert result.details["empty_references"] == 1
    assert normaliser_record()["package"] == "whisper-normalizer" and normaliser_record()["version"]


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("it's don't we'll", "it\u2019s don\u2018t we\u02bcll"),
        ("a well-known caf\u00e9", "a well\u2010known cafe\u0301"),
        ("co-operate \u2013 now", "co\u2011operate \u2014 now"),
        ('"first" office', "\u201c\ufb01rst\u201d of\u00adfice"),
        ("wide words", "\uff57ide\u00a0words\u200b"),
    ],
)
def test_the_same_words_in_other_characters_are_no_errors(reference: str, hypothesis: str) -> None:
    result = score_wer({"a": reference}, {"a": hypothesis})
    assert result.metrics["wer_normalised"].value == result.metrics["cer_normalised"].value == 0.0
    assert result.metrics["wer"].value > 0.0  # as given


def test_a_corpus_of_empty_references_is_undefined_not_an_error() -> None:
    result = score_wer({"a": ""}, {"a": "noise"})
    assert result.metrics["wer"].value is None
    assert result.fields["cer"]["insertions"] == 5


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("no no no no", True),
        ("no no no", False),
        ("well i think i think i think i think so", True),
        ("i think so i think so i think so", False),
        ("a b c d a b c d a b c d a b c d", True),
        ("a b a c a b a c", False),
        ("", False),
    ],
)
def test_loops(text: str, loop: bool) -> None:
    assert has_loop(text) is loop


def test_a_loop_of_the_reference_is_not_counted() -> None:
    loop = "no no no no"
    assert score_wer({"a": loop, "b": "no"}, {"a": loop, "b": loop}).details["loop_utterances"] == ["b"]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't listen to audio files.",
        "Sorry, but as an AI, I have no ears.",
        "Unfortunately, I am unable to transcribe this recording.",
        "i cannot provide a transcription",
        "As a language model I read text.",
        "Please provide the audio.",
        "I’m unable to hear it",
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    ["i'm sorry that number is not in service", "i cannot come to the door", "please hold the line", "sorry i am", ""],
)
def test_ordinary_sentences_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_a_refusal_of_the_reference_is_not_counted() -> None:
    refusal = "i can't help you"
    details = score_wer({"a": refusal, "b": "yes"}, {"a": refusal, "b": refusal}).details
    assert (details["refusals"], details["refusal_utterances"]) == (1, ["b"])


def test_the_worst_utterances_come_first_and_right_ones_never() -> None:
    references = {f"u{index:02}": "a b c d e f g h i j k l m" for index in range(13)}
    hypotheses = {key: " ".join("abcdefghijklm"[index:]) for index, key in enumerate(references)}
    worst = score_wer(references, hypotheses).details["worst"]
    assert [entry["utt"] for entry in worst] == [f"u{index:02}" for index in range(12, 2, -1)]
    assert worst[0]["errors"] == 12
    assert score_wer({"a": "x"}, {"a": "x"}).details["worst"] == []


def test_alignment_as_text() -> None:
    assert align("a b c", "a x c d") == "REF: a b c *\nHYP: a x c d\n       S   I"


def test_counts_per_utterance_have_one_row_each() -> None:
    table = count_errors(["a b", "c"], ["a", "c d"])
    assert table.shape == (2, 4)
    np.testing.assert_array_equal(table.sum(0), [0, 1, 1, 3])
