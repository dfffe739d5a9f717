"""Pictures of evidence over seeds: figures of each seed, learning curves with bands, weights of the encoders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pam_espnet.data.tasks import TASKS
from pam_espnet.score.plots import COLOURS, new_figure, save_figure
from pam_espnet.score.result import METRICS

type Curve = Sequence[Mapping[str, Any]]  # lines of ``curve.jsonl``


def plot_seeds(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]], path: Path) -> None:
    """Draw for each of ``columns`` (set, task, metric) a panel: each seed of a row, the mean, and its interval.

    ``rows``: ``{"experiment", "scores": [{"set", "task", "metric", "value", "low", "high", "by_seed"}]}``.
    """
    size = (1.8 + 3.6 * len(columns), 1.2 + 0.34 * len(rows))
    figure, grid = new_figure(1, len(columns), size, sharey=True)
    for axes, column in zip(grid[0], columns, strict=True):
        for index, row in enumerate(rows):
            for one in row["scores"]:
                if (one["set"], one["task"], one["metric"]) != tuple(column) or one["value"] is None:
                    continue
                seeds = [value for value in one["by_seed"].values() if value is not None]
                axes.plot(seeds, [index] * len(seeds), "o", color=COLOURS[1], markersize=4, zorder=3)
                if one["low"] is not None:
                    axes.plot([one["low"], one["high"]], [index, index], color=COLOURS[0])
                axes.plot(one["value"], index, "|", color=COLOURS[0], markersize=12, markeredgewidth=2)
        axes.set(title=f"{column[0]}: {column[1]}", xlabel=METRICS[column[2]].title)
        axes.set_yticks(range(len(rows)), [row["experiment"] for row in rows])
        axes.grid(alpha=0.3)
    grid[0][0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    save_figure(figure, path)


def plot_curves(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draw a panel per task: tokens of answers that are predicted right in training; of each row's seeds the mean, and
    from the lowest to the highest of them a band. Lines are dashed after the seventh.

    ``curves``: row -> the lines of each seed's ``curve.jsonl``.
    """
    lines = [line for some in curves.values() for curve in some for line in curve]
    tasks = [task for task in TASKS if any(f"acc_{task}" in line for line in lines)] or [""]
    figure, grid = new_figure(1, len(tasks), (1.5 + 4 * len(tasks), 3.8), sharey=True)
    for axes, task in zip(grid[0], tasks, strict=True):
        for index, (row, some) in enumerate(curves.items()):
            values: dict[int, list[float]] = {}  # step -> of the seeds that had this task then
            for line in (line for curve in some for line in curve if line["split"] == "train"):
                if line.get(f"acc_{task}") is not None:
                    values.setdefault(line["step"], []).append(100 * line[f"acc_{task}"])
            steps = sorted(values)
            colour, style = COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--"
            axes.plot(steps, [np.mean(values[step]) for step in steps], style, color=colour, label=row)
            low, high = ([edge(values[step]) for step in steps] for edge in (min, max))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=task, xlabel="optimiser step")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("tokens predicted right in training, %")
    if lines:
        grid[0][-1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_weights(weights: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Draw a panel per task: for each training a bar of the weights of its encoders, which add up to one.

    ``weights``: training -> task -> encoder -> weight.
    """
    tasks = list(dict.fromkeys(task for one in weights.values() for task in one)) or [""]
    encoders = list(dict.fromkeys(name for one in weights.values() for own in one.values() for name in own))
    figure, grid = new_figure(1, len(tasks), (2.5 + 3 * len(tasks), 1.5 + 0.3 * len(weights)), sharey=True)
    for axes, task in zip(grid[0], tasks, strict=True):
        left = np.zeros(len(weights))
        for index, name in enumerate(encoders):
            widths = np.array([one.get(task, {}).get(name, 0.0) for one in weights.values()])
            axes.barh(range(len(weights)), widths, left=left, color=COLOURS[index % len(COLOURS)], label=name)
            left += widths
        axes.set(title=task, xlabel="weight", xlim=(0, 1))
        axes.set_yticks(range(len(weights)), list(weights))
    grid[0][0].set_ylim(max(len(weights), 1) - 0.5, -0.5)  # the first training on top
    if encoders:
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(encoders))
    save_figure(figure, path)
