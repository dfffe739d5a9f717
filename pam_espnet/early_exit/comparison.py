"""Early-exit reports of several models side by side on a test set of recognition, as rows of cells for tables: what
blocks predict, which gates find the exit block, and how many blocks can be saved at which loss of quality."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pam_espnet.early_exit.profile import PRECISIONS, fastest, most_found
from pam_espnet.early_exit.tables import ratio
from pam_espnet.errors import ConfigError

Row = dict[str, str]  # title of a column -> cell
READINGS = {  # of a block, and a group of tokens
    ("bare", "all"): "as it is",
    ("bare", "first"): "first piece",
    ("bare", "later"): "later piece",
    ("mapped", "all"): "with its map",
}
LOSSES = (0.0, 0.5, 1.0, 2.0)  # points of WER
TASK = "asr"


def comparison(reports: Mapping[str, Mapping[str, Any]], test_set: str) -> dict[str, list[Row]]:
    """Tables by name: BLOCKS, GATES, and where all were decoded at exit points SAVINGS.

    Args:
        reports: model -> what its ``exit_report.json`` holds.
        test_set: whose figures.

    Raises ConfigError: a report without them, of an older version, or with other candidate blocks than the first.
    """
    layers = next(iter(reports.values()))["layers"]
    figures = {}
    for name, report in reports.items():
        if TASK not in report["sets"].get(test_set, {}):
            raise ConfigError(f"the report of {name} has no recognition on {test_set}")
        if report["layers"] != layers:
            raise ConfigError(f"{name}: candidate blocks {report['layers']}, but {layers} before; calibrate them alike")
        figures[name] = report["sets"][test_set][TASK]
        if "first" not in figures[name]["agreement"]["bare"]:
            raise ConfigError(f"the report of {name} is of an older version; make it again with pam_exit_report")
    swept = {
        name: [one for one in report["sweep"] if (one["set"], one["task"]) == (test_set, TASK)]
        for name, report in reports.items()
    }
    tables = {"BLOCKS": _blocks(figures, layers), "GATES": _gates(figures)}
    return tables | ({"SAVINGS": _savings(swept)} if all(swept.values()) else {})


def _blocks(figures: Mapping[str, Mapping[str, Any]], layers: Sequence[int]) -> list[Row]:
    """Agreement of the candidate blocks with the last one."""
    rows = []
    for at, layer in enumerate(layers):
        row = {"block": str(layer)}
        for name, found in figures.items():
            for (reading, group), title in READINGS.items():
                shares = found["agreement"].get(reading, {}).get(group)
                index = layer - 1 if reading == "bare" else at
                row[f"{name}, {title} %"] = "–" if shares is None else f"{100 * shares[index]:.1f}"
        rows.append(row)
    return rows


def _gates(figures: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Of each measure: the threshold with which it finds most exits, and the fastest of a wanted precision."""
    wanted = PRECISIONS[0]
    right, fast = "right block %", f"fastest at {wanted:.0%} precision"
    rows = []
    for measure in next(iter(figures.values()))["gates"]:
        row = {"measure": measure}
        for name, found in figures.items():
            outcomes = found["gates"].get(measure, [])
            row[f"{name}, {right}"] = _found(most_found(outcomes)) if outcomes else "–"
            best = fastest(outcomes, wanted)
            row[f"{name}, {fast}"] = "none" if best is None else _depth(best)
        rows.append(row)
    row = {"measure": "oracle, first match"}
    for name, found in figures.items():
        row[f"{name}, {right}"] = "100"
        row[f"{name}, {fast}"] = _depth(found["oracle"]["step"]["candidate blocks"]["first match"])
    return [*rows, row]


def _found(outcome: Mapping[str, Any]) -> str:
    at = "" if outcome["threshold"] is None else f" (at {outcome['threshold']:.3g})"
    return f"{100 * outcome['found']:.1f}{at}"


def _depth(outcome: Mapping[str, Any]) -> str:
    return f"{outcome['mean_depth']:.1f} blocks, {outcome['speedup']:.2f}x"


def _savings(swept: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The decoded point with fewest blocks that loses at most so much, and the time of its steps."""
    rows = []
    for loss in LOSSES:
        row = {"WER lost, points, at most": f"{loss:g}"}
        for name, points in swept.items():
            good = [one for one in points if one["point"] != "never" and _lost(one) <= loss]
            if not good:
                row[name] = "none"
                continue
            best = min(good, key=lambda one: one["mean_depth"])
            row[name] = f"{best['mean_depth']:.1f} blocks ({best['point']})"
            if timing := best.get("timing"):
                row[name] += f", steps {ratio(timing['never']['steps_cpu'], timing['own']['steps_cpu'])}"
        rows.append(row)
    return rows


def _lost(point: Mapping[str, Any]) -> float:
    """Points of WER against full depth; a point that was not compared with it counts as useless."""
    return point.get("difference", {}).get("wer", {}).get("value", math.inf)
