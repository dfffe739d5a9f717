"""Pictures of an experiment: its learning curve, its routing, its answers that are numbers. PNG files, no window.

matplotlib is imported where it is used: everything else of this package works without it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pam_espnet.data.tasks import TASKS
from pam_espnet.errors import DataError
from pam_espnet.fileio import atomic_path
from pam_espnet.score.routing import TaskRouting

# Colour-blind safe (Okabe and Ito), in the order of use.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SMOOTH_FROM = 60  # training points from which a running mean is drawn over them
_NAMED_LAYERS = 12  # layers up to which every cell of the heat map carries its number


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of ``size`` inches and its grid of axes."""
    # A canvas of the figure instead of pyplot: no global state, no display, whatever backend the caller has.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG, atomically."""
    with atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=120)


def read_curve(path: str | Path) -> list[dict[str, Any]]:
    """The lines of ``curve.jsonl``: ``{"step", "epoch", "split", "loss", "acc", "loss_<task>", ...}``, if finite.

    Raises DataError: a line is not such an object. A last line without an end, from a killed run, is skipped.
    """
    # A run that was resumed writes some steps twice; the later line is the one that counted.
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            step, split = int(entry["step"]), str(entry["split"])
            latest[split, step] = {**entry, "step": step, "split": split}
        except (ValueError, KeyError, TypeError) as error:
            hint = "remove the line; the rest can still be drawn"
            raise DataError(path, f"not a point of a learning curve: {error!r}", line=number, hint=hint) from error
    return [latest[key] for key in sorted(latest)]


def _series(entries: list[dict[str, Any]], split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one split where the value is there."""
    points = [(one["step"], one[key]) for one in entries if one["split"] == split and one.get(key) is not None]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def plot_curve(entries: list[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw loss, accuracy and validation loss per task over optimiser steps, those of them that ``entries`` have."""
    tasks = [task for task in sorted(TASKS) if any(f"loss_{task}" in entry for entry in entries)]
    panels = [("loss", "loss (nats per token)", "Loss")]
    if any(entry.get("acc") is not None for entry in entries):
        panels.append(("acc", "next-token accuracy", "Accuracy"))
    if tasks:
        panels.append(("tasks", "cross-entropy (nats per token)", "Loss per task"))
    figure, grid = new_figure(1, len(panels), (5.2 * len(panels), 3.8))
    for axes, (key, unit, heading) in zip(grid[0], panels, strict=True):
        if key == "tasks":
            _draw_tasks(axes, entries, tasks)
        else:
            _draw_splits(axes, entries, key)
        axes.set(xlabel="optimiser step", ylabel=unit, title=heading)
        axes.set_ylim(bottom=0, top=1 if key == "acc" else None)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, Path(path))


