"""CIDEr-D, ROUGE-L and BLEU: by hand, and against figures measured with pycocoevalcap (see the JSON file beside)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_espnet.score import captions
from pam_espnet.score.bleu import Bleu, count_matches
from pam_espnet.score.captions import CiderD, rouge_l, score_captions, tokenize
from pam_espnet.score.intervals import bootstrap, value_of

FIXED = json.loads((Path(__file__).parent / "captions_reference.json").read_text(encoding="utf-8"))


def test_agreement_with_pycocoevalcap() -> None:
    utterances = FIXED["utterances"]
    result = score_captions(
        {key: entry["references"] for key, entry in utterances.items()},
        {key: entry["hypothesis"] for key, entry in utterances.items()},
    )
    for name in ("cider_d", "rouge_l"):
        measured = [entry[name] for entry in utterances.values()]
        assert result.metrics[name].numerator.tolist() == pytest.approx(measured, abs=1e-6)
        assert result.metrics[name].value == pytest.approx(FIXED["corpus"][name], abs=1e-6)
    for order in range(1, 5):  # there, every count is 1e-15 or 1e-9 larger
        name = f"bleu_{order}"
        assert value_of(result.metrics[name]) == pytest.approx(FIXED["corpus"][name], abs=1e-8)
    assert result.details["references_per_utterance"] == {"5": 6}
    assert result.details["empty_hypotheses"] == 1


def test_cider_by_hand() -> None:
    # Two documents of one reference each; every n-gram occurs in one of them, so its weight is its count * log 2.
    cider = CiderD([[["a", "b", "c", "d"]], [["e", "f"]]])
    assert cider.score(["a", "b", "c", "d"], [["a", "b", "c", "d"]]) == pytest.approx(10.0)
    # "e f" has no 3- and 4-grams: its cosine is 1 for n = 1, 2 and 0 for n = 3, 4
    assert cider.score(["e", "f"], [["e", "f"]]) == pytest.approx(5.0)
    # "e e f" against "e f": clipped at one "e", length penalty exp(-1/72)
    unigrams = (1 * 1 + 1 * 1) / (math.sqrt(5) * math.sqrt(2))
    bigrams = 1 / math.sqrt(2)  # "e e" is unknown (weight log 2 too), "e f" is shared
    expected = 10 * math.exp(-1 / 72) * (unigrams + bigrams) / 4
    assert cider.score(["e", "e", "f"], [["e", "f"]]) == pytest.approx(expected)


def test_rouge_by_hand() -> None:
    # The common subsequence of "a b c" is 2 long with both references: precision 2/3, best recall 2/2.
    precision, recall, weight = 2 / 3, 1.0, 1.2**2
    expected = (1 + weight) * precision * recall / (recall + weight * precision)
    assert rouge_l(["a", "b", "c"], [["a", "c"], ["b", "x", "c", "y"]]) == pytest.approx(expected)
    assert rouge_l([], [["a"]]) == 0.0
    assert rouge_l(["a"], [["b"], []]) == 0.0


def test_bleu_by_hand() -> None:
    # seven times "the", and at most twice in a reference: 2 of 7 (Papineni et al., section 2.1)
    given = ["the"] * 7
    wanted = [["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]
    assert count_matches(given, wanted) == [2, 0, 0, 0, 7, 6, 5, 4, 7, 7]
    counts = np.array([count_matches(given, wanted)], dtype=float)
    assert value_of(Bleu.of(counts, 1)) == pytest.approx(2 / 7)
    assert value_of(Bleu.of(counts, 2)) == 0.0  # an order without a match
    # two of three words right, and one word too short for the closest reference: exp(1 - 4/3)
    short = np.array([count_matches(["a", "b", "x"], [["a", "b", "c", "d"]])], dtype=float)
    assert value_of(Bleu.of(short, 1)) == pytest.approx(2 / 3 * math.exp(1 - 4 / 3))
    assert value_of(Bleu.of(short, 2)) == pytest.approx(math.sqrt(2 / 3 * 1 / 2) * math.exp(1 - 4 / 3))
    nothing = np.array([count_matches([], [["a"]])], dtype=float)
    assert value_of(Bleu.of(nothing, 1)) == 0.0


def test_bleu_has_an_interval() -> None:
    counts = np.array([count_matches(["a", "b"], [["a", "b"]]), count_matches(["x", "y"], [["a", "b"]])], dtype=float)
    value, low, high = bootstrap(Bleu.of(counts, 2))
    assert value == 0.5 and (low, high) == (0.0, 1.0)


def test_all_references_count() -> None:
    # A caption that equals the fifth reference only: a scorer that reads the first alone gives 0.
    references = {"u": ["a", "b", "c", "d", "dogs bark"], "v": ["e", "f", "g", "h", "rain falls"]}
    result = score_captions(references, {"u": "dogs bark", "v": "rain falls"})
    assert result.metrics["rouge_l"].value == 1.0
    assert result.metrics["cider_d"].numerator.tolist() == pytest.approx([1.0, 1.0])  # 5.0 / five references


def test_a_set_too_small_for_a_metric_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    # One document: every weight of CIDEr-D is log(1) = 0, whatever the caption. No 4-grams: nothing for BLEU-4.
    alone = score_captions({"u": ["dogs bark loudly"]}, {"u": "dogs bark loudly"})
    assert alone.metrics["cider_d"].value is None and value_of(alone.metrics["bleu_3"]) == 1.0
    assert "document frequencies" in alone.details["not_computed"]["cider_d"]
    assert "4 words" in alone.details["not_computed"]["bleu_4"] and "bleu_4" not in alone.metrics
    monkeypatch.setattr(captions, "spice", lambda given, wanted: [0.5])
    assert "CIDEr-D" in score_captions({"u": ["a"]}, {"u": "a"}).details["not_computed"]["spider"]
    # A perfect caption scores otherwise in a larger set, so a resample must not rebuild the frequencies.
    texts = {"u": "dogs bark loudly", "v": "rain falls"}
    pair = score_captions({key: [text] for key, text in texts.items()}, texts)
    assert pair.metrics["cider_d"].numerator.tolist() == pytest.approx([7.5, 5.0])
    assert "cider_d" not in pair.details["not_computed"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog barks, and a man's voice doesn't stop!", "a dog barks and a man 's voice does n't stop"),
        ('They’re "laughing" -- it\'ll rain', "they 're laughing it 'll rain"),
        ("Well-known engine (idling) at 3.5 kHz; birds...", "well-known engine idling at 3.5 khz birds"),
        ("the dogs' barking 'loudly'", "the dogs barking loudly"),
        ("?!", ""),
        ("a well\u2011known cafe\u0301", "a well-known caf\u00e9"),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    assert " ".join(tokenize(text)) == tokens


_CAPTION = st.lists(st.sampled_from(["a", "dog", "barks", "rain", "bell"]), max_size=9)


@settings(max_examples=60, deadline=None)
@given(hypothesis=_CAPTION, references=st.lists(_CAPTION, min_size=1, max_size=5))
def test_scores_stay_in_their_range(hypothesis: list[str], references: list[list[str]]) -> None:
    cider = CiderD([references, [["a", "horn", "honks"]]])
    assert 0.0 <= cider.score(hypothesis, references) <= 10.0 + 1e-9
    assert 0.0 <= rouge_l(hypothesis, references) <= 1.0 + 1e-9
    if hypothesis:
        assert rouge_l(hypothesis, [hypothesis, *references]) == pytest.approx(1.0)


def test_an_utterance_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="u has no reference"):
        score_captions({"u": []}, {"u": "x"})
