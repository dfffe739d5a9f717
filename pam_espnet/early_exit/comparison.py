"""Early-exit reports of several models side by side on a test set of recognition, as rows of cells for tables: what
blocks predict, which gates find the exit block, and how many blocks can be saved at which loss of quality."""

from collections.abc import Mapping, Sequence
from typing import Any

from pam_espnet.early_exit.profile import PRECISIONS
from pam_espnet.errors import ConfigError

Row = dict[str, str]  # title of a column -> cell
READINGS = (("bare", "all"), ("bare", "first"), ("bare", "later"), ("mapped", "all"))
TITLES = {"all": "as it is", "first": "first piece", "later": "later piece", "mapped": "with its map"}
LOSSES = (0.0, 0.5, 1.0, 2.0)  # points of WER
TASK = "asr"


def comparison(reports: Mapping[str, Mapping[str, Any]], test_set: str) -> dict[str, list[Row]]:
    """Tables by name: BLOCKS, GATES, and where all were decoded at exit points SAVINGS.

    Args:
        reports: model -> what its ``exit_report.json`` holds.
        test_set: whose figures.

    Raises ConfigError: a report without them, or with other candidate blocks than the first.
    """
    layers = next(iter(reports.values()))["layers"]
    figures = {}
    for name, report in reports.items():
        if TASK not in report["sets"].get(test_set, {}):
            raise ConfigError(f"the report of {name} has no recognition on {test_set}")
        if report["layers"] != layers:
            raise ConfigError(f"{name}: candidate blocks {report['layers']}, but {layers} before; calibrate them alike")
        figures[name] = report["sets"][test_set][TASK]
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
            for reading, group in READINGS:
                shares = found["agreement"].get(reading, {}).get(group)
                title = f"{name}, {TITLES['mapped' if reading == 'mapped' else group]} %"
                row[title] = "–" if shares is None else f"{100 * shares[layer - 1 if reading == 'bare' else at]:.1f}"
        rows.append(row)
    return rows


def _gates(figures: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Of each measure: the threshold with which it finds most exits, and the fastest of a wanted precision."""
    wanted = PRECISIONS[0]
    right, fastest = "right block %", f"fastest at {wanted:.0%} precision"
    rows = []
    for measure in next(iter(figures.values()))["gates"]:
        row = {"measure": measure}
        for name, found in figures.items():
            outcomes = found["gates"].get(measure, [])
            precise = [one for one in outcomes if one["precision"] >= wanted and one["coverage"] > 0]
            best = max(outcomes, key=lambda one: one["found"], default=None)
            fast = max(precise, key=lambda one: one["speedup"], default=None)
            row[f"{name}, {right}"] = "–" if best is None else f"{100 * best['found']:.1f}{_at(best)}"
            row[f"{name}, {fastest}"] = "none" if fast is None else _depth(fast)
        rows.append(row)
    row = {"measure": "oracle, first match"}
    for name, found in figures.items():
        row[f"{name}, {right}"] = "100"
        row[f"{name}, {fastest}"] = _depth(found["oracle"]["step"]["candidate blocks"]["first match"])
    return [*rows, row]


def _at(outcome: Mapping[str, Any]) -> str:
    return "" if outcome["threshold"] is None else f" (at {outcome['threshold']:.3g})"


def _depth(outcome: Mapping[str, Any]) -> str:
    return f"{outcome['mean_depth']:.1f} blocks, {outcome['speedup']:.2f}x"


def _savings(swept: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The decoded point with fewest blocks that loses at most so much, and the time of its steps."""
    rows = []
    for loss in LOSSES:
        row = {"WER lost, points, at most": f"{loss:g}"}
        for name, points in swept.items():
            good = [one for one in points if one["point"] != "never" and one["difference"]["wer"]["value"] <= loss]
            if not good:
                row[name] = "none"
                continue
            best = min(good, key=lambda one: one["mean_depth"])
            timing = best["timing"]
            ratio = timing["never"]["steps_cpu"] / timing["own"]["steps_cpu"]
            row[name] = f"{best['mean_depth']:.1f} blocks ({best['point']}), steps {ratio:.2f}x"
        rows.append(row)
    return rows
