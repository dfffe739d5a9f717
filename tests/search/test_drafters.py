"""Where a draft goes on after the LLM has said something else."""

from __future__ import annotations

import pytest

from pam_espnet.search.drafters import NoDraft, WholeAnswer

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


def test_no_draft() -> None:
    assert list(NoDraft().propose(0, [1], 9)) == []
