"""``EXIT.md`` and ``exit.png`` from the figures of ``early_exit.report``."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pam_espnet.data.tasks import task_spec
from pam_espnet.early_exit.cost_report import cost_text
from pam_espnet.early_exit.profile import shown_outcomes
from pam_espnet.score.compare import Column, Difference, show_difference
from pam_espnet.score.plots import COLOURS, new_figure, save_figure
from pam_espnet.score.report import table
from pam_espnet.score.result import MAIN_METRICS, METRICS

GROUPS = {"all": "all", "step": "steps"}
PIECES = {"first": "first piece", "later": "later piece"}  # of words; the end of the answer is neither


def markdown(report: Mapping[str, Any], picture: str | None) -> str:
    """The whole text.

    Args:
        report: what ``exit_report.json`` holds.
        picture: file name of the picture beside it.
    """
    own = report["answers"] == "own"
    parts = [
        f"# Early exit: {report['experiment']}\n",
        f"The model's {'own best' if own else 'reference'} answers, run through all {report['blocks']} blocks once; a "
        "block *agrees* where its most likely token is the last block's, both read through the LLM's final norm and "
        f"output layer. Candidate blocks: {', '.join(map(str, report['layers']))}; "
        + (f"{_calibrated(report['calibration'])}.\n" if report["calibration"] else "no calibration.\n"),
    ]
    if picture:
        parts.append(f"![Early exit]({picture})\n")
    for name, tasks in report["sets"].items():
        parts += [f"## {name}: {task}\n\n{_agreement(report, figures)}" for task, figures in tasks.items()]
    parts += ["## Oracle\n", _ORACLE, _oracle(report), "## Gates\n", _GATES, _gates(report)]
    if report.get("measured_cost"):
        parts += ["## Cost of a step\n", cost_text(report)]
    if report["sweep"]:
        parts += ["## Decoding\n", _DECODING, _quality(report["sweep"]), _SPEED, _speed(report["sweep"])]
    parts += ["## How it was made\n", _made(report)]
    return "\n".join(parts)


_ORACLE = (
    "An oracle knows the last block's token and exits at the first block that predicts it (first match), or at the "
    "first from which all later ones do (saturated). *Speed-up* is a bound by the cost model, not a measurement: "
    "blocks, keys and values of skipped blocks and the output layer by their numbers of weights, against full depth. "
    "*Steps* are all tokens but an answer's first, which decoding takes from the prefix at full depth.\n"
)
_GATES = (
    "For each measure the threshold that finds most exits (the right block), and the one with the greatest predicted "
    "speed-up among those that are precise enough; where none is, the most precise one. Steps only. Coverage: share of "
    "steps that exit early; precision: share of those whose token is the last block's; right block: share of steps "
    "that exit where the oracle does (first match among the candidates), or with it nowhere. Confidence, entropy and "
    "patience are charged for every output layer that they run to decide, a gate is counted as free.\n"
)
_DECODING = (
    "Beam search as in the recipe, with and without exits. In brackets: 95 % interval, bootstrap over utterances; "
    "differences to *never* are paired, bold where the interval excludes zero, with the p-value of approximate "
    "randomisation. *Same*: utterances whose best answer is that of *never*. Depth: blocks per step of the best "
    "answer, its first token apart.\n"
)
_SPEED = (
    "Seconds of each point and of *never* on the same batches, which took turns in one process; ratios above 1 are "
    "faster than full depth. *Steps*: the LLM's steps alone; *search*: prefix, steps and bookkeeping; *all*: with the "
    "encoders. This is early exit against this engine's own full depth. How fast the engine is against transformers' "
    "`generate` is another number, measured by `tests/benchmarks/decode.py`; the two are never multiplied.\n"
)


def _calibrated(calibration: Mapping[str, Any]) -> str:
    maps = "maps and gates" if calibration["maps"] else "gates, no maps"
    at = calibration["threshold"]
    return f"calibrated with {maps}, threshold " + ("none (its advice is off)" if at is None else f"{at:.2f}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _agreement(report: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Agreement of the upper half of the blocks."""
    groups = GROUPS | PIECES
    counts = ", ".join(f"{shown} {figures['tokens'][name]}" for name, shown in groups.items())
    bare, mapped, rows = figures["agreement"]["bare"], figures["agreement"].get("mapped"), []
    for block in range(report["blocks"] // 2, report["blocks"] + 1):
        row = [str(block), *(_share(None if bare[name] is None else bare[name][block - 1]) for name in groups)]
        if mapped:
            layers = report["layers"]
            row.append(_share(mapped["all"][layers.index(block)] if block in layers else None))
        rows.append(row)
    head = ["block", *(f"bare, {shown}" for shown in groups.values()), *(["mapped, all"] if mapped else [])]
    return f"Tokens: {counts}. Agreement with the last block in % of them.\n\n{table(head, rows)}"


def _oracle(report: Mapping[str, Any]) -> str:
    rows, maps = [], (report["calibration"] or {}).get("maps")
    for name, tasks in report["sets"].items():
        for task, figures in tasks.items():
            for group in GROUPS:
                for may, found in figures["oracle"][group].items():
                    for kind, entry in (found or {}).items():
                        rows.append([
                            f"{name}: {task}", GROUPS[group],
                            may + (", mapped" if maps and "bare" not in may else ""), kind,
                            f"{entry['mean_depth']:.1f}", f"{entry['speedup']:.2f}x",
                        ])  # fmt: skip
    head = ("set", "tokens", "may exit at", "exit", "mean depth", "speed-up")
    return table(head, rows)


def _gates(report: Mapping[str, Any]) -> str:
    rows, own = [], (report["calibration"] or {}).get("threshold")
    for name, tasks in report["sets"].items():
        for task, figures in tasks.items():
            for mode, outcomes in figures["gates"].items():
                for why, one in shown_outcomes(outcomes, own if mode == "gate" else None):
                    at = "–" if one["threshold"] is None else f"{one['threshold']:.3g}"
                    rows.append([
                        f"{name}: {task}", mode, why, at, _share(one["coverage"]), _share(one["precision"]),
                        _share(one["found"]), f"{one['mean_depth']:.1f}", f"{one['speedup']:.2f}x",
                    ])  # fmt: skip
    head = ("set", "measure", "chosen for", "threshold", "coverage %", "precision %", "right block %",
            "mean depth", "speed-up")  # fmt: skip
    return table(head, rows)


def _quality(sweep: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for entry in sweep:
        for metric in MAIN_METRICS[task_spec(entry["task"]).metric]:
            if metric not in entry["scores"]:
                continue  # its parts are not on this machine
            pair = entry.get("difference", {}).get(metric)
            column = Column(entry["set"], entry["task"], metric)
            rows.append([
                f"{entry['set']}: {entry['task']}", entry["point"],
                "–" if entry["mean_depth"] is None else f"{entry['mean_depth']:.1f}",
                METRICS[metric].title, METRICS[metric].show_entry(entry["scores"][metric]),
                "–" if entry["point"] == "never" or pair is None else show_difference(Difference(**pair), column),
                f"{_share(entry.get('same_answers'))}",
            ])  # fmt: skip
    return table(("set", "point", "depth", "metric", "value", "against never", "same %"), rows)


def _speed(sweep: Sequence[Mapping[str, Any]]) -> str:
    rows, runs = [], set()
    for entry in sweep:
        if entry["point"] == "never" or not (timing := entry.get("timing")):
            continue
        own, never = timing["own"], timing["never"]
        encoders = own["encoders_wall"]
        runs.add(timing["runs"])
        rows.append([
            entry["set"], entry["point"], f"{own['steps_wall']:.1f} / {never['steps_wall']:.1f}",
            ratio(never["steps_wall"], own["steps_wall"]), ratio(never["steps_cpu"], own["steps_cpu"]),
            f"{own['search_wall']:.1f} / {never['search_wall']:.1f}", ratio(never["search_wall"], own["search_wall"]),
            ratio(never["search_cpu"], own["search_cpu"]),
            ratio(never["search_wall"] + encoders, own["search_wall"] + encoders), str(timing["runs"]),
        ])  # fmt: skip
    head = ("set", "point", "steps, s: point / never", "wall", "CPU", "search, s: point / never", "wall", "CPU",
            "all, wall", "runs")  # fmt: skip
    note = "\nA point of several runs sums the seconds of all of them, each beside *never* of the same run.\n"
    return table(head, rows) + (note if max(runs, default=1) > 1 else "")


def ratio(never: float, own: float) -> str:
    """How many times as fast, as a cell."""
    return f"{never / own:.2f}x" if own else "–"


def _made(report: Mapping[str, Any]) -> str:
    cost = report["cost_model"]
    lines = [
        f"- checkpoint `model.safetensors`, SHA-256 `{report['checkpoint_sha256']}`",
        f"- commit {report['commit'] or 'unknown'}; LLM in {report['dtype'] or 'the precision of its configuration'}",
        f"- costs in units of one block: output layer {cost['head']:.2f}, keys and values of a skipped block "
        f"{cost['memory']:.3f}",
    ]
    if report["calibration"]:
        lines.append(f"- calibration, SHA-256 `{report['calibration']['sha256']}`")
    if report["sweep"]:
        sizes = sorted({(str(one["batch_size"]), one["threads"]) for one in report["sweep"]})
        lines += [f"- sweep: batches of {size}, {threads} thread{'s' * (threads > 1)}" for size, threads in sizes]
        if others := {str(one["commit"]) for one in report["sweep"]} - {str(report["commit"])}:
            lines.append(f"- points decoded at other commits: {', '.join(sorted(others))}")
    return "\n".join(lines) + f"\n\n```\n{shlex.join(report['command'])}\n```\n"


# ---- the picture -----------------------------------------------------------------------------------------------------

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
        title: above the picture.
    """
    lines = [(name, task, figures) for name, tasks in report["sets"].items() for task, figures in tasks.items()]
    columns = 2 if report["sweep"] else 1
    figure, grid = new_figure(len(lines), columns, (5.4 * columns, 2.9 * len(lines) + 0.9))
    for (name, task, figures), axes in zip(lines, grid, strict=True):
        _draw_agreement(axes[0], report, figures)
        axes[0].set_title(f"{name}: blocks that predict the last block's token")
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
    for group, style, width in (("all", "-", 1.5), ("first", "--", 0.9), ("later", ":", 0.9)):
        tokens = figures["tokens"][group]
        if not tokens:
            continue
        bare = [100 * agreement["bare"][group][block - 1] for block in where]
        label = "as it is" + (f", {PIECES[group]}s ({tokens})" if group in PIECES else "")
        axes.plot(where, bare, color=COLOURS[0], linestyle=style, linewidth=width, label=label)
    axes.set(ylim=(-2, 103), ylabel=f"agreement, % of {figures['tokens']['all']} tokens")
    axes.locator_params(axis="x", integer=True)  # there are no half blocks
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
