"""Early-exit reports of several models side by side on a test set of recognition, as rows of cells for tables: what
blocks predict, which gates find the exit block, and how many blocks can be saved at which loss of quality.

A model may have several reports, of trainings with other seeds: figures are then means over them, with the lowest and
the highest."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
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


def comparison(reports: Mapping[str, Sequence[Mapping[str, Any]]], test_set: str) -> dict[str, list[Row]]:
    """Tables by name: BLOCKS, GATES, and where all were decoded at exit points SAVINGS.

    Args:
        reports: model -> what the ``exit_report.json`` of each of its seeds holds.
        test_set: whose figures.

    Raises ConfigError: a report without them, of an older version, or with other candidate blocks than the first.
    """
    layers = next(iter(reports.values()))[0]["layers"]
    figures = {name: [_figures(one, name, test_set, layers) for one in seeds] for name, seeds in reports.items()}
    swept = {
        name: [[one for one in report["sweep"] if (one["set"], one["task"]) == (test_set, TASK)] for report in seeds]
        for name, seeds in reports.items()
    }
    tables = {"BLOCKS": _blocks(figures, layers), "GATES": _gates(figures)}
    return tables | ({"SAVINGS": _savings(swept)} if all(all(seeds) for seeds in swept.values()) else {})


def _figures(report: Mapping[str, Any], name: str, test_set: str, layers: Sequence[int]) -> Mapping[str, Any]:
    if TASK not in report["sets"].get(test_set, {}):
        raise ConfigError(f"the report of {name} has no recognition on {test_set}")
    if report["layers"] != layers:
        raise ConfigError(f"{name}: candidate blocks {report['layers']}, but {layers} before; calibrate them alike")
    figures: Mapping[str, Any] = report["sets"][test_set][TASK]
    if "first" not in figures["agreement"]["bare"]:
        raise ConfigError(f"the report of {name} is of an older version; make it again with pam_exit_report")
    return figures


def _blocks(figures: Mapping[str, Sequence[Mapping[str, Any]]], layers: Sequence[int]) -> list[Row]:
    """Agreement of the candidate blocks with the last one."""
    rows = []
    for at, layer in enumerate(layers):
        row = {"block": str(layer)}
        for name, seeds in figures.items():
            for (reading, group), title in READINGS.items():
                index = layer - 1 if reading == "bare" else at
                shares = [one["agreement"].get(reading, {}).get(group) for one in seeds]
                row[f"{name}, {title} %"] = _percent([own[index] for own in shares if own is not None])
        rows.append(row)
    return rows


def _gates(figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """Of each measure: the threshold with which it finds most exits, and the fastest of a wanted precision."""
    wanted = PRECISIONS[0]
    right, fast = "right block %", f"fastest at {wanted:.0%} precision"
    rows = []
    for measure in next(iter(figures.values()))[0]["gates"]:
        row = {"measure": measure}
        for name, seeds in figures.items():
            outcomes = [own for one in seeds if (own := one["gates"].get(measure))]
            best = [most_found(own) for own in outcomes]
            row[f"{name}, {right}"] = _percent([one["found"] for one in best])
            if len(best) == 1 and (threshold := best[0]["threshold"]) is not None:
                row[f"{name}, {right}"] += f" (at {threshold:.3g})"
            row[f"{name}, {fast}"] = _depth([fastest(own, wanted) for own in outcomes])
        rows.append(row)
    row = {"measure": "oracle, first match"}
    for name, seeds in figures.items():
        row[f"{name}, {right}"] = "100"
        row[f"{name}, {fast}"] = _depth([one["oracle"]["step"]["candidate blocks"]["first match"] for one in seeds])
    return [*rows, row]


def _percent(shares: Sequence[float]) -> str:
    if not shares:
        return "–"
    spread = f" ({100 * min(shares):.1f} to {100 * max(shares):.1f})" if len(shares) > 1 else ""
    return f"{100 * fmean(shares):.1f}{spread}"


def _depth(outcomes: Sequence[Mapping[str, Any] | None]) -> str:
    """Means of the seeds that have such a threshold, and how many do where not all."""
    found = [one for one in outcomes if one is not None]
    if not found:
        return "none"
    depth, speedup = (fmean(one[key] for one in found) for key in ("mean_depth", "speedup"))
    share = "" if len(found) == len(outcomes) else f" ({len(found)} of {len(outcomes)})"
    return f"{depth:.1f} blocks, {speedup:.2f}x{share}"


def _savings(swept: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[Row]:
    """The decoded point with fewest blocks that loses at most so much, in the mean over seeds, and the time of its
    steps."""
    points = {name: _by_point(seeds) for name, seeds in swept.items()}
    rows = []
    for loss in LOSSES:
        row = {"WER lost, points, at most": f"{loss:g}"}
        for name, found in points.items():
            good = [point for point, outcomes in found.items() if fmean(map(_lost, outcomes)) <= loss]
            if not good:
                row[name] = "none"
                continue
            depths = {point: fmean(one["mean_depth"] for one in found[point]) for point in good}
            best = min(good, key=depths.__getitem__)
            row[name] = f"{depths[best]:.1f} blocks ({best})"
            if all(timings := [one.get("timing") for one in found[best]]):
                never, own = (sum(one[key]["steps_cpu"] for one in timings if one) for key in ("never", "own"))
                row[name] += f", steps {ratio(never, own)}"
        rows.append(row)
    return rows


def _by_point(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[Mapping[str, Any]]]:
    """Exit point -> its outcome with each seed, of those that all seeds were decoded at."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in (one for seed in seeds for one in seed if one["point"] != "never"):
        found.setdefault(one["point"], []).append(one)
    return {point: outcomes for point, outcomes in found.items() if len(outcomes) == len(seeds)}


def _lost(point: Mapping[str, Any]) -> float:
    """Points of WER against full depth; a point that was not compared with it counts as useless."""
    lost: float = point.get("difference", {}).get("wer", {}).get("value", math.inf)
    return lost
