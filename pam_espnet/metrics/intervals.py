"""Percentile bootstrap over utterances for corpus figures that are a ratio of two sums.

Word error rate is sum(errors) / sum(words); accuracy, mean absolute error and the mean of a caption score have the
same form. So one pair of numbers per utterance is enough to resample every figure of this package, and to compare two
systems on the same utterances. This module knows nothing about words, counts or captions.

Method: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13 (percentile interval); Bisani and
Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004) for the paired form.
A percentile interval collapses to a point where all utterances agree (an accuracy of exactly 100 %): it then says
that the test set is too easy to tell, not that the figure is certain.

Dimension letters: N utterances, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95

# Index numbers drawn at a time: bounds the memory to tens of megabytes whatever N and R are.
_BLOCK = 1 << 21


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
    def value(self) -> float | None:
        """The figure over all utterances; None where the denominators add up to nothing."""
        total = float(self.denominator.sum())
        return self.scale * float(self.numerator.sum()) / total if total else None


class Interval(NamedTuple):
    """A figure and its confidence limits; all None where the figure is undefined."""

    value: float | None
    low: float | None
    high: float | None


def mean_of(values: Sequence[float] | np.ndarray, scale: float = 1.0) -> Ratio:
    """The mean of one number per utterance, as a ``Ratio``."""
    numerator = np.asarray(values, dtype=np.float64)
    return Ratio(numerator, np.ones_like(numerator), scale)


def _resampled(ratios: Sequence[Ratio], resamples: int, seed: int) -> list[np.ndarray]:
    """Draw N utterances with replacement, R times, the same ones for every ratio; (R,) figures for each."""
    count = len(ratios[0].numerator)
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(count, 1))
    blocks: list[list[np.ndarray]] = [[] for _ in ratios]
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, count, size=(min(rows, resamples - start), count))
        for ratio, parts in zip(ratios, blocks, strict=True):
            with np.errstate(divide="ignore", invalid="ignore"):
                parts.append(ratio.scale * ratio.numerator[drawn].sum(1) / ratio.denominator[drawn].sum(1))
    return [np.concatenate(parts) for parts in blocks]


def _limits(value: float | None, figures: np.ndarray, level: float) -> Interval:
    # A resample that drew only zero denominators has no figure and tells nothing about the spread.
    figures = figures[np.isfinite(figures)]
    if value is None or not len(figures):
        return Interval(value, None, None)
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def bootstrap(ratio: Ratio, *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL) -> Interval:
    """The figure with its percentile interval at confidence ``level``.

    Args:
        ratio: per-utterance statistics, (N,) each.
        resamples: R; 1000 is the usual least for a 95 % interval.
        seed: the same seed and data give the same limits.
    """
    if not len(ratio.numerator):
        return Interval(None, None, None)
    return _limits(ratio.value, _resampled([ratio], resamples, seed)[0], level)


def bootstrap_difference(
    first: Ratio, second: Ratio, *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL
) -> Interval:
    """``second`` minus ``first`` with its interval, both measured on the same utterances in the same order.

    Utterances are drawn once for both systems, so what is hard for both cancels. An interval that leaves zero out is
    a difference at that confidence.

    Raises:
        ValueError: the two do not have the same number of utterances.
    """
    if len(first.numerator) != len(second.numerator):
        raise ValueError(f"{len(first.numerator)} utterances against {len(second.numerator)}: not a pair")
    if first.value is None or second.value is None:
        return Interval(None, None, None)
    figures = _resampled([first, second], resamples, seed)
    return _limits(second.value - first.value, figures[1] - figures[0], level)
