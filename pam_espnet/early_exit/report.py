"""The early-exit report of an experiment: what its blocks predict, what gates would do, how it decodes at exit points.

<decode>/<set>/{nbest.jsonl, key.json}        the model's own answers                              read
<out>/profile/<set>.json                      figures of a test set; not made twice                written
<out>/cost.json                               measured costs of a step (``early_exit.cost_report``)      read
<out>/decode_<point>/<set>/                   decode directories of the sweep (``early_exit.sweep``)     read
<out>/{exit_report.json, EXIT.md, exit.png}   everything; tables; a picture                        written
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.tasks import task_spec
from pam_espnet.decode.shards import decoded_of
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.early_exit.fitting import CostModel, candidate_blocks
from pam_espnet.early_exit.profile import profile, summarise
from pam_espnet.early_exit.states import reference_answers
from pam_espnet.early_exit.sweep import NEVER, read_timing
from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.exits import MODES
from pam_espnet.errors import DataError
from pam_espnet.fileio import check_key, read_json, sha256_file, write_json
from pam_espnet.score.compare import Column, Row, difference
from pam_espnet.score.report import Decoding, find_decodings
from pam_espnet.score.result import MAIN_METRICS

FIGURES = 4  # raised when the figures of a test set change, which are then made again


def read_decoded(exp: str | Path, data_dir: str | Path, decode: str | Path) -> tuple[dict[str, list[int]], Any]:
    """From ``<decode>/<set>``: the tokens of each utterance's best answer, and the options they were decoded with.
    Raises DataError: nothing was decoded there, or with another checkpoint, from other data, in part, without the
    audio or with early exit; says what to type.
    """
    directory, data = Path(decode) / Path(data_dir).name, DataDir.load(data_dir)
    command = f"python -m pam_espnet.bin.pam_decode --exp {exp} --data {data_dir} --out {directory}"
    if not (directory / "nbest.jsonl").is_file() or not (directory / "key.json").is_file():
        hint = f"{command}\n     or name another directory (--decode), or take the references (--answers reference)"
        raise DataError(directory, "no decoded answers to this test set", hint=hint)
    key = read_json(directory / "key.json")
    fits = {**key, **decoded_of(exp, data_dir), "audio": "on", "limit": 0}
    check_key(directory / "key.json", fits, f"remove it (rm -r {directory}) and decode again:\n     {command}")
    if (key["search"].get("exit") or {}).get("mode", "never") != "never":
        hint = f"decode with exit: {{mode: never}} under another name, and give it as --decode:\n     {command}_never"
        raise DataError(directory, "decoded with early exit: these are not the full model's answers", hint=hint)
    lines = (directory / "nbest.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = {entry["utt"]: entry["hypotheses"][0]["tokens"] for entry in map(json.loads, lines)}
    if tokens.keys() != set(data.utterances):
        raise DataError(directory / "nbest.jsonl", f"not the utterances of {data_dir}", hint=command)
    return tokens, key["search"]


def profile_sets(
    exp: str | Path,
    load: Callable[[], SpeechLLM],
    data_dirs: Sequence[str | Path],
    answers: Mapping[str, Mapping[str, Sequence[int]]] | None,
    layers: Sequence[int],
    calibration: str | Path | None,
    search: Mapping[str, Any],
    out: str | Path,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Figures of every test set (``profile.summarise``), read from ``<out>/profile`` where they were made before.

    Args:
        load: gives the model; not called when nothing is to be run.
        answers: set -> utterance -> tokens; None for the reference answers.
        layers: candidate blocks where there is no calibration, see ``fitting.candidate_blocks``.
        search: options of decoding, noted.

    Returns:
        ``{"blocks", "layers", "cost_model", "calibration", "sets": {set: {task: figures}}}``.
    """
    found: dict[str, Any] = {}
    calibration_sha256 = None if calibration is None else sha256_file(calibration)
    for data_dir in data_dirs:
        name = Path(data_dir).name
        given = None if answers is None else json.dumps(answers[name], sort_keys=True)
        key = {
            **decoded_of(exp, data_dir),
            "answers": "reference" if given is None else hashlib.sha256(given.encode()).hexdigest(),
            "calibration_sha256": calibration_sha256,
            "layers": list(layers),
            "search": dict(search),
            "figures": FIGURES,
        }
        path = Path(out) / "profile" / f"{name}.json"
        record = read_json(path) if path.is_file() else {}
        if record.get("key") != key:
            own = None if answers is None else answers[name]
            figures = _profile(load(), data_dir, own, layers, calibration, calibration_sha256, batch_size)
            record = {"key": key, **figures}
            write_json(path, record)
        tasks = record.pop("tasks")
        found = {**found, **record, "sets": {**found.get("sets", {}), name: tasks}}
    found.pop("key")
    return found


