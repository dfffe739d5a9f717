"""Bootstrap intervals: values by hand, coverage against the normal approximation, pairs."""

from __future__ import annotations

import numpy as np
import pytest

from pam_espnet.score import intervals
from pam_espnet.score.intervals import Interval, Ratio, bootstrap, bootstrap_difference, mean_of, paired_p_value


def test_the_value_is_the_ratio_of_the_sums_not_the_mean_of_the_ratios() -> None:
    # 1 error in 1 word and 0 in 9: 10 %, where the mean of the rates would be 50 %.
    interval = bootstrap(Ratio(np.array([1, 0]), np.array([1, 9]), scale=100.0))
    assert interval.value == 10.0


def test_the_limits_agree_with_the_normal_approximation() -> None:
    hits = np.zeros(400)
    hits[:100] = 1
    low, high = bootstrap(mean_of(hits), resamples=4000)[1:]
    spread = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - spread, abs=0.006)
    assert high == pytest.approx(0.25 + spread, abs=0.006)


def test_equal_utterances_have_no_spread_and_nothing_has_no_value() -> None:
    assert bootstrap(mean_of([0.5] * 7)) == Interval(0.5, 0.5, 0.5)
    assert bootstrap(mean_of([])) == Interval(None, None, None)
    assert bootstrap(mean_of([0.5])) == Interval(0.5, None, None)  # one utterance has no spread to tell
    # only empty references: insertions, and not one word to divide by
    assert bootstrap(Ratio(np.array([2, 1]), np.array([0, 0]))) == Interval(None, None, None)


def test_the_seed_decides_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = mean_of(np.random.default_rng(1).random(50))
    whole = bootstrap(ratio, seed=3)
    assert bootstrap(ratio, seed=3) == whole
    assert bootstrap(ratio, seed=4) != whole
    monkeypatch.setattr(intervals, "_BLOCK", 120)  # two resamples at a time
    assert bootstrap(ratio, seed=3) == whole


def test_a_resample_without_a_denominator_is_left_out() -> None:
    # Most resamples of these two draw the utterance with words at least once; the others have no figure.
    interval = bootstrap(Ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0])), resamples=200)
    assert interval == Interval(0.5, 0.5, 0.5)


def test_a_paired_difference_cancels_what_both_find_hard() -> None:
    hard = np.random.default_rng(0).integers(0, 20, 60).astype(float)
    first, second = mean_of(hard), mean_of(hard - 0.5)
    assert bootstrap_difference(first, second) == Interval(-0.5, -0.5, -0.5)
    low, high = bootstrap(first)[1:]
    assert high - low > 1  # alone, each is far less certain
    with pytest.raises(ValueError, match="not a pair"):
        bootstrap_difference(first, mean_of([1.0]))


def test_the_p_value_of_few_pairs_by_hand() -> None:
    # Three pairs that all differ by 1: of the 8 ways to swap, 2 (none, all) give a difference as large.
    first, second = mean_of([0.0, 0.0, 0.0]), mean_of([1.0, 1.0, 1.0])
    assert paired_p_value(first, second) == 2 / 8
    assert paired_p_value(mean_of([0.0]), mean_of([1.0])) is None


def test_the_p_value_separates_noise_from_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(5, 15, 200)
    errors = rng.integers(0, 4, 200)
    same, better = Ratio(rng.permutation(errors), words), Ratio(np.maximum(errors - 1, 0), words)
    first = Ratio(errors, words)
    assert paired_p_value(first, first) == 1.0
    noise, real = paired_p_value(first, same), paired_p_value(first, better)
    assert noise is not None and noise > 0.05
    assert real == pytest.approx(1 / 1001)  # none of the trials
    monkeypatch.setattr(intervals, "_BLOCK", 1000)  # five trials at a time
    assert paired_p_value(first, better) == pytest.approx(1 / 1001)
    assert paired_p_value(Ratio(np.array([1]), np.array([0])), mean_of([1.0])) is None
    with pytest.raises(ValueError, match="not a pair"):
        paired_p_value(first, mean_of([1.0]))
