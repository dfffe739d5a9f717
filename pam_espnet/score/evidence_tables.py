"""Tables over seeds, made of the files of evidence alone, and the tables that READMEs quote of them.

A row is a name (a fusion, or a variant with settings of its own); a figure is the mean over its seeds, with an interval
that counts seeds and utterances (``intervals.bootstrap_seeds``). The JSON has the form of that of ``compare.py``, so
that READMEs quote both in the same way.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np

from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, read_text, write_json, write_text
from pam_espnet.score.compare import Column, Difference, show_difference
from pam_espnet.score.evidence import Run, read_run
from pam_espnet.score.evidence_plots import plot_curves, plot_seeds, plot_weights
from pam_espnet.score.intervals import Statistics, bootstrap_seeds, value_of
from pam_espnet.score.report import table
from pam_espnet.score.result import MAIN_METRICS, METRICS
from pam_espnet.score.routing import TaskRouting

_TABLE = re.compile(r"(<!-- table: (\S+)(?: of (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_NOTE = (
    "Means over seeds. In brackets: 95 % interval that counts seeds (Student's t) and utterances (bootstrap, the same "
    "for all seeds). † one seed: the interval counts utterances alone. In parentheses: both seeds, where there are "
    "two.\n"
)

_DISTANCE_NOTE = (
    "The last columns: how far the weights of encoders and layers of two tasks are apart (total variation: 0 if they "
    "are the same, 1 if no layer is in both).\n"
)


def read_runs(folder: str | Path, size: str) -> dict[str, list[Run]]:
    """Name -> its runs in the order of their seeds; ``pam`` first, variants with settings last.

    Raises DataError: there is none; a file that is no evidence; settings that differ within a name, or test utterances.
    """
    runs = [run for path in sorted(Path(folder).glob(f"*_{size}_*.json")) if (run := read_run(path)).size == size]
    if not runs:
        raise DataError(folder, f"no *_{size}_*.json here", hint=f"make them: ./run_evidence.sh --size {size}")
    runs.sort(key=lambda run: (run.name != "pam", run.settings != "", run.name, run.seed))
    found = {name: list(group) for name, group in groupby(runs, lambda run: run.name)}
    for run in runs:
        same = found[run.name][0]
        if run.settings != same.settings:
            message = f"has the settings {run.settings!r}, but {same.file_name} {same.settings!r}"
            raise DataError(Path(folder) / run.file_name, message, hint="give one of the two another name")
        for column in run.columns():
            pair = runs[0].statistics(column), run.statistics(column)
            if pair[0] and pair[1] and pair[0][0] != pair[1][0]:
                message = f"has other utterances in {column.set} than {runs[0].file_name}"
                raise DataError(Path(folder) / run.file_name, message, hint="run one of them again on the same data")
    return found


def write_tables(folder: str | Path, size: str, output: str | Path) -> str:
    """Write ``<output>.md``, ``.json`` and three pictures from a size's files; return the Markdown. Learning curves are
    drawn of rows with the settings of the first, weights of the first alone. Raises: ``read_runs``."""
    found, output = read_runs(folder, size), Path(output)
    columns = list(dict.fromkeys(column for runs in found.values() for run in runs for column in run.columns()))
    statistics = {
        (name, suffix): {
            column: {run.seed: one[1] for run in runs if (one := run.statistics(column, audio))} for column in columns
        }
        for name, runs in found.items()
        for audio, suffix in (("on", ""), ("zero", ", audio off"))
        if any(one["audio"] == audio for run in runs for one in run.utterances)
    }
    first, (top, top_runs) = next(iter(statistics.values())), next(iter(found.items()))
    rows = []
    for (name, suffix), own in statistics.items():
        seeds = sorted({seed for by_seed in own.values() for seed in by_seed})
        scores = [_cell(column, own[column]) for column in columns]
        differences = [_cell(column, own[column], first[column]) for column in columns if own is not first]
        found_in = {"scores": list(filter(None, scores)), "difference_to_first": list(filter(None, differences))}
        settings = found[name][0].settings
        rows.append({"experiment": f"{name}{suffix}", "settings": settings, "seeds": seeds, **found_in})
    write_json(output.with_suffix(".json"), {"size": size, "rows": rows})
    plot_seeds(rows, _main(columns), output.with_suffix(".png"))
    alike = {name: runs for name, runs in found.items() if runs[0].settings == top_runs[0].settings}
    plot_curves({name: [run.curve for run in runs] for name, runs in alike.items()}, _beside(output, "curves"))
    weights = {
        f"{top}, seed {run.seed}": {task: _task_routing(one).encoders for task, one in run.routing.items()}
        for run in top_runs
        if run.routing
    }
    plot_weights(weights, _beside(output, "weights"))
    text = _markdown(size, rows, columns, found, output.name)
    write_text(output.with_suffix(".md"), text)
    return text


def readme_tables(readme: str | Path) -> str:
    """The text of a README with every table between ``<!-- table: FILE.json -->`` and ``<!-- end -->`` made anew from
    the JSON of evidence, of a comparison, of answers or of cells (``early_exit.comparison``); FILE.json is relative to
    the README. Of evidence it has the rows with the settings of the first, no variants; with
    ``<!-- table: FILE.json of NAME,... -->`` the rows of these names, without controls.
    Raises DataError: no such file or experiment."""

    def fill(match: re.Match[str]) -> str:
        path = Path(readme).parent / match[2]
        if not path.is_file():
            raise DataError(readme, f"table of {match[2]}: no such file", hint="correct the name after '<!-- table:'")
        rows = read_json(path)["rows"]
        if "answers" in rows[0]:
            prompts = list(rows[0]["answers"])
            return match[1] + table(("recording", *prompts), [_answer_cells(row, prompts) for row in rows]) + match[4]
        if "scores" not in rows[0]:
            return match[1] + table(tuple(rows[0]), [list(row.values()) for row in rows]) + match[4]
        if match[3]:
            names, labels = set(match[3].split(",")), [row["experiment"] for row in rows]
            if unknown := names - set(labels):
                hint = f"there are {', '.join(labels)}"
                raise DataError(readme, f"table of {match[2]}: no {', '.join(sorted(unknown))}", hint=hint)
            rows = [row for row in rows if row["experiment"] in names]
        else:
            rows = [row for row in rows if row.get("settings") == rows[0].get("settings")]
        columns = _main(list(dict.fromkeys(_column(entry) for row in rows for entry in row["scores"])))
        titles = [f"{column.set}, {METRICS[column.metric].title}" for column in columns]
        return match[1] + table(("", *titles), [_score_cells(row, columns) for row in rows]) + match[4]

    return _TABLE.sub(fill, read_text(readme))


def _beside(output: Path, name: str) -> Path:
    return output.with_name(f"{output.name}_{name}.png")


def _cell(
    column: Column, own: Mapping[int, Statistics], minus: Mapping[int, Statistics] | None = None
) -> dict[str, Any] | None:
    """Mean with its interval, and the figure of each seed; of the differences to ``minus`` at the seeds of both."""
    seeds = [seed for seed in own if minus is None or seed in minus]
    if not seeds:
        return None
    runs, others = [own[seed] for seed in seeds], [minus[seed] for seed in seeds] if minus is not None else []
    figures = [value_of(run) for run in runs], [value_of(run) for run in others] or [0.0] * len(runs)
    by_seed = {
        str(seed): None if value is None or other is None else value - other
        for seed, value, other in zip(seeds, *figures, strict=True)
    }
    return {**column._asdict(), **bootstrap_seeds(runs, others)._asdict(), "by_seed": by_seed}


def _column(entry: Mapping[str, Any]) -> Column:
    return Column(entry["set"], entry["task"], entry["metric"])


def _main(columns: Sequence[Column]) -> list[Column]:
    """The first figure of each task."""
    return [column for column in columns if column.metric == MAIN_METRICS[task_spec(column.task).metric][0]]


def _score_cells(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    entries = {_column(entry): entry for entry in row["scores"]}
    seeds = row.get("seeds")  # a comparison of experiments has none
    label = row["experiment"] + ("" if seeds is None else f", {len(seeds)} seeds" if len(seeds) > 1 else " †")
    return [label, *(_figure(column, entries.get(column)) for column in columns)]


def _figure(column: Column, entry: Mapping[str, Any] | None) -> str:
    """A figure with its interval; of two seeds both instead, of which no useful interval can be had."""
    metric, seeds = METRICS[column.metric], list((entry or {}).get("by_seed", {}).values())
    if entry is None or len(seeds) != 2:
        return metric.show_entry(entry)
    return f"{metric.number(entry['value'])} ({', '.join(metric.number(value) for value in seeds)})"


def _answer_cells(row: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
    """The answers about a recording (``bin/pam_answers.py``); below the one whose answer is known, what is right."""
    right = {row["right"]["prompt"]: f"<br>*right: {row['right']['answer']}*"}
    return [f"`{row['recording']}`", *(row["answers"][prompt] + right.get(prompt, "") for prompt in prompts)]


def _difference_cells(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    entries = {_column(entry): entry for entry in row["difference_to_first"]}
    cells = [row["experiment"]]
    for column in columns:
        entry = entries.get(column)
        found = Difference(entry["value"], entry["low"], entry["high"], None) if entry else None
        cells.append(
            show_difference(found, column)
            + (" †" if entry and entry["low"] is not None and len(entry["by_seed"]) == 1 else "")
        )
    return cells


def _markdown(
    size: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], found: Mapping[str, list[Run]], name: str
) -> str:
    runs = [run for group in found.values() for run in group]
    head = ("", *(column.title for column in columns))
    parts = [f"# Evidence, size {size}\n", _NOTE, table(head, [_score_cells(row, columns) for row in rows])]
    if len(rows) > 1:
        note = "Paired over utterances and seeds; bold where the interval excludes zero.\n"
        cells = [_difference_cells(row, columns) for row in rows[1:]]
        parts += [f"## Difference to {rows[0]['experiment']}\n", note, table(head, cells)]
    parts.append(f"![Figures of each seed]({name}.png)\n")
    tasks = sorted({task for run in runs for task in run.routing})
    parts += [f"## Learning curves\n\n![Tokens predicted right in training]({name}_curves.png)\n"]
    parts += [f"## Weights of the encoders\n\n![Weights of the first row]({name}_weights.png)\n"]
    parts += [_DISTANCE_NOTE, _routing_table(runs, tasks)]
    if worded := {label: group for label, group in found.items() if any(run.wordings for run in group)}:
        note = "Means over seeds: the score; how often the router chose the expert of wording 1, that of training.\n"
        parts += ["## Wordings of the prompt\n", note, _wordings_table(worded)]
    titles = ("", "seed", "commit", "hours of audio trained", "wall min", "CPU min", "killed attempts, not counted")
    cells = []
    for run in runs:
        least = "> " if run.killed_attempts else ""  # what a killed attempt had made is kept, its time is not known
        times = [f"{least}{one / 60:.1f}" if one else "–" for one in (run.wall_seconds, run.cpu_seconds)]
        made = [run.commit, f"{run.hours_trained:.2f}", *times]
        machine = [run.versions["torch"], run.processor["capability"], "yes" if run.processor["bfloat16"] else "no"]
        cells.append([run.name, str(run.seed), *made, str(run.killed_attempts), *machine])
    parts += ["## Runs\n", table((*titles, "torch", "processor", "native bfloat16"), cells)]
    return "\n".join([*parts, "```", *(run.command for run in runs), "```\n"])


def _routing_table(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    pairs, lines = list(combinations(tasks, 2)), []
    for run in runs:
        found = {task: _task_routing(one) for task, one in run.routing.items()}
        cells = [found[task].describe() if task in found else "–" for task in tasks]
        both = [f"{found[a].distance(found[b]):.2f}" if a in found and b in found else "–" for a, b in pairs]
        lines.append([f"{run.name}, seed {run.seed}", *cells, *both])
    return table(("", *tasks, *(f"{a} – {b}" for a, b in pairs)), lines)


def _task_routing(record: Mapping[str, Any]) -> TaskRouting:
    layers = {name: np.array(weights) for name, weights in record["layers"].items()}
    share, probs = np.array(record["expert_share"]), np.array(record["expert_probs"])
    return TaskRouting(record["utterances"], share, probs, layers)


def _wordings_table(worded: Mapping[str, list[Run]]) -> str:
    lines: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for name, runs in worded.items():
        for one in (one for run in runs for one in run.wordings):
            key = one["set"], one["metric"], one["number"], one["prompt"]
            lines.setdefault(key, {}).setdefault(name, []).append(one)
    cells = []
    for (set_name, metric, number, prompt), found in sorted(lines.items()):
        cells.append([set_name, f"{number}: {prompt}"])
        for name in worded:
            own = [one for one in found.get(name, []) if one["value"] is not None]
            value, share = (np.mean([one[key] for one in own]) if own else None for key in ("value", "share"))
            cells[-1] += [METRICS[metric].number(value), "–" if share is None else f"{share:.0%}"]
    titles = [title for name in worded for title in (f"{name}: score", f"{name}: its expert")]
    return table(("", "wording", *titles), cells)
