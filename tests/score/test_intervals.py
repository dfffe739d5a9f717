"""Bootstrap intervals: values by hand, coverage against the normal approximation, pairs."""

import numpy as np
import pytest
import scipy.stats

from pam_espnet.score import intervals
from pam_espnet.score.intervals import (
    Interval,
    Ratio,
    bootstrap,
    bootstrap_difference,
    bootstrap_seeds,
    mean_of,
    paired_p_value,
)


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


def test_seeds_without_spread_give_the_bootstrap_and_utterances_without_spread_the_t_interval() -> None:
    rng = np.random.default_rng(2)
    errors, words = rng.integers(0, 4, 80), rng.integers(3, 9, 80)
    one, other = Ratio(errors, words, 100.0), Ratio(rng.permutation(errors), words, 100.0)
    assert bootstrap_seeds([one]) == bootstrap(one)  # one seed: the utterances alone
    assert bootstrap_seeds([one] * 3) == pytest.approx(bootstrap(one))
    assert bootstrap_seeds([other] * 3, [one] * 3) == pytest.approx(bootstrap_difference(one, other))
    figures = np.array([0.2, 0.5, 0.9])
    value, low, high = bootstrap_seeds([mean_of([figure] * 10) for figure in figures])
    expected = scipy.stats.t.interval(0.95, 2, figures.mean(), scipy.stats.sem(figures))
    assert value == pytest.approx(figures.mean()) and (low, high) == pytest.approx(expected, abs=0.02)


def test_the_interval_over_seeds_covers_the_expectation() -> None:
    """A crossed model of known variances: what utterances and seeds have each for all, and what is of each cell. The
    bootstrap of utterances, which a table of one seed has, is far from covering it."""
    rng = np.random.default_rng(3)
    covered, alone, trials = 0, 0, 150
    for _ in range(trials):
        hard, luck = rng.normal(0, 1.0, 60), rng.normal(0, 0.3, (3, 1))
        runs = [mean_of(row) for row in hard + luck + rng.normal(0, 0.5, (3, 60))]
        low, high = bootstrap_seeds(runs)[1:]
        covered += low <= 0 <= high
        low, high = bootstrap(runs[0])[1:]
        alone += low <= 0 <= high
    assert 0.90 <= covered / trials <= 0.99 and alone / trials < 0.75


def test_differences_pair_seeds_and_utterances() -> None:
    hard, luck = np.random.default_rng(4).normal(0, 1, (2, 40))
    first = [mean_of(hard + shift) for shift in luck[:3]]
    better = [mean_of(hard + shift - 0.5) for shift in luck[:3]]
    assert bootstrap_seeds(better, first) == pytest.approx((-0.5, -0.5, -0.5))
    with pytest.raises(ValueError, match="3 seeds against 2"):
        bootstrap_seeds(better, first[:2])
    with pytest.raises(ValueError, match="not a pair"):
        bootstrap_seeds([*first, mean_of([1.0])])
    assert bootstrap_seeds([first[0], mean_of(np.full(40, np.nan))]) == Interval(None, None, None)
