"""Results of a scorer, and names, rounding and order of their figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pam_espnet.score.bleu import Bleu
from pam_espnet.score.intervals import Interval, Ratio, Statistics
from pam_espnet.score.meteor import Meteor


@dataclass(frozen=True)
class Metric:
    """A figure in tables."""

    label: str
    unit: str  # "" for a score without a unit
    lower_is_better: bool
    digits: int  # decimals

    @property
    def title(self) -> str:
        """Column heading: name, unit, and an arrow that points to where better is."""
        return f"{self.label}{f' {self.unit}' if self.unit else ''} {'↓' if self.lower_is_better else '↑'}"

    def number(self, value: float | None, sign: bool = False) -> str:
        """One number, rounded; a dash where it is undefined."""
        return "–" if value is None else f"{value:{'+' if sign else ''}.{self.digits}f}"

    def show(self, interval: Interval, sign: bool = False) -> str:
        """``value [low, high]``."""
        value, low, high = (self.number(number, sign) for number in interval)
        return value if interval.low is None else f"{value} [{low}, {high}]"

    def show_entry(self, entry: Mapping[str, Any] | None) -> str:
        """The same for an entry of ``scores.json``; a dash where there is none."""
        return "–" if entry is None else self.show(Interval(entry["value"], entry["low"], entry["high"]))


METRICS: dict[str, Metric] = {
    "wer": Metric("WER", "%", True, 1),
    "wer_normalised": Metric("WER normalised", "%", True, 1),
    "cer": Metric("CER", "%", True, 1),
    "cer_normalised": Metric("CER normalised", "%", True, 1),
    "accuracy": Metric("accuracy", "%", False, 1),
    "mae": Metric("MAE", "", True, 2),
    "cider_d": Metric("CIDEr-D", "", False, 3),
    "rouge_l": Metric("ROUGE-L", "", False, 3),
    **{f"bleu_{order}": Metric(f"BLEU-{order}", "", False, 3) for order in range(1, 5)},
    "meteor": Metric("METEOR", "", False, 3),
    "spice": Metric("SPICE", "", False, 3),
    "spider": Metric("SPIDEr", "", False, 3),
    "fense": Metric("FENSE", "", False, 3),
}

# By the `metric` of a task (data/tasks.py): the figures in overview tables, those of them that there are.
MAIN_METRICS: dict[str, tuple[str, ...]] = {
    "wer": ("wer", "wer_normalised"),
    "count": ("accuracy", "mae"),
    "caption": ("cider_d", "rouge_l", "meteor", "spice", "spider", "fense"),
    "choice": ("accuracy",),
}


def statistics_of(metric: str, table: np.ndarray) -> Statistics:
    """The statistics of a figure of ``METRICS`` from its numbers per utterance (N,C) in ``utt_scores.jsonl``."""
    if metric == "meteor":
        return Meteor(table)
    if metric.startswith("bleu_"):
        return Bleu(table)
    return Ratio(table[:, 0], table[:, 1], 100.0 if METRICS[metric].unit == "%" else 1.0)


@dataclass
class TaskResult:
    """The figures of one task on one test set; names are those of ``METRICS``."""

    utterances: list[str]  # N keys, in the order of the rows in ``metrics``
    metrics: dict[str, Statistics]  # of each figure
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)  # further numbers of a figure (substitutions, ...)
    details: dict[str, Any] = field(default_factory=dict)  # of the whole task (loops, confusion matrix, ...)