def _profile(
    speech: SpeechLLM,
    data_dir: str | Path,
    answers: Mapping[str, Sequence[int]] | None,
    layers: Sequence[int],
    calibration: str | Path | None,
    calibration_sha256: str | None,
    batch_size: int,
) -> dict[str, Any]:
    data, llm, fitted = DataDir.load(data_dir), speech.model.decoder, None
    if calibration is None:
        layers = candidate_blocks(layers, llm.num_layers)
    else:
        fitted = Calibration.load(calibration, llm.width).to(llm.device, llm.dtype)
        layers = fitted.layers
    answers = reference_answers(speech, data) if answers is None else answers
    logging.info(f"{data.path.name}: {sum(map(len, answers.values()))} tokens through {llm.num_layers} blocks")
    cost = CostModel.of(llm)
    threshold = None if fitted is None else fitted.threshold
    shown = fitted and {"maps": fitted.maps is not None, "threshold": threshold, "sha256": calibration_sha256}
    return {
        "blocks": llm.num_layers,
        "layers": list(layers),
        "cost_model": asdict(cost),
        "calibration": shown,
        "tasks": summarise(profile(speech, data, answers, layers, fitted, batch_size), cost, threshold),
    }


def read_sweep(exp: str | Path, data_dirs: Sequence[str | Path], out: str | Path) -> list[dict[str, Any]]:
    """One entry per decoded point, test set and task: score, difference to ``never``, depth, seconds.
    Raises DataError: a point was decoded with another checkpoint or from other data."""
    out, entries = Path(out), []
    if not any(out.glob("decode_*/*/scores.json")):
        return []
    decodings = find_decodings(out)
    for data_dir in data_dirs:
        points = [one for one in decodings if one.set == Path(data_dir).name]
        full = next((one for one in points if one.name == NEVER.name), None)
        for decoding in sorted(points, key=_order):
            key = decoding.path / "key.json"
            check_key(key, {**read_json(key), **decoded_of(exp, data_dir)}, f"remove it: rm -r {decoding.path}")
            for task in decoding.scores["tasks"]:
                entries.append(_entry(decoding, full, task))
    return entries


def _order(decoding: Decoding) -> tuple[int, float]:
    mode, _, value = decoding.name.partition("_")
    return MODES.index(mode), float(value or 0)


def _entry(decoding: Decoding, full: Decoding | None, task: str) -> dict[str, Any]:
    own = _best(decoding.path, task)
    steps = [depth for _, depths in own.values() for depth in depths[1:]]
    entry: dict[str, Any] = {
        "set": decoding.set,
        "task": task,
        "point": decoding.name.replace("_", ":", 1),
        "scores": decoding.scores["tasks"][task],
        "steps": len(steps),
        "mean_depth": sum(steps) / len(steps) if steps else None,
        "batch_size": decoding.stats["batch_size"],
        "threads": decoding.stats["threads"],
        "commit": decoding.stats["commit"],
    }
    if full is not None:
        names = MAIN_METRICS[task_spec(task).metric]
        rows = Row(NEVER.name, [full]), Row(entry["point"], [decoding])
        pairs = {name: difference(*rows, Column(decoding.set, task, name)) for name in names}
        entry["difference"] = {name: pair._asdict() for name, pair in pairs.items() if pair is not None}
        texts = _best(full.path, task)
        entry["same_answers"] = sum(own[utt][0] == texts[utt][0] for utt in own) / len(own)
        entry["timing"] = read_timing(decoding.path, full.path)  # of the whole set, whatever its tasks
    return entry


def _best(directory: Path, task: str) -> dict[str, tuple[list[int], list[int]]]:
    """Utterance -> tokens and depths of the best answer."""
    lines = (directory / "nbest.jsonl").read_text(encoding="utf-8").splitlines()
    best = {one["utt"]: one["hypotheses"][0] for one in map(json.loads, lines) if one["task"] == task}
    return {utt: (one["tokens"], one["depths"]) for utt, one in best.items()}
