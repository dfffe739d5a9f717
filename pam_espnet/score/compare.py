"""Experiments side by side: one table of main figures, paired differences to the first, and their routing.

A row is one decoding (``decode_<name>``) of one experiment, so the audio-off control of a model is a separate row. A
column is a main figure of one task on one test set. Differences are paired over utterances, with the p-value of a
paired test (``score/intervals.py``), and bold where their interval excludes zero.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import DataError
from pam_espnet.fileio import write_json, write_text
from pam_espnet.score.intervals import Interval, Statistics, bootstrap_difference, paired_p_value
from pam_espnet.score.report import Decoding, find_decodings, routing_of, table, text_table
from pam_espnet.score.result import MAIN_METRICS, METRICS, statistics_of
from pam_espnet.score.scoring import UTT_SCORES


class Column(NamedTuple):
    """A figure of one task on one test set."""

    set: str
    task: str
    metric: str

    @property
    def title(self) -> str:
        """Two lines of a table head."""
        return f"{self.set}: {self.task}<br>{METRICS[self.metric].title}"


@dataclass
class Row:
    """One decoding of one experiment over all its test sets."""

    label: str
    decodings: list[Decoding]

    def entry(self, column: Column) -> dict[str, Any] | None:
        """The entry of ``scores.json``; None where this row lacks the test set or the task."""
        tasks = [decoding.scores["tasks"] for decoding in self.decodings if decoding.set == column.set]
        return tasks[0].get(column.task, {}).get(column.metric) if tasks else None

    def statistics(self, column: Column) -> tuple[list[str], Statistics] | None:
        """Utterances (sorted) and their statistics; None as in ``entry``."""
        if self.entry(column) is None:
            return None
        path = next(decoding.path for decoding in self.decodings if decoding.set == column.set) / UTT_SCORES
        try:
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            own = sorted((entry["utt"], entry[column.metric]) for entry in entries if entry["task"] == column.task)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(path, f"no statistics per utterance: {error!r}", hint="score again (stage 5)") from error
        return [key for key, _ in own], statistics_of(column.metric, np.array([numbers for _, numbers in own], float))


class Difference(NamedTuple):
    """A figure minus that of the first row, with its interval and the p-value of a paired test."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None


def find_rows(experiments: Sequence[str | Path]) -> list[Row]:
    """One row per decoding of experiments (or of ``decode_*`` directories), in the order given; audio off last.
    Raises DataError: one of them has no scores."""
    groups: dict[Path, list[Decoding]] = {}
    for experiment in experiments:
        for decoding in sorted(find_decodings(experiment), key=lambda decoding: decoding.audio_off):
            groups.setdefault(decoding.path.parent, []).append(decoding)
    # The label has the decoding's name where an experiment has more than one of the same kind.
    kinds = Counter((path.parent, group[0].audio_off) for path, group in groups.items())
    rows = []
    for path, group in groups.items():
        off = group[0].audio_off
        several = kinds[path.parent, off] > 1
        label = path.resolve().parent.name + (f", {group[0].name}" if several else "") + (", audio off" if off else "")
        rows.append(Row(label, group))
    return rows


def _columns(rows: Sequence[Row]) -> list[Column]:
    return list(
        dict.fromkeys(
            Column(decoding.set, task, metric)
            for row in rows
            for decoding in row.decodings
            for task, figures in decoding.scores["tasks"].items()
            for metric in MAIN_METRICS[task_spec(task).metric]
            if metric in figures
        )
    )


def difference(first: Row, row: Row, column: Column) -> Difference | None:
    """``row`` minus ``first``; None where either lacks the column or they hold different utterances."""
    left, right = first.statistics(column), row.statistics(column)
    if left is None or right is None or left[0] != right[0]:
        return None
    interval = bootstrap_difference(left[1], right[1])
    return Difference(*interval, p=paired_p_value(left[1], right[1]))


def show_difference(found: Difference | None, column: Column) -> str:
    """A cell of a table: with a sign, bold where the interval excludes zero; a dash where there is none."""
    if found is None:
        return "–"
    shown = METRICS[column.metric].show(Interval(*found[:3]), sign=True)
    if found.low is not None and found.high is not None and found.low * found.high > 0:
        shown = f"**{shown}**"
    return shown if found.p is None else f"{shown}, p = {found.p:.3f}"


def compare(experiments: Sequence[str | Path], output: str | Path, title: str = "Results") -> str:
    """Write the comparison with the first to ``output`` (.md) and beside it as JSON; return its tables as plain text.
    Raises DataError: an experiment has no scores."""
    rows = find_rows(experiments)
    first, columns = rows[0], _columns(rows)
    level = first.decodings[0].scores["bootstrap"]["level"]
    head = ("experiment", *(column.title for column in columns))
    cells = [[row.label, *(METRICS[c.metric].show_entry(row.entry(c)) for c in columns)] for row in rows]
    parts = [f"# {title}\n", f"In brackets: {level:.0%} interval, bootstrap over utterances.\n", table(head, cells)]
    text = [title, text_table(head, cells)]
    differences = {row.label: [difference(first, row, column) for column in columns] for row in rows[1:]}
    if differences:
        cells = [[label, *map(show_difference, values, columns)] for label, values in differences.items()]
        note = (
            "Paired over utterances; bold where the interval excludes zero; p: approximate randomisation, two-sided, "
            "not corrected for the number of comparisons. A dash where the two were not scored on the same utterances."
        )
        parts += [f"## Difference to {first.label}\n", f"{note}\n", table(head, cells)]
        text += [f"Difference to {first.label}", text_table(head, cells)]
    routings = {row.label: routing_of(row.decodings) for row in rows if not row.decodings[0].audio_off}
    if tasks := sorted({task for routing in routings.values() for task in routing}):
        cells = [
            [label, *(routing[task].describe() if task in routing else "–" for task in tasks)]
            for label, routing in routings.items()
        ]
        parts += ["## Weights of the encoders\n", table(("experiment", *tasks), cells)]
    parts += ["## Commands\n", _commands(rows)]
    record = [
        {
            "experiment": row.label,
            "scores": [{**c._asdict(), **entry} for c in columns if (entry := row.entry(c))],
            "difference_to_first": [
                {**c._asdict(), **found._asdict()}
                for c, found in zip(columns, differences.get(row.label, []), strict=False)
                if found is not None
            ],
            "routing": {task: value.record() for task, value in routings.get(row.label, {}).items()},
            "decodings": [{"set": decoding.set, **decoding.provenance()} for decoding in row.decodings],
        }
        for row in rows
    ]
    write_json(Path(output).with_suffix(".json"), {"rows": record})
    write_text(output, "\n".join(parts))
    return "\n".join(text)


def _commands(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        made = [decoding.provenance() for decoding in row.decodings]
        lines.append(f"- {row.label}: commit {', '.join(dict.fromkeys(one['commit'] or 'unknown' for one in made))}")
        if commands := list(dict.fromkeys(one["command"] for one in made if one["command"])):
            lines.append("\n  ".join(["  ```", *commands, "```"]))
    return "\n".join(lines) + "\n"
