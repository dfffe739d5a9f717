"""Percentile bootstrap over utterances, and a paired test, for corpus figures that are a function of sums.

Word error rate is sum(errors) / sum(words), and others have the same form (``Ratio``); BLEU and METEOR are functions of
more sums. So a few numbers per utterance are enough to resample every figure, and to compare two systems.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; Bisani and Ney, "Bootstrap estimates for
confidence intervals in ASR performance evaluation" (ICASSP 2004) for the paired form. An interval collapses to a point
where all utterances agree (an accuracy of exactly 100 %): the test set is then too easy to tell. One utterance has no
interval.

Dimension letters: N utterances, R resamples, C columns (numbers per utterance).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95

# Index numbers drawn at a time: bounds the memory to tens of megabytes whatever N and R are.
_BLOCK = 1 << 21


class Statistics(Protocol):
    """Numbers of each utterance, and the figure that their sums give."""

    @property
    def table(self) -> np.ndarray:
        """(N,C)."""

    def figures(self, sums: np.ndarray) -> np.ndarray:
        """Sums over utterances (R,C) -> figures (R,); not finite where a figure is undefined."""


@dataclass(frozen=True)
class Ratio:
    """A corpus figure ``scale * sum(numerator) / sum(denominator)``, both (N,), for example word errors and words."""

    numerator: np.ndarray
    denominator: np.ndarray
    scale: float = 1.0  # 100 for a percentage

    @property
    def table(self) -> np.ndarray:
        """(N,2): numerators and denominators."""
        return np.stack([self.numerator, self.denominator], axis=1)

    def figures(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.scale * sums[:, 0] / sums[:, 1]

    @property
    def value(self) -> float | None:
        """The figure over all utterances; None where the denominators add up to nothing."""
        return value_of(self)


class Interval(NamedTuple):
    """A figure and its confidence limits; all None where the figure is undefined."""

    value: float | None
    low: float | None
    high: float | None


def value_of(statistics: Statistics) -> float | None:
    """The figure over all utterances; None where it is undefined."""
    value = float(statistics.figures(statistics.table.sum(0, keepdims=True))[0])
    return value if np.isfinite(value) else None


def mean_of(values: Sequence[float] | np.ndarray, scale: float = 1.0) -> Ratio:
    """The mean of one number per utterance, as a ``Ratio``."""
    numerator = np.asarray(values, dtype=np.float64)
    return Ratio(numerator, np.ones_like(numerator), scale)


def bootstrap(statistics: Statistics, *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The figure with its 95 % percentile interval; the same seed and data give the same limits."""
    return _interval(value_of(statistics), _resampled(statistics), len(statistics.table), resamples, seed)


def bootstrap_difference(first: Statistics, second: Statistics) -> Interval:
    """``second`` minus ``first`` with its interval, both measured on the same utterances in the same order.

    Utterances are drawn once for both systems, so what is hard for both cancels. An interval that excludes zero is a
    difference at that confidence. ValueError: the numbers of utterances differ.
    """
    _check_pair(first, second)
    values = value_of(first), value_of(second)
    value = None if values[0] is None or values[1] is None else values[1] - values[0]
    left, right = _resampled(first), _resampled(second)
    return _interval(value, lambda *drawn: right(*drawn) - left(*drawn), len(first.table), RESAMPLES, SEED)