def _draw_splits(axes: Any, entries: list[dict[str, Any]], key: str) -> None:
    steps, values = _series(entries, "train", key)
    if len(steps) >= _SMOOTH_FROM:
        width = len(steps) // 20
        # "valid" keeps whole windows only: a mean over half a window bends the ends.
        middle = steps[(width - 1) // 2 :][: len(steps) - width + 1]
        mean = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot(steps, values, color=COLOURS[0], alpha=0.25)
        axes.plot(middle, mean, color=COLOURS[0], label=f"training, mean of {width}")
    elif len(steps):
        axes.plot(steps, values, color=COLOURS[0], label="training")
    steps, values = _series(entries, "valid", key)
    if len(steps):
        axes.plot(steps, values, color=COLOURS[1], marker="o", markersize=4, label="validation")


def _draw_tasks(axes: Any, entries: list[dict[str, Any]], tasks: list[str]) -> None:
    # Validation where there is any: training batches may hold few utterances of a task.
    split = "valid" if any(entry["split"] == "valid" for entry in entries) else "train"
    name = "validation" if split == "valid" else "training"
    for index, task in enumerate(tasks):
        series = _series(entries, split, f"loss_{task}")
        axes.plot(*series, color=COLOURS[index % len(COLOURS)], marker="o", markersize=4, label=f"{task}, {name}")


def plot_routing(routing: Mapping[str, TaskRouting], path: str | Path, title: str = "") -> None:
    """Draw one row per task: encoder weights, heat map of encoders and layers, expert probabilities."""
    encoders = list(dict.fromkeys(name for row in routing.values() for name in row.layers))
    depth = max(len(weights) for row in routing.values() for weights in row.layers.values())
    top = max(float(weights.max()) for row in routing.values() for weights in row.layers.values())
    routed = any(len(row.expert_probs) > 1 for row in routing.values())  # else there is no router to draw
    widths = [3.2, min(max(0.42 * depth, 3.2), 9.0) + 1.4] + ([2.6] if routed else [])
    size = (sum(widths) + 0.8, (1.3 + max(0.42 * len(encoders), 1.2)) * len(routing) + 0.6)
    figure, grid = new_figure(len(routing), len(widths), size, gridspec_kw={"width_ratios": widths})
    for (task, row), axes in zip(routing.items(), grid, strict=True):
        _draw_encoders(axes[0], row, encoders)
        _draw_heat(figure, axes[1], row, encoders, depth, top)
        axes[0].set_title(f"{task}: encoders")
        share = f"expert {row.expert}, {row.expert_share[row.expert]:.0%} of {row.utterances} utterances"
        axes[1].set_title(f"{task}: layers" + (f" ({share})" if routed else ""))
        if routed:
            experts = range(len(row.expert_probs))
            colours = [COLOURS[1] if index == row.expert else "#999999" for index in experts]
            axes[2].bar(experts, row.expert_probs, color=colours)
            axes[2].set_xticks(experts)
            axes[2].set(ylim=(0, 1), xlabel="expert", ylabel="router probability", title=f"{task}: experts")
    figure.suptitle(title)
    save_figure(figure, Path(path))


def _draw_encoders(axes: Any, row: TaskRouting, encoders: list[str]) -> None:
    weights = [row.encoders.get(name, 0.0) for name in encoders]
    axes.barh(range(len(encoders)), weights, color=[COLOURS[index % len(COLOURS)] for index in range(len(encoders))])
    for index, weight in enumerate(weights):
        axes.text(min(weight + 0.02, 0.86), index, f"{weight:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(encoders)), encoders)
    axes.set(xlim=(0, 1), xlabel="weight (sums to 1)")
    axes.invert_yaxis()


def _draw_heat(figure: Any, axes: Any, row: TaskRouting, encoders: list[str], depth: int, top: float) -> None:
    """Encoders (rows) by layers (columns); cells are blank beyond an encoder's last layer."""
    table = np.full((len(encoders), depth), np.nan)
    for index, name in enumerate(encoders):
        weights = row.layers.get(name, np.zeros(0))
        table[index, : len(weights)] = weights
    axes.set_facecolor("#eeeeee")
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top or 1.0)
    figure.colorbar(image, ax=axes, label="weight", pad=0.02)
    if depth <= _NAMED_LAYERS:
        _write_cells(axes, table, "{:.2f}", table <= 0.6 * top)
    axes.set_xticks(range(0, depth, max(1, depth // 12)))
    axes.set_yticks(range(len(encoders)), encoders)
    axes.set_xlabel("selected layer, counted from 0")


def _write_cells(axes: Any, table: np.ndarray, form: str, white: np.ndarray) -> None:
    """The number of each cell of a heat map, unless it is zero or NaN."""
    for (row, column), value in np.ndenumerate(table):
        if value and np.isfinite(value):
            colour = "white" if white[row, column] else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=colour)


def plot_confusions(confusions: Mapping[str, Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw confusion matrices ({name: ``details["confusion"]``}) side by side: true values down, answers across."""
    widths = [max(0.5 * len(one["columns"]), 2.0) + 1.6 for one in confusions.values()]
    height = max(0.5 * max(len(one["rows"]) for one in confusions.values()), 2.0) + 1.6
    figure, grid = new_figure(1, len(confusions), (sum(widths), height), gridspec_kw={"width_ratios": widths})
    for axes, (name, one) in zip(grid[0], confusions.items(), strict=True):
        counts = np.array(one["matrix"], dtype=np.float64)
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        _write_cells(axes, counts, "{:.0f}", shares > 0.6)
        axes.set_xticks(range(len(one["columns"])), one["columns"], rotation=45)
        axes.set_yticks(range(len(one["rows"])), one["rows"])
        axes.set(xlabel="answer", ylabel="true", title=name)
        figure.colorbar(image, ax=axes, label="share of the row", pad=0.02)
    figure.suptitle(title)
    save_figure(figure, Path(path))
