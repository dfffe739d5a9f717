"""The epoch whose model an experiment keeps: by the loss on the validation set, or by what its answers score there.

The loss of a joint model is mostly that of the task with the longest answers: transcripts have ten tokens for each one
of a count. Scores of all tasks count the same here.

    exp/<tag>/<n>epoch.pth                                      read: the epochs that training kept (keep_nbest_models)
    exp/<tag>/select/<n>epoch/{model.safetensors,config.yaml}   each of them as a separate experiment
    exp/<tag>/select/<n>epoch/<set>/                            its answers to the validation set, and their scores
    exp/<tag>/selection.json, SELECTION.md                      every epoch's scores, task by task
    exp/<tag>/model.safetensors                                 the model that was chosen
"""

import gc
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pam_espnet.config import load_yaml
from pam_espnet.data.tasks import task_spec
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.shards import DecodeOptions, as_begun, decode_shard, is_complete, merge_shards
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import CheckpointError, DataError
from pam_espnet.fileio import MODEL_FILE, write_json, write_text
from pam_espnet.score.report import table
from pam_espnet.score.result import MAIN_METRICS, METRICS
from pam_espnet.score.scoring import score_directory
from pam_espnet.train.export import export_state, export_trained

RECORD = "selection.json"
TABLE = "SELECTION.md"


def kept_epochs(exp_dir: Path) -> list[int]:
    """The epochs whose models are there, in order. Raises CheckpointError: there is none."""
    found = [re.fullmatch(r"(\d+)epoch\.pth", path.name) for path in exp_dir.glob("*epoch.pth")]
    epochs = sorted(int(match[1]) for match in found if match)
    if not epochs:
        raise CheckpointError(f"{exp_dir}: no <n>epoch.pth here\n  -> train first: ./run.sh --stage 3 --stop_stage 3")
    return epochs


def normalise(task: str, value: float) -> float:
    """A task's first figure, as scores.json has it, on a scale where 0 is worthless, 1 very good, and more is better.

    WER: ``1 - min(WER, 1)``; an answer that continues without end costs no more than an empty one, or one such epoch
    would outweigh everything else. Accuracy: as it is. CIDEr-D has no upper end in practice (its maximum is 10) and
    counts as it is; a fixed scale, so that means of two runs can be compared.
    """
    metric = task_spec(task).metric
    if metric == "wer":
        return 1 - min(value / 100, 1.0)
    return value if metric == "caption" else value / 100


def summarise(scores: Mapping[str, Any]) -> dict[str, Any]:
    """``{"tasks": {task: {"metric", "value", "n", "normalised"}}, "mean"}`` of one epoch's ``scores.json``.
    Raises DataError: a task without a figure."""
    tasks: dict[str, Any] = {}
    for task, metrics in scores["tasks"].items():
        metric = MAIN_METRICS[task_spec(task).metric][0]
        value = metrics[metric]["value"]
        if value is None:
            raise DataError(scores["data_dir"], f"{METRICS[metric].label} of task {task} is undefined on this set")
        size, normalised = metrics[metric]["n"], normalise(task, value)
        tasks[task] = {"metric": metric, "value": value, "n": size, "normalised": normalised}
    return {"tasks": tasks, "mean": sum(entry["normalised"] for entry in tasks.values()) / len(tasks)}


def best(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry with the highest mean; of several, that with the lowest loss, then the earliest."""

    def rank(entry: dict[str, Any]) -> tuple[float, float, int]:
        loss = entry["loss_answer"]
        return -entry["mean"], math.inf if loss is None else loss, entry["epoch"]

    return min(epochs, key=rank)


def select_by_scores(
    exp_dir: Path,
    data_dir: Path,
    search: Mapping[str, Any],
    options: DecodeOptions,
    run: dict[str, Any],
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Decode ``data_dir`` with every kept epoch, score it, and make the best one ``model.safetensors``.

    What was decoded before is kept; a killed run continues where it stopped.

    Args:
        exp_dir, data_dir: a trained experiment, the formatted validation set.
        search, options, device, dtype: as for decoding.
        run: command and commit, kept beside the answers.

    Returns:
        what ``selection.json`` holds.
    """
    answers = AnswerOptions.from_dict(dict(search))
    losses = _losses(exp_dir / "curve.jsonl")
    entries = []
    for epoch in kept_epochs(exp_dir):
        folder = exp_dir / "select" / f"{epoch}epoch"
        export_state(exp_dir / f"{epoch}epoch.pth", folder / MODEL_FILE)
        shutil.copyfile(exp_dir / "config.yaml", folder / "config.yaml")
        out = folder / data_dir.name
        own = as_begun(options, out, device)
        if not is_complete(folder, data_dir, out, own, {**search, "dtype": dtype}):
            decode_shard(SpeechLLM.load(folder, answers, device, dtype), data_dir, out, own)
            merge_shards(data_dir, out, own, run)
            gc.collect()  # modules refer to themselves; two models may not fit on a GPU
        entries.append({"epoch": epoch, "loss_answer": losses.get(epoch), **summarise(score_directory(out, data_dir))})
    chosen = best(entries)
    export_state(exp_dir / f"{chosen['epoch']}epoch.pth", exp_dir / MODEL_FILE, {"selected_by": "validation scores"})
    record = {
        "selected": chosen["epoch"],
        "criterion": "mean over tasks: 1 - min(WER, 1), accuracy, CIDEr-D",
        "data_dir": str(data_dir),
        "epochs": entries,
        **run,
    }
    write_text(exp_dir / TABLE, _markdown(exp_dir.name, record))
    write_json(exp_dir / RECORD, record)
    return record


def select_by_loss(exp_dir: Path) -> Path:
    """Make ESPnet's average by its criterion ``model.safetensors`` again; forget a choice by scores."""
    path = export_trained(exp_dir, load_yaml(exp_dir / "config.yaml")["best_model_criterion"])
    for name in (RECORD, TABLE):
        (exp_dir / name).unlink(missing_ok=True)
    return path


def _losses(curve: Path) -> dict[int, float]:
    """{epoch: loss_answer on the validation set}, as training noted it."""
    lines = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()] if curve.is_file() else []
    return {line["epoch"]: line["loss_answer"] for line in lines if line["split"] == "valid" and "loss_answer" in line}


def _markdown(name: str, record: Mapping[str, Any]) -> str:
    tasks = sorted({task for entry in record["epochs"] for task in entry["tasks"]})
    metrics = {task: METRICS[record["epochs"][0]["tasks"][task]["metric"]] for task in tasks}
    rows = []
    for entry in record["epochs"]:
        mark = "**" if entry["epoch"] == record["selected"] else ""
        loss = "–" if entry["loss_answer"] is None else f"{entry['loss_answer']:.4f}"
        found = [(metrics[task], entry["tasks"][task]) for task in tasks]
        shown = [f"{metric.number(one['value'])} ({one['normalised']:.3f})" for metric, one in found]
        rows.append([f"{mark}{entry['epoch']}{mark}", loss, *shown, f"{mark}{entry['mean']:.4f}{mark}"])
    head = ("epoch", "loss ↓", *(f"{task}, {metrics[task].title}" for task in tasks), "mean ↑")
    return (
        f"# {name}: validation scores of the epochs kept\n\nOn {record['data_dir']}; in brackets normalised: "
        "1 - min(WER, 1), accuracy, CIDEr-D. The epoch with the highest mean is the experiment's model.\n\n"
        + table(head, rows)
    )