def bootstrap_seeds(runs: Sequence[Statistics], minus: Sequence[Statistics] = ()) -> Interval:
    """Mean over S trainings with S seeds, with an interval that counts both the seeds and the utterances.

    All seeds answer one test set: seeds and utterances are crossed, so both are resampled independently, and a draw of
    utterances holds for all seeds (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007; Owen and
    Eckles, in the same journal, 2012: errs towards too wide, where McCullagh, Bernoulli 2000, shows none to be exact).
    Other utterances for each seed would average the test set's own luck away as seeds are added. Seeds are too few to
    be drawn with replacement: of three, that gives their extremes, between which the median is in three cases of four.
    So a draw adds Student's t with S - 1 degrees of freedom times the standard error of the S figures: without spread
    between seeds this is ``bootstrap`` of the mean, without spread between utterances the t interval, and with one seed
    the interval of the utterances alone.

    Args:
        runs: of each seed, over the same utterances in the same order.
        minus: empty, or as many, in the order of the same seeds: the mean of the differences, paired over utterances
            and seeds.

    ValueError: different numbers of utterances or seeds.
    """
    if len(minus) not in (0, len(runs)):
        raise ValueError(f"{len(runs)} seeds against {len(minus)}: not pairs")
    systems = [*runs, *minus]
    for other in systems[1:]:
        _check_pair(runs[0], other)
    figures = [value_of(system) for system in systems]
    if None in figures:
        return Interval(None, None, None)

    def differences(table: np.ndarray) -> np.ndarray:
        """Figures of all systems, (S,...) or (2*S,...) -> (S,...)."""
        first, *second = table.reshape(-1, len(runs), *table.shape[1:])
        return first - second[0] if second else first

    values, noise = differences(np.array(figures, dtype=np.float64)), np.zeros(RESAMPLES)
    if len(runs) > 1:
        from scipy import stats

        # Exact quantiles in random order: with two degrees of freedom those of a sample are coarse.
        grid = (np.random.default_rng(SEED + 1).permutation(RESAMPLES) + 0.5) / RESAMPLES
        noise = stats.t.ppf(grid, len(runs) - 1) * values.std(ddof=1) / len(runs) ** 0.5
    resampled = [_resampled(system) for system in systems]

    def mean(drawn: np.ndarray, axis: int) -> np.ndarray:
        return differences(np.stack([figure(drawn, axis) for figure in resampled])).mean(0)

    return _interval(float(values.mean()), mean, len(runs[0].table), RESAMPLES, SEED, noise)


def _resampled(statistics: Statistics) -> Callable[[np.ndarray, int], np.ndarray]:
    """Maps drawn utterances (R,N) to figures (R,)."""
    columns = statistics.table.T
    return lambda drawn, axis: statistics.figures(np.stack([column[drawn].sum(axis) for column in columns], axis=-1))


def _interval(
    value: float | None,
    figures: Callable[[np.ndarray, int], np.ndarray],
    count: int,
    resamples: int,
    seed: int,
    noise: np.ndarray | float = 0.0,
) -> Interval:
    """Percentile interval of ``figures`` over draws of ``count`` utterances, to which ``noise`` (R,) is added."""
    if value is None or count < 2:
        return Interval(value, None, None)
    from scipy import stats  # takes a second to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            [np.arange(count)], lambda drawn, axis: figures(drawn, axis), method="percentile", vectorized=True,
            n_resamples=resamples, batch=max(1, _BLOCK // count), rng=np.random.default_rng(seed),
        ).bootstrap_distribution  # fmt: skip
    # A resample that drew only zero denominators has no figure and tells nothing about the spread; scipy would give up.
    drawn = (drawn + noise)[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def paired_p_value(first: Statistics, second: Statistics) -> float | None:
    """Two-sided p-value of the difference, by approximate randomisation over utterances; None where it is undefined.

    Were the two systems the same, each utterance's statistics could change sides: p is how often the difference is then
    at least as large as the one observed; over all ways to do so where they are at most ``RESAMPLES``. Noreen,
    "Computer-Intensive Methods for Testing Hypotheses" (1989); Riezler and Maxwell (ACL workshop 2005) recommend it
    over the bootstrap for comparing systems. ValueError: the numbers of utterances differ.
    """
    left, right = _check_pair(first, second)
    if value_of(first) is None or value_of(second) is None or len(left) < 2:
        return None
    from scipy import stats

    def difference(signs: np.ndarray, axis: int) -> np.ndarray:
        """(R,N), -1 where an utterance changes sides -> (R,)."""
        moved = np.atleast_2d(signs < 0) @ (right - left)
        figures = np.abs(second.figures(right.sum(0) - moved) - first.figures(left.sum(0) + moved))
        # Sums of floats in another order differ in the last digits; that is no other difference.
        return np.nan_to_num(figures, nan=np.inf).round(9).reshape(signs.shape[:-1])

    found = stats.permutation_test(
        [np.ones(len(left))], difference, permutation_type="samples", vectorized=True, alternative="greater",
        n_resamples=RESAMPLES, batch=max(1, _BLOCK // len(left)), rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return float(found.pvalue)


def _check_pair(first: Statistics, second: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Both tables, as float64."""
    if len(first.table) != len(second.table):
        raise ValueError(f"{len(first.table)} utterances against {len(second.table)}: not a pair")
    return first.table.astype(np.float64), second.table.astype(np.float64)
