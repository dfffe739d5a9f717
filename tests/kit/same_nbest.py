"""Two n-best lists compared: the same tokens from the same blocks, scores up to rounding or bit for bit."""

from collections.abc import Sequence

import pytest

from pam_espnet.search.hypothesis import Hypothesis

NBest = Sequence[Sequence[Hypothesis]]  # of each utterance


def check_same(found: NBest, expected: NBest, atol: float = 1e-3) -> None:
    """Of two ways in float32; ``atol`` is of log-probabilities."""
    assert [[one.tokens for one in nbest] for nbest in found] == [[one.tokens for one in nbest] for nbest in expected]
    for one, other in zip(_flat(found), _flat(expected), strict=True):
        assert (one.ended, one.depths) == (other.ended, other.depths)
        assert one.log_probs == pytest.approx(other.log_probs, abs=atol)
        assert one.score == pytest.approx(other.score, abs=atol * len(one.tokens))


def check_identical(found: NBest, expected: NBest, exactly: bool) -> None:
    """Of one way in two batches; ``exactly``: to the last bit, else as in float32 on a CPU."""
    if not exactly:
        return check_same(found, expected, atol=1e-4)
    for one, other in zip(_flat(found), _flat(expected), strict=True):
        assert one == other, _difference(one, other)
    assert [len(nbest) for nbest in found] == [len(nbest) for nbest in expected]
    return None


def _flat(nbest: NBest) -> list[Hypothesis]:
    return [one for hypotheses in nbest for one in hypotheses]


def _difference(one: Hypothesis, other: Hypothesis) -> str:
    pairs = zip(one.tokens, other.tokens, strict=False)
    first = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(other.tokens)))
    drift = [abs(a - b) for a, b in zip(one.log_probs[:first], other.log_probs[:first], strict=True)]
    return f"tokens differ from {first} on, log-probabilities before by {max(drift, default=0.0):.3g}"
