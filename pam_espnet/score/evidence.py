"""Evidence: one file per finished training, ``<name>_<size>_<seed>.json``, of which the tables over seeds are made.

A file has the answers to the test sets beside their references, the numbers behind the main figures, the routing, and
where it comes from: commit, command, time, processor.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np

from pam_espnet.config import load_yaml
from pam_espnet.data.batching import BatchingOptions, epoch_batches
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import Passport
from pam_espnet.data.tables import read_table
from pam_espnet.data.tasks import TASKS, task_spec
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, read_text, write_text
from pam_espnet.score.compare import Column
from pam_espnet.score.intervals import Statistics
from pam_espnet.score.plots import read_curve
from pam_espnet.score.report import Decoding, find_decodings, read_spread, routing_of
from pam_espnet.score.result import MAIN_METRICS, statistics_of
from pam_espnet.score.routing import read_routing
from pam_espnet.score.scoring import UTT_SCORES, WORDINGS

SCHEMA = 1
_TEXTS = {"utt", "set", "task", "audio", "hypothesis"}


@dataclass(frozen=True)
class Run:
    """One finished training, decoded and scored; the fields are the keys of its file."""

    schema: int
    name: str  # a fusion, or a variant with settings of its own
    size: str
    seed: int
    settings: str  # changes to the configuration beside the seed, as --set takes them, or what else was changed
    commit: str
    command: str
    hours_trained: float  # of audio, in joint training; an utterance counts as often as it was in a batch
    wall_seconds: float  # of all stages; with the feature cache, where this run made it
    cpu_seconds: float
    killed_attempts: int  # whose time is not known and not counted
    versions: dict[str, str]
    processor: dict[str, Any]  # what torch uses of it, and whether it computes bfloat16 natively
    routing: dict[str, dict[str, Any]]  # task -> TaskRouting.record()
    curve: list[dict[str, Any]]  # of joint training: step, split, and acc_<task>, the share of tokens predicted right
    wordings: list[dict[str, Any]]  # of the prompt; see ``_wordings``
    utterances: list[dict[str, Any]]  # utt, set, task, audio, hypothesis, references, and of each figure its numbers

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.size}_{self.seed}.json"

    def columns(self) -> list[Column]:
        """The main figures that it has."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for one in self.utterances:
            found.setdefault((one["set"], one["task"]), one)
        metrics = {kind: MAIN_METRICS[task_spec(kind[1]).metric] for kind in found}
        return [Column(*kind, metric) for kind, one in found.items() for metric in metrics[kind] if metric in one]

    def statistics(self, column: Column, audio: str = "on") -> tuple[list[str], Statistics] | None:
        """Utterances (sorted) and their numbers; None where it has none."""
        kind = column.set, column.task, audio
        entries = [one for one in self.utterances if (one["set"], one["task"], one["audio"]) == kind]
        entries.sort(key=lambda one: one["utt"])
        numbers = np.array([one[column.metric] for one in entries], dtype=np.float64)
        return ([one["utt"] for one in entries], statistics_of(column.metric, numbers)) if entries else None


def gather(
    exp: str | Path, train: str | Path, times: str | Path, folder: str | Path, *, name: str, size: str, settings: str
) -> Path:
    """Write the file of experiment ``exp`` into ``folder``; return it. Errors: those of its input.

    Args:
        train: the formatted set that it was trained on.
        times: a line "begin" for each attempt, and one of wall, user and system seconds for each that ended.
        name, size, settings: see ``Run``.
    """
    exp, decodings = Path(exp), sorted(find_decodings(exp), key=lambda decoding: decoding.audio_off)
    config, made = load_yaml(exp / "config.yaml"), decodings[0].provenance()
    attempts = read_text(times).splitlines()
    ended = [line.split() for line in attempts if line != "begin"]
    wall, user, system = np.array(ended, dtype=np.float64).reshape(-1, 3).sum(0).tolist()
    run = Run(
        schema=SCHEMA,
        name=name,
        size=size,
        seed=config["seed"],
        settings=settings,
        commit=made["commit"] or "unknown",
        command=made["command"],
        hours_trained=round(_hours_trained(config, Path(train)), 3),
        wall_seconds=round(wall, 1),
        cpu_seconds=round(user + system, 1),
        killed_attempts=len(attempts) - 2 * len(ended),
        versions=made["versions"],
        processor=_processor(),
        routing={task: routing.record() for task, routing in routing_of(decodings).items()},
        curve=_curve(exp / "curve.jsonl"),
        wordings=[line for decoding in decodings if not decoding.audio_off for line in _wordings(decoding)],
        utterances=[line for decoding in decodings for line in _utterances(decoding)],
    )
    target, record = Path(folder) / run.file_name, asdict(run)
    utterances = ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in record.pop("utterances"))
    # One line for each key and each utterance, so that a difference between two commits can be read.
    lines = [f' "{key}": {json.dumps(value, ensure_ascii=False)},' for key, value in record.items()]
    write_text(target, "\n".join(["{", *lines, f' "utterances": [\n  {utterances}\n ]', "}\n"]))
    return target


