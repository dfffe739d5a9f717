"""The picture of the early-exit report, a row per task. Left: what blocks say. Right: quality against mean depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pam_espnet.data.tasks import task_spec
from pam_espnet.score.plots import COLOURS, new_figure, save_figure
from pam_espnet.score.result import MAIN_METRICS, METRICS

# Mode of exit -> colour and marker.
_MODES = {
    "never": (COLOURS[6], "*"),
    "fixed": (COLOURS[0], "o"),
    "gate": (COLOURS[1], "s"),
    "confidence": (COLOURS[2], "^"),
    "entropy": (COLOURS[3], "D"),
    "patience": (COLOURS[4], "v"),
}


def plot_exits(report: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """Draw the report.

    Args:
        report: what ``exit_report.json`` holds; without a sweep the right side is left out.
        path: the PNG file to write.
        title: stands above.
    """
    lines = [(name, task, figures) for name, tasks in report["sets"].items() for task, figures in tasks.items()]
    columns = 2 if report["sweep"] else 1
    figure, grid = new_figure(len(lines), columns, (5.4 * columns, 2.9 * len(lines) + 0.9))
    for (name, task, figures), axes in zip(lines, grid, strict=True):
        _draw_agreement(axes[0], report, figures)
        axes[0].set_title(f"{name}: blocks that name the last block's token")
        if columns == 2:
            points = [one for one in report["sweep"] if (one["set"], one["task"]) == (name, task)]
            axes[1].set_visible(bool(points))
            if points:
                _draw_quality(axes[1], points, task)
            axes[1].set_title(f"{name}: quality against depth")
    for column in range(columns):
        handles: dict[str, Any] = {}
        for axes in grid[:, column]:
            handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
        depth = "blocks per step; bars: 95 % of the difference to full depth"
        grid[-1, column].set_xlabel(("block", depth)[column])
        grid[0, column].legend(handles.values(), handles.keys(), frameon=False, fontsize=8)
    figure.suptitle(title)
    save_figure(figure, Path(path))


def _draw_agreement(axes: Any, report: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    blocks, agreement = report["blocks"], figures["agreement"]
    first = blocks // 3
    where = range(first, blocks + 1)
    if "mapped" in agreement:
        values = [100 * value for value in agreement["mapped"]["all"]]
        axes.plot(report["layers"], values, color=COLOURS[1], marker="s", markersize=5, label="with the calibrated map")
    bare = [100 * agreement["bare"]["all"][block - 1] for block in where]
    axes.plot(where, bare, color=COLOURS[0], marker="o", markersize=3, label="as it is")
    if "inner" in agreement:
        inner = [100 * agreement["inner"]["all"][block - 1] for block in where]
        axes.plot([block - 0.5 for block in where], inner, color=COLOURS[5], linestyle=":", label="within the block, "
                  "before its feed-forward part")  # fmt: skip
    axes.set(ylim=(-2, 103), ylabel=f"agreement, % of {figures['tokens']['all']} tokens")
    axes.grid(alpha=0.3)


def _draw_quality(axes: Any, entries: Sequence[Mapping[str, Any]], task: str) -> None:
    """Scores; the bars are those of the paired difference to ``never``, which is the line."""
    name = MAIN_METRICS[task_spec(task).metric][0]
    metric = METRICS[name]
    full = next((one["scores"][name]["value"] for one in entries if one["point"] == "never"), None)
    if full is not None:
        axes.axhline(full, color=COLOURS[6], linewidth=0.8, alpha=0.6)
    for mode, (colour, marker) in _MODES.items():
        points = [one for one in entries if one["point"].partition(":")[0] == mode and one["mean_depth"] is not None]
        if not points:
            continue
        points.sort(key=lambda one: one["mean_depth"])
        depths = [one["mean_depth"] for one in points]
        values = [one["scores"][name]["value"] for one in points]
        size, label = (12, "full depth") if mode == "never" else (6, mode)
        axes.plot(depths, values, marker=marker, color=colour, markersize=size, linewidth=0.8, label=label)
        for one, depth in zip(points, depths, strict=True):
            pair = one.get("difference", {}).get(name)
            if pair and pair["low"] is not None and full is not None:
                axes.plot([depth, depth], [full + pair["low"], full + pair["high"]], color=colour, alpha=0.5)
    if metric.lower_is_better:
        axes.invert_yaxis()
    axes.set_ylabel(metric.title)
    axes.grid(alpha=0.3)
