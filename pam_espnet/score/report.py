"""Report of an experiment: everything it measured in ``RESULTS.md``, ``RESULTS.txt``, ``results.json`` and pictures.

Reads ``decode_*/*/{scores,stats,key}.json`` and ``nbest.jsonl``, ``curve.jsonl`` and ``model.safetensors``. Nothing is
computed here that was not measured by scoring or decoding; what is missing is left out.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import DataError
from pam_espnet.fileio import MODEL_FILE, read_json, sha256_file, write_json, write_text
from pam_espnet.score.result import MAIN_METRICS, METRICS
from pam_espnet.score.routing import TaskRouting, read_routing
from pam_espnet.score.scoring import DECODE_PREFIX, SCORES, SPEED_CONDITIONS, WORDINGS

SELECTION = "selection.json"  # where the epoch was chosen by validation scores
_SHOWN = ("value", "low", "high", "n")
_SCORES = ("tasks", "details", "speed", "bootstrap", "normaliser", "coverage", "ids")


@dataclass
class Decoding:
    """One scored test set of one decoding: ``exp/<tag>/decode_<name>/<set>``, scores.json and stats.json (or {})."""

    path: Path
    scores: dict[str, Any]
    stats: dict[str, Any]

    @property
    def set(self) -> str:
        """Name of the test set."""
        return self.path.name

    @property
    def name(self) -> str:
        """Name of the decoding, without the prefix ``decode_``."""
        return self.path.parent.name.removeprefix(DECODE_PREFIX)

    @property
    def audio_off(self) -> bool:
        """Whether the waveform was zeroed: the control that shows what a model answers without audio."""
        return self.stats.get("audio", "on") != "on"

    def provenance(self) -> dict[str, Any]:
        """Command, commit, checkpoint and versions behind the hypotheses, and versions behind the scores."""
        key = self.path / "key.json"
        return {
            "command": shlex.join(map(str, self.stats.get("command") or [])),
            "commit": self.stats.get("commit"),
            "checkpoint_sha256": read_json(key).get("checkpoint_sha256") if key.is_file() else None,
            "versions": {**(self.stats.get("versions") or {}), **self.scores["versions"]},
        }


def find_decodings(exp: str | Path) -> list[Decoding]:
    """All scored test sets of an experiment, or of one of its ``decode_*`` directories; sorted by path.
    Raises DataError: there is none."""
    exp = Path(exp)
    pattern = f"*/{SCORES}" if exp.name.startswith(DECODE_PREFIX) else f"{DECODE_PREFIX}*/*/{SCORES}"
    found = []
    for file in sorted(exp.glob(pattern)):
        stats = file.with_name("stats.json")
        found.append(Decoding(file.parent, read_json(file), read_json(stats) if stats.is_file() else {}))
    if not found:
        raise DataError(exp, f"no {pattern} here", hint="score a decoded test set first (stage 5)")
    return found


def routing_of(decodings: Sequence[Decoding]) -> dict[str, TaskRouting]:
    """Mean routing per task; each test set counted once, from its first decoding with audio."""
    files: dict[str, Path] = {}
    for decoding in sorted(decodings, key=lambda decoding: decoding.audio_off):
        file = decoding.path / "nbest.jsonl"
        if file.is_file():
            files.setdefault(decoding.set, file)
    return read_routing(files.values())


def read_spread(decode_dir: Path) -> list[dict[str, Any]]:
    """Spread of each task's first figure over the wordings ``<decode_dir>/prompts/<number>``; [] where none was scored.

    Returns:
        for each task ``{"task", "metric", "mean", "min", "max", "wordings": [{"number", "example", "value"}]}``, where
        number 1 is ``decode_dir`` and ``example`` the prompt of one utterance.
    """
    others = sorted((int(path.parent.name), path.parent) for path in decode_dir.glob(f"{WORDINGS}/*/{SCORES}"))
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number, folder in [(1, decode_dir), *others] if others else []:
        examples: dict[str, str] = {}
        if (folder / "nbest.jsonl").is_file():
            for line in (folder / "nbest.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
                examples.setdefault((entry := json.loads(line))["task"], entry["prompt"])
        for task, metrics in read_json(folder / SCORES)["tasks"].items():
            metric = MAIN_METRICS[task_spec(task).metric][0]
            one = {"number": number, "example": examples.get(task), "value": metrics[metric]["value"]}
            found.setdefault((task, metric), []).append(one)
    spreads = []
    for (task, metric), wordings in found.items():
        if values := [wording["value"] for wording in wordings if wording["value"] is not None]:
            summary = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
            spreads.append({"task": task, "metric": metric, **summary, "wordings": wordings})
    return spreads


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a terminal: columns in line, none of Markdown's marks."""
    lines = [[cell.replace("<br>", " ").replace("**", "") for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded) + "\n"


def write_report(exp: str | Path) -> Path:
    """Write the report of experiment ``exp`` into it; return the path of ``RESULTS.md``. Errors: those of its input."""
    exp = Path(exp)
    decodings = find_decodings(exp)
    routing = routing_of(decodings)
    checkpoint, selection = exp / MODEL_FILE, exp / SELECTION
    results: dict[str, Any] = {"experiment": exp.name, "checkpoint": None}
    if checkpoint.is_file():
        size = checkpoint.stat().st_size
        results["checkpoint"] = {"file": MODEL_FILE, "sha256": sha256_file(checkpoint), "bytes": size}
    if selection.is_file():
        results["selection"] = read_json(selection)
    results["decodings"], spreads = [], []
    for decoding in decodings:
        name = {"decode": decoding.name, "set": decoding.set}
        scores = {key: decoding.scores.get(key) for key in _SCORES}  # older ones have no coverage and ids
        made = {"audio": decoding.stats.get("audio"), **scores, **decoding.provenance()}
        results["decodings"].append({**name, **made})
        spreads += [{**name, **spread} for spread in read_spread(decoding.path)]
    if spreads:
        results["wordings"] = spreads
    results["routing"] = {task: row.record() for task, row in routing.items()}
    write_json(exp / "results.json", results)
    write_text(exp / "RESULTS.txt", f"{exp.name}\n\n{text_table(*_score_cells(decodings))}")
    write_text(exp / "RESULTS.md", _markdown(results, decodings, routing, _draw(exp, decodings, routing)))
    return exp / "RESULTS.md"


def _draw(exp: Path, decodings: list[Decoding], routing: dict[str, TaskRouting]) -> list[str]:
    """Draw the pictures that there is something for; the lines of Markdown that show them."""
    from pam_espnet.score.plots import plot_confusions, plot_curve, plot_routing, read_curve

    shown = []
    if (exp / "curve.jsonl").is_file() and (curve := read_curve(exp / "curve.jsonl")):
        plot_curve(curve, exp / "learning_curve.png", title=exp.name)
        shown.append("![Learning curve](learning_curve.png)\n")
    if routing:
        plot_routing(routing, exp / "routing.png", title=f"{exp.name}: weights of encoders and layers")
        shown.append("![Routing](routing.png)\n")
    confusions = {
        f"{decoding.name}, {decoding.set}": details["confusion"]
        for decoding in decodings
        for details in decoding.scores["details"].values()
        if "confusion" in details
    }
    if confusions:
        plot_confusions(confusions, exp / "confusion.png", title=f"{exp.name}: answers")
        shown.append("![Answers](confusion.png)\n")
    return shown


def _markdown(
    results: dict[str, Any], decodings: list[Decoding], routing: dict[str, TaskRouting], pictures: list[str]
) -> str:
    from pam_espnet.score.espnet_tables import espnet_section

    first = decodings[0].scores
    bootstrap, normaliser = first["bootstrap"], first["normaliser"]
    parts = [
        f"# {results['experiment']}\n",
        f"In brackets: {bootstrap['level']:.0%} interval, bootstrap over utterances "
        f"({bootstrap['resamples']} resamples, seed {bootstrap['seed']}). "
        f"Normalised: {normaliser['name']} of {normaliser['package']} {normaliser['version']}.\n",
        "## Scores\n",
        table(*_score_cells(decodings)),
    ]
    if partial := [line for decoding in decodings if (line := _covered(decoding))]:
        parts += ["## Utterances left out\n", "\n".join(partial) + "\n"]
    if spreads := results.get("wordings"):
        parts += ["## Wordings of the question\n", _spread_table(spreads)]
    if any(decoding.scores["speed"] for decoding in decodings):
        parts += ["## Speed\n", _speed_table(decodings)]
    if routing:
        rows = [[task, str(row.utterances), row.describe()] for task, row in routing.items()]
        parts += ["## Routing\n", table(("task", "utterances", "weights"), rows)]
    parts += pictures
    for decoding in decodings:
        for task, details in decoding.scores["details"].items():
            if text := _details(details):
                parts.append(f"## {decoding.name}, {decoding.set}: {task}\n\n{text}")
    if section := espnet_section(decodings):
        parts.append(section)
    return "\n".join([*parts, "## How it was made\n", _made(results)])


def _words(key: str) -> str:
    return key.replace("_", " ")


def _covered(decoding: Decoding) -> str:
    """A line of a list where not all of a set was scored, else nothing."""
    coverage, ids = decoding.scores.get("coverage"), decoding.scores.get("ids")
    if coverage is None or coverage["scored"] == coverage["of"]:
        return ""
    skipped = ", ".join(f"{count} {reason}" for reason, count in coverage["skipped"].items()) or "none skipped"
    chosen = f"; only those in {ids['file']}" if ids else ""
    return f"- {decoding.name}, {decoding.set}: {coverage['scored']} of {coverage['of']} scored ({skipped}{chosen})"


def _score_cells(decodings: list[Decoding]) -> tuple[Sequence[str], list[list[str]]]:
    """Head and rows of the one table over all test sets."""
    rows = []
    for decoding in decodings:
        name = decoding.name + (" (audio off)" if decoding.audio_off else "")
        for task, metrics in decoding.scores["tasks"].items():
            for metric, entry in metrics.items():
                shown = [METRICS[metric].title, METRICS[metric].show_entry(entry), str(entry["n"])]
                rest = ", ".join(f"{_words(key)} {value}" for key, value in entry.items() if key not in _SHOWN)
                rows.append([name, decoding.set, task, *shown, rest])
    return ("decoding", "set", "task", "metric", "value", "utterances", "counts"), rows


def _spread_table(spreads: Sequence[dict[str, Any]]) -> str:
    rows = []
    for spread in spreads:
        metric = METRICS[spread["metric"]]
        figures = [metric.number(spread[key]) for key in ("mean", "min", "max")]
        count = str(len(spread["wordings"]))
        rows.append([spread["decode"], spread["set"], spread["task"], metric.title, count, *figures])
    return table(("decoding", "set", "task", "metric", "wordings", "mean", "min", "max"), rows)


def _speed_table(decodings: list[Decoding]) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"

    rows = []
    for decoding in decodings:
        if speed := decoding.scores["speed"]:
            memory = speed["peak_memory_bytes"]
            figures = [speed["rtf"], speed["tokens_per_second"], memory and memory / 2**30, speed["seconds_audio"]]
            conditions = ["–" if speed[key] is None else str(speed[key]) for key in SPEED_CONDITIONS]
            rows.append([decoding.name, decoding.set, *map(number, figures), *conditions])
    head = ("decoding", "set", "real-time factor", "tokens/s", "peak memory GiB", "audio s")
    return table((*head, *map(_words, SPEED_CONDITIONS)), rows)


def _details(details: dict[str, Any]) -> str:
    """Plain counts on one line, then the confusion matrix and the worst utterances where there are any."""
    plain = [f"{_words(key)} {value}" for key, value in details.items() if isinstance(value, int | str)]
    parts = [", ".join(plain) + ".\n"] if plain else []
    if absent := details.get("not_computed"):
        lines = "\n".join(f"- {METRICS[name].label}: {reason}" for name, reason in absent.items())
        parts.append(f"Not computed:\n\n{lines}\n")
    if per_count := details.get("per_count"):
        rows = []
        for entry in per_count:
            figures = [METRICS["accuracy"].number(entry["accuracy"]), METRICS["mae"].number(entry["mae"])]
            rows.append([str(entry["count"]), str(entry["n"]), *figures, str(entry["not_a_number"])])
        parts.append(table(("true", "utterances", "accuracy %", "MAE", "not a number"), rows))
    if confusion := details.get("confusion"):
        pairs = zip(confusion["rows"], confusion["matrix"], strict=True)
        rows = [[f"**{name}**", *map(str, counts)] for name, counts in pairs]
        parts.append(table(("true \\ answer", *confusion["columns"]), rows))
    if worst := details.get("worst"):
        blocks = [f"{one['utt']}: {one['errors']} errors in {one['words']} words\n{one['alignment']}" for one in worst]
        parts.append("The utterances with the most word errors:\n\n```\n" + "\n\n".join(blocks) + "\n```\n")
    return "\n".join(parts)


def _made(results: dict[str, Any]) -> str:
    lines = []
    if checkpoint := results["checkpoint"]:
        lines.append(f"- checkpoint: `{checkpoint['file']}`, SHA-256 `{checkpoint['sha256']}`")
    if selection := results.get("selection"):
        lines.append(f"- the model is that of epoch {selection['selected']}, chosen by scores (SELECTION.md)")
    for entry in results["decodings"]:
        versions = ", ".join(f"{name} {number}" for name, number in sorted(entry["versions"].items()))
        used = entry["checkpoint_sha256"]
        if used and checkpoint and used != checkpoint["sha256"]:
            lines.append(f"- **{entry['decode']}, {entry['set']} was decoded with another checkpoint**: `{used}`")
        lines.append(f"- {entry['decode']}, {entry['set']}: commit {entry['commit'] or 'unknown'}; {versions}")
        if entry["command"]:
            lines.append(f"  ```\n  {entry['command']}\n  ```")
    return "\n".join(lines) + "\n"