def read_run(path: Path) -> Run:
    """Read a file of evidence. Raises DataError: another schema, other keys or types, or another file's name."""
    hint = "restore the committed file, or remove it and run ./run_evidence.sh again"
    try:
        content = read_json(path)
        if content.get("schema") != SCHEMA:
            raise DataError(path, f"schema {content.get('schema')!r}; this version reads {SCHEMA}", hint=hint)
        run, types = Run(**content), get_type_hints(Run)
        for name in (field.name for field in fields(Run)):
            if not isinstance(value := getattr(run, name), get_origin(types[name]) or types[name]):
                raise TypeError(f"{name} is {value!r}")
        for one in run.utterances:
            if not one.keys() >= _TEXTS:
                raise ValueError(f"an utterance with the keys {', '.join(one)} alone")
        for column in run.columns():
            run.statistics(column)
        if not run.versions.keys() >= {"torch"} or not run.processor.keys() >= {"capability", "bfloat16"}:
            raise ValueError("versions or processor lack a key")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(path, f"is no evidence: {error}", hint=hint) from error
    if run.file_name != path.name:
        raise DataError(path, f"holds what belongs into {run.file_name}", hint="rename it")
    return run


def _hours_trained(config: dict[str, Any], train: Path) -> float:
    passport, tasks = Passport.load(train), DataDir.load(train).utt2task
    seconds = {utt: passport.utterances[utt]["num_samples"] / passport.sample_rate for utt in tasks}
    options, seed = BatchingOptions(**(config.get("batching_conf") or {})), config["seed"]
    epochs = range(1, config["max_epoch"] + 1)
    plans = (epoch_batches(seconds, tasks, options, seed, n, config["num_iters_per_epoch"]) for n in epochs)
    return sum(seconds[utt] for plan in plans for batch in plan for utt in batch) / 3600


def _curve(path: Path) -> list[dict[str, Any]]:
    """Of a model that was changed after its training, which has no ``curve.jsonl``: no lines."""
    if not path.is_file():
        return []
    kept = [f"acc_{task}" for task in TASKS]
    return [{k: line[k] for k in ("step", "split", *kept) if line.get(k) is not None} for line in read_curve(path)]


def _processor() -> dict[str, Any]:
    import torch

    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return {"capability": torch.backends.cpu.get_cpu_capability(), "bfloat16": native}


def _utterances(decoding: Decoding) -> list[dict[str, Any]]:
    data = DataDir.load(decoding.scores["data_dir"])
    hypotheses = read_table(decoding.path / "text", allow_empty=True)
    lines = []
    for entry in map(json.loads, read_text(decoding.path / UTT_SCORES).splitlines()):
        utt, task, audio = entry["utt"], entry["task"], decoding.stats.get("audio", "on")
        line = {"utt": utt, "set": decoding.set, "task": task, "audio": audio, "hypothesis": hypotheses[utt]}
        if not decoding.audio_off:
            line["references"] = (data.references or {}).get(utt, [data.text[utt]])
        numbers = {metric: entry[metric] for metric in MAIN_METRICS[task_spec(task).metric] if metric in entry}
        lines.append(line | numbers)
    return lines


def _wordings(decoding: Decoding) -> list[dict[str, Any]]:
    """For each wording of the prompt: set, task, number (1: the wording of scoring), prompt, metric, value, and share,
    how often the router chose the expert of wording 1."""
    lines: list[dict[str, Any]] = []
    for spread in read_spread(decoding.path):
        task, expert = spread["task"], None
        for one in sorted(spread["wordings"], key=lambda wording: wording["number"]):
            folder = decoding.path if one["number"] == 1 else decoding.path / WORDINGS / str(one["number"])
            routing = read_routing([folder / "nbest.jsonl"])[task]
            expert = routing.expert if expert is None else expert
            line = {"set": decoding.set, "task": task, "number": one["number"], "prompt": one["example"]}
            share = float(routing.expert_share[expert])
            lines.append({**line, "metric": spread["metric"], "value": one["value"], "share": share})
    return lines
