"""Where a draft goes on after the LLM has said something else, and what an n-gram brings back."""

from __future__ import annotations

import pytest

from pam_espnet.search.drafters import NgramLookup, NoDraft, WholeAnswer

DRAFT = "the cat sat on the mat"


def propose(answer: str, draft: str = DRAFT, most: int = 64) -> str:
    return " ".join(WholeAnswer([draft.split()], "words").propose(0, answer.split(), most))  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("", DRAFT),
        ("the", "cat sat on the mat"),
        ("a", "cat sat on the mat"),  # substitution
        ("the dog", "sat on the mat"),
        ("the fat dog", "on the mat"),  # two substitutions, as long as nothing says otherwise
        ("the fat cat", "sat on the mat"),  # insertion
        ("oh the", "cat sat on the mat"),
        ("cat", "sat on the mat"),  # deletion
        ("the sat", "on the mat"),
        ("the cat sat the", "mat"),
        ("a fat cat sat down on", "the mat"),  # all of them
        ("the cat sat on the mat", ""),
        ("the cat sat on the mat again", ""),
        ("one two three four five six seven", ""),
    ],
)
def test_drafts_find_their_place_again(answer: str, rest: str) -> None:
    assert propose(answer) == rest


def test_a_growing_answer_gives_what_a_new_one_does() -> None:
    whole, answer = WholeAnswer([[1, 2, 3, 4, 5, 6], [7]], "whole"), []
    for token in (1, 9, 3, 3, 5):
        answer.append(token)
        assert list(whole.propose(0, answer, 9)) == list(WholeAnswer([[1, 2, 3, 4, 5, 6]], "new").propose(0, answer, 9))
    assert list(whole.propose(1, [], 9)) == [7]
    assert propose("the", most=2) == "cat sat"
    assert propose("the", draft="") == ""


def test_ngrams() -> None:
    lookup = NgramLookup([[1, 2, 3, 4], [], [5, -7, 6]], size=2)
    assert list(lookup.propose(0, [8, 2], 9)) == [3, 4, 8, 2]  # the prompt, and on into the answer
    assert list(lookup.propose(0, [2], 1)) == [3]
    assert list(lookup.propose(0, [2, 7, 3, 2], 9)) == [7, 3, 2]  # the latest place
    assert list(lookup.propose(0, [2, 3, 9, 7, 3, 8, 2, 3], 2)) == [9, 7]  # the longest n-gram before the latest one
    assert list(lookup.propose(1, [], 9)) == list(lookup.propose(1, [4], 9)) == []
    assert list(lookup.propose(2, [5], 9)) == []  # what followed cannot be said
    assert list(NoDraft().propose(0, [1], 9)) == []
