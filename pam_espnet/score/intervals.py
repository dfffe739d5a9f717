"""Percentile bootstrap over utterances for corpus figures that are a function of sums over utterances.

Word error rate is sum(errors) / sum(words); accuracy, mean absolute error and the mean of a caption score have the
same form (``Ratio``); BLEU is a function of more sums (``metrics/bleu.py``). So a few numbers per utterance are enough
to resample every figure of this package, and to compare two systems on the same utterances. This module knows nothing
about words, counts or captions.

Method: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13 (percentile interval); Bisani and
Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004) for the paired form.
A percentile interval collapses to a point where all utterances agree (an accuracy of exactly 100 %): it then says
that the test set is too easy to tell, not that the figure is certain.

Dimension letters: N utterances, R resamples, C columns (numbers per utterance).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Per-utterance statistics of a corpus figure: ``scale * sum(numerator) / sum(denominator)``.

    Args:
        numerator: (N,) for example word errors.
        denominator: (N,) for example reference words; all ones for a mean.
        scale: 100 for a percentage.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.numerator.ndim != 1 or self.numerator.shape != self.denominator.shape:
            raise ValueError(f"two vectors of one length wanted: {self.numerator.shape}, {self.denominator.shape}")

    @property
    def table(self) -> np.ndarray:
        """(N,2): numerators and denominators."""
        return np.stack([self.numerator, self.denominator], axis=1)

    def figures(self, sums: np.ndarray) -> np.ndarray:
        """See ``Statistics``."""
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
    sums = np.array([[column.sum() for column in statistics.table.T]])
    value = float(statistics.figures(sums)[0])
    return value if np.isfinite(value) else None


def mean_of(values: Sequence[float] | np.ndarray, scale: float = 1.0) -> Ratio:
    """The mean of one number per utterance, as a ``Ratio``."""
    numerator = np.asarray(values, dtype=np.float64)
    return Ratio(numerator, np.ones_like(numerator), scale)


def _resampled(several: Sequence[Statistics], resamples: int, seed: int) -> list[np.ndarray]:
    """Draw N utterances with replacement, R times, the same ones for all statistics; (R,) figures for each."""
    columns = [statistics.table.T for statistics in several]
    count = columns[0].shape[1]
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(count, 1))
    blocks: list[list[np.ndarray]] = [[] for _ in several]
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, count, size=(min(rows, resamples - start), count))
        for statistics, table, parts in zip(several, columns, blocks, strict=True):
            parts.append(statistics.figures(np.stack([column[drawn].sum(1) for column in table], axis=1)))
    return [np.concatenate(parts) for parts in blocks]


def _limits(value: float | None, figures: np.ndarray, level: float) -> Interval:
    # A resample that drew only zero denominators has no figure and tells nothing about the spread.
    figures = figures[np.isfinite(figures)]
    if value is None or not len(figures):
        return Interval(value, None, None)
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def bootstrap(
    statistics: Statistics, *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL
) -> Interval:
    """The figure with its percentile interval at confidence ``level``.

    Args:
        statistics: of N utterances.
        resamples: R; 1000 is the usual least for a 95 % interval.
        seed: the same seed and data give the same limits.
    """
    if not len(statistics.table):
        return Interval(None, None, None)
    return _limits(value_of(statistics), _resampled([statistics], resamples, seed)[0], level)


def bootstrap_difference(
    first: Statistics, second: Statistics, *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL
) -> Interval:
    """``second`` minus ``first`` with its interval, both measured on the same utterances in the same order.

    Utterances are drawn once for both systems, so what is hard for both cancels. An interval that leaves zero out is
    a difference at that confidence.

    Raises:
        ValueError: the two do not have the same number of utterances.
    """
    _check_pair(first, second)
    values = value_of(first), value_of(second)
    if values[0] is None or values[1] is None:
        return Interval(None, None, None)
    figures = _resampled([first, second], resamples, seed)
    return _limits(values[1] - values[0], figures[1] - figures[0], level)


def paired_p_value(
    first: Statistics, second: Statistics, *, resamples: int = RESAMPLES, seed: int = SEED
) -> float | None:
    """Two-sided p-value of the difference, by approximate randomisation over utterances; None where it is undefined.

    If the two systems were the same, it would not matter which of them said what: in each of R trials every utterance's
    statistics change places with probability one half, and p is how often the difference is then at least as large as
    the one observed, (hits + 1) / (R + 1). Noreen, "Computer-Intensive Methods for Testing Hypotheses" (1989); Riezler
    and Maxwell (ACL workshop 2005) recommend it over the bootstrap for comparing systems.

    Raises:
        ValueError: the two do not have the same number of utterances.
    """
    _check_pair(first, second)
    tables = first.table.astype(np.float64), second.table.astype(np.float64)
    values = value_of(first), value_of(second)
    if values[0] is None or values[1] is None:
        return None
    observed = abs(values[1] - values[0])
    rng = np.random.default_rng(seed)
    count = len(tables[0])
    rows = max(1, _BLOCK // count)
    hits = trials = 0
    for start in range(0, resamples, rows):
        swap = rng.integers(0, 2, size=(min(rows, resamples - start), count)).astype(np.float64)
        moved = swap @ (tables[1] - tables[0])
        difference = second.figures(tables[1].sum(0) - moved) - first.figures(tables[0].sum(0) + moved)
        difference = difference[np.isfinite(difference)]
        trials += len(difference)
        # Sums of floats in another order differ in the last digits; that is no smaller difference.
        hits += int(np.count_nonzero(np.abs(difference) >= observed - 1e-9 * max(1.0, observed)))
    return (hits + 1) / (trials + 1)


def _check_pair(first: Statistics, second: Statistics) -> None:
    if len(first.table) != len(second.table):
        raise ValueError(f"{len(first.table)} utterances against {len(second.table)}: not a pair")
