"""Collect everything an experiment measured into ``RESULTS.md``, ``RESULTS.txt``, ``results.json`` and pictures.

    exp/<tag>/decode_<name>/<set>/{scores,stats,key}.json, nbest.jsonl      read
    exp/<tag>/curve.jsonl                                                    read, where training left one
    exp/<tag>/model.safetensors                                              hashed
    exp/<tag>/{RESULTS.md, RESULTS.txt, results.json, learning_curve.png, routing.png, confusion.png}    written

Nothing is computed here that was not measured by scoring or decoding; what is missing is left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, sha256_file, write_json, write_text
from pam_espnet.score.result import METRICS
from pam_espnet.score.routing import TaskRouting, read_routing
from pam_espnet.score.scoring import DECODE_PREFIX, SCORES, SPEED_CONDITIONS
from pam_espnet.score.wordings import read_spread

CHECKPOINT = "model.safetensors"
SELECTION = "selection.json"  # where the epoch was chosen by validation scores


@dataclass
class Decoding:
    """One scored test set of one decoding.

    Args:
        path: ``exp/<tag>/decode_<name>/<set>``.
        scores: its ``scores.json``.
        stats: its ``stats.json``; empty where decoding left none.
    """

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
    def checkpoint_sha256(self) -> str | None:
        """Hash of the checkpoint that was decoded with, as decoding noted it in ``key.json``."""
        key = self.path / "key.json"
        return read_json(key).get("checkpoint_sha256") if key.is_file() else None

    @property
    def audio_off(self) -> bool:
        """Whether the waveform was zeroed: the control that shows what a model answers without listening."""
        return self.stats.get("audio", "on") != "on"


def find_decodings(exp: str | Path) -> list[Decoding]:
    """All scored test sets of an experiment, or of one of its ``decode_*`` directories; sorted by path.

    Raises:
        DataError: there is none.
    """
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
    """Mean routing per task; each test set counted once, from its first decoding that heard the audio."""
    files: dict[str, Path] = {}
    for decoding in sorted(decodings, key=lambda decoding: decoding.audio_off):
        file = decoding.path / "nbest.jsonl"
        if file.is_file():
            files.setdefault(decoding.set, file)
    return read_routing(files.values())


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


def provenance(decoding: Decoding) -> dict[str, Any]:
    """Command, commit and versions behind a decoding, and those behind its scores."""
    stats = decoding.stats
    return {
        "command": shlex.join(map(str, stats.get("command") or [])),
        "commit": stats.get("commit"),
        "checkpoint_sha256": decoding.checkpoint_sha256,
        "versions": {**(stats.get("versions") or {}), **decoding.scores["versions"]},
    }


def write_report(exp: str | Path) -> Path:
    """Write the report of experiment ``exp`` into it; return the path of ``RESULTS.md``.

    Raises:
        DataError: nothing has been scored, or a file that is read is wrong.
    """
    from pam_espnet.score.plots import plot_confusions, plot_curve, plot_routing, read_curve

    exp = Path(exp)
    decodings = find_decodings(exp)
    routing = routing_of(decodings)
    curve = read_curve(exp / "curve.jsonl") if (exp / "curve.jsonl").is_file() else []
    pictures = []
    if curve:
        plot_curve(curve, exp / "learning_curve.png", title=exp.name)
        pictures.append(("Learning curve", "learning_curve.png"))
    if routing:
        plot_routing(routing, exp / "routing.png", title=f"{exp.name}: weights of encoders and layers")
        pictures.append(("Routing", "routing.png"))

    confusions = {
        f"{decoding.name}, {decoding.set}": details["confusion"]
        for decoding in decodings
        for details in decoding.scores["details"].values()
        if "confusion" in details
    }
    if confusions:
        plot_confusions(confusions, exp / "confusion.png", title=f"{exp.name}: numbers said")
        pictures.append(("Numbers said", "confusion.png"))

    checkpoint = exp / CHECKPOINT
    spreads = [
        {"decode": decoding.name, "set": decoding.set, **spread}
        for decoding in decodings
        for spread in read_spread(decoding.path)
    ]
    results = {
        "experiment": exp.name,
        "checkpoint": {"file": CHECKPOINT, "sha256": sha256_file(checkpoint), "bytes": checkpoint.stat().st_size}
        if checkpoint.is_file()
        else None,
        **({"selection": read_json(exp / SELECTION)} if (exp / SELECTION).is_file() else {}),
        "decodings": [
            {
                "decode": decoding.name,
                "set": decoding.set,
                "audio": decoding.stats.get("audio"),
                **{key: decoding.scores[key] for key in ("tasks", "details", "speed", "bootstrap", "normaliser")},
                "coverage": decoding.scores.get("coverage"),  # absent from older scores
                "ids": decoding.scores.get("ids"),
                **provenance(decoding),
            }
            for decoding in decodings
        ],
        **({"wordings": spreads} if spreads else {}),
        "routing": {task: row.record() for task, row in routing.items()},
    }
    write_json(exp / "results.json", results)
    write_text(exp / "RESULTS.txt", f"{exp.name}\n\n{text_table(*_score_cells(decodings))}")
    write_text(exp / "RESULTS.md", _markdown(results, decodings, routing, pictures))
    return exp / "RESULTS.md"


def _markdown(
    results: dict[str, Any],
    decodings: list[Decoding],
    routing: dict[str, TaskRouting],
    pictures: list[tuple[str, str]],
) -> str:
    first = decodings[0].scores
    bootstrap = first["bootstrap"]
    parts = [
        f"# {results['experiment']}\n",
        f"In brackets: {bootstrap['level']:.0%} interval, bootstrap over utterances "
        f"({bootstrap['resamples']} resamples, seed {bootstrap['seed']}). "
        f"Normalised: {first['normaliser']['name']} of {first['normaliser']['package']} "
        f"{first['normaliser']['version']}.\n",
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
    parts += [f"![{title}]({file})\n" for title, file in pictures]
    for decoding in decodings:
        for task, details in decoding.scores["details"].items():
            text = _details(details)
            if text:
                parts.append(f"## {decoding.name}, {decoding.set}: {task}\n\n{text}")
    parts += ["## How it was made\n", _made(results)]
    return "\n".join(parts)


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
                shown = METRICS[metric].show_entry(entry)
                rest = ", ".join(f"{_words(key)} {value}" for key, value in entry.items() if key not in _SHOWN)
                rows.append([name, decoding.set, task, METRICS[metric].title, shown, str(entry["n"]), rest])
    return ("decoding", "set", "task", "metric", "value", "utterances", "counts"), rows


def _spread_table(spreads: Sequence[dict[str, Any]]) -> str:
    """One row for each set and task: what it scores over all wordings it was asked in."""
    rows = []
    for spread in spreads:
        metric = METRICS[spread["metric"]]
        figures = [metric.number(spread[key]) for key in ("mean", "min", "max")]
        count = str(len(spread["wordings"]))
        rows.append([spread["decode"], spread["set"], spread["task"], metric.title, count, *figures])
    return table(("decoding", "set", "task", "metric", "wordings", "mean", "min", "max"), rows)


_SHOWN = ("value", "low", "high", "n")


def _speed_table(decodings: list[Decoding]) -> str:
    rows = []
    for decoding in decodings:
        speed = decoding.scores["speed"]
        if speed is None:
            continue
        memory = speed["peak_memory_bytes"]
        rows.append(
            [
                decoding.name,
                decoding.set,
                _number(speed["rtf"]),
                _number(speed["tokens_per_second"]),
                "–" if memory is None else f"{memory / 2**30:.2f}",
                _number(speed["seconds_audio"]),
                *("–" if speed[key] is None else str(speed[key]) for key in SPEED_CONDITIONS),
            ]
        )
    head = ("decoding", "set", "real-time factor", "tokens/s", "peak memory GiB", "audio s")
    return table((*head, *map(_words, SPEED_CONDITIONS)), rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _details(details: dict[str, Any]) -> str:
    """Plain counts on one line, then the confusion matrix and the worst utterances where there are any."""
    plain = [f"{_words(key)} {value}" for key, value in details.items() if isinstance(value, int | str)]
    parts = [", ".join(plain) + ".\n"] if plain else []
    if absent := details.get("not_computed"):
        lines = [f"- {METRICS[name].label}: {reason}" for name, reason in absent.items()]
        parts.append("Not computed:\n\n" + "\n".join(lines) + "\n")
    if per_count := details.get("per_count"):
        rows = [
            [
                str(entry["count"]),
                str(entry["n"]),
                METRICS["accuracy"].number(entry["accuracy"]),
                METRICS["mae"].number(entry["mae"]),
                str(entry["not_a_number"]),
            ]
            for entry in per_count
        ]
        parts.append(table(("true", "utterances", "accuracy %", "MAE", "not a number"), rows))
    if confusion := details.get("confusion"):
        rows = [
            [f"**{name}**", *map(str, counts)]
            for name, counts in zip(confusion["rows"], confusion["matrix"], strict=True)
        ]
        parts.append(table(("true \\ said", *confusion["columns"]), rows))
    if worst := details.get("worst"):
        blocks = [
            f"{entry['utt']}: {entry['errors']} errors in {entry['words']} words\n{entry['alignment']}"
            for entry in worst
        ]
        body = "\n\n".join(blocks)
        parts.append(f"The utterances with the most word errors:\n\n```\n{body}\n```\n")
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
