"""How much scores depend on the wording of the question: those of one test set over all wordings it was decoded with.

exp/<tag>/decode_<name>/<set>/scores.json                the first wording, which results are reported with
exp/<tag>/decode_<name>/<set>/prompts/<n>/scores.json    the n-th wording, from 2
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pam_espnet.data.tasks import task_spec
from pam_espnet.fileio import read_json
from pam_espnet.score.result import MAIN_METRICS
from pam_espnet.score.scoring import SCORES, WORDINGS


def read_spread(decode_dir: Path) -> list[dict[str, Any]]:
    """The spread of each task's first figure; [] where no other wording was scored.

    Args:
        decode_dir: ``exp/<tag>/decode_<name>/<set>``.

    Returns:
        for each task ``{"task", "metric", "mean", "min", "max", "wordings": [{"number", "example", "value"}]}``, where
        ``example`` is the prompt of one utterance.
    """
    others = sorted((int(path.parent.name), path.parent) for path in decode_dir.glob(f"{WORDINGS}/*/{SCORES}"))
    found: dict[str, list[dict[str, Any]]] = {}
    for number, folder in [(1, decode_dir), *others] if others else []:
        examples = _examples(folder / "nbest.jsonl")
        for task, metrics in read_json(folder / SCORES)["tasks"].items():
            value = metrics[MAIN_METRICS[task_spec(task).metric][0]]["value"]
            found.setdefault(task, []).append({"number": number, "example": examples.get(task), "value": value})
    spreads = []
    for task, wordings in found.items():
        values = [wording["value"] for wording in wordings if wording["value"] is not None]
        if values:
            summary = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
            metric = MAIN_METRICS[task_spec(task).metric][0]
            spreads.append({"task": task, "metric": metric, **summary, "wordings": wordings})
    return spreads


def _examples(path: Path) -> dict[str, str]:
    """{task: the prompt of its first utterance}."""
    prompts: dict[str, str] = {}
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                prompts.setdefault(entry["task"], entry["prompt"])
    return prompts
