"""Scores of decoded test sets against their data directories, each task by its own metric.

Files of one set, in ``exp/<tag>/decode_<name>/<set>/`` unless they have another folder:

    text              hypotheses (a value may be empty)             read
    stats.json        time, tokens, memory of the decoding          read
    dump/raw/<set>/   text, utt2task, references, ...               read
    scores.json       figures with intervals, counts, versions      written
    utt_scores.jsonl  their numbers per utterance, for comparisons  written
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pam_espnet
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import PASSPORT_NAME, Passport
from pam_espnet.data.tables import read_keys, read_table
from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, write_json, write_text
from pam_espnet.score.answers import UnusableReferenceError, score_choices, score_counts
from pam_espnet.score.captions import score_captions
from pam_espnet.score.intervals import LEVEL, RESAMPLES, SEED, bootstrap
from pam_espnet.score.result import MAIN_METRICS, METRICS, TaskResult
from pam_espnet.score.wer import normaliser_record, score_wer

SCORES = "scores.json"
UTT_SCORES = "utt_scores.jsonl"
DECODE_PREFIX = "decode_"
WORDINGS = "prompts"  # folder of a decode directory: the set in other wordings, by their number
SPEED_CONDITIONS = ("batch_size", "shards", "device", "threads", "dtype")  # kept beside a speed
_SPEED = ("peak_memory_bytes", "seconds_audio", "seconds_wall", "tokens")

_PACKAGES = ("jiwer", "whisper-normalizer", "numpy", "scipy")
_LISTED = 20  # keys in a message


def _score_task(metric: str, data: DataDir, keys: list[str], hypotheses: dict[str, str]) -> TaskResult:
    """Score the utterances ``keys``, all of a task whose metric is ``metric``."""
    text = {key: data.text[key] for key in keys}
    if metric == "caption":
        references = data.references or {}
        if alone := len(keys) - len(references.keys() & text.keys()):
            logging.warning(
                "%s: %d of %d captions have one reference only (their text); published scores use five",
                data.path, alone, len(keys),
            )  # fmt: skip
        return score_captions({key: references.get(key, [text[key]]) for key in keys}, hypotheses)
    try:
        return {"wer": score_wer, "count": score_counts, "choice": score_choices}[metric](text, hypotheses)
    except UnusableReferenceError as error:
        line = data.utterances.index(error.key) + 1  # the table is sorted
        raise DataError(data.path / "text", str(error), line=line, hint=error.hint) from error


def score_directory(
    decode_dir: Path, data_dir: str | Path, *, ids: Path | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """Score the hypotheses of ``decode_dir`` against ``data_dir``, which was decoded; write and return the scores.

    Args:
        ids: a file of utterance keys, the first word of each line; only those of the set that it names are scored, and
            the scores go to a separate decoding, ``exp/<tag>/decode_<name>.<stem of ids>/<set>``.
        resamples, seed: of the bootstrap behind each 95 % interval.

    Returns:
        ``{"tasks": {task: {metric: {value, low, high, n, ...}}}, "details": {task: ...}, "coverage": ..., ...}``.

    Raises DataError: a table is wrong, the keys of the two directories differ, a reference cannot be scored, or
    ``ids`` names no utterance of the set.
    """
    data_dir = Path(data_dir)
    data = DataDir.load(data_dir)
    hypotheses = read_table(decode_dir / "text", allow_empty=True)
    _check_keys(decode_dir / "text", data, hypotheses)
    target = subset_folder(decode_dir, ids)
    chosen = None
    if ids is not None:
        data, chosen = _restrict(data, ids)

    tasks: dict[str, Any] = {}
    details: dict[str, Any] = {}
    lines: list[str] = []
    for task in sorted(data.per_task()):
        keys = [key for key in data.utterances if data.utt2task[key] == task]
        result = _score_task(task_spec(task).metric, data, keys, hypotheses)
        details[task] = result.details
        tasks[task] = {}
        for name, statistics in result.metrics.items():
            interval = bootstrap(statistics, resamples=resamples, seed=seed)._asdict()
            tasks[task][name] = {**interval, "n": len(keys), **result.fields.get(name, {})}
        lines += _utterance_lines(task, result)

    scores = {
        "data_dir": str(data_dir),
        "utterances": len(data),
        "coverage": _coverage(data_dir, len(data)),
        "ids": chosen,
        "tasks": tasks,
        "details": details,
        "speed": _speed(decode_dir / "stats.json"),
        "bootstrap": {"method": "percentile over utterances", "level": LEVEL, "resamples": resamples, "seed": seed},
        "normaliser": normaliser_record(),
        "versions": {"pam_espnet": pam_espnet.__version__, **{name: version(name) for name in _PACKAGES}},
    }
    if target != decode_dir:
        target.mkdir(parents=True, exist_ok=True)
        for name in ("stats.json", "key.json"):  # how it was decoded
            if (decode_dir / name).is_file():
                shutil.copy2(decode_dir / name, target / name)
    write_text(target / UTT_SCORES, "".join(f"{line}\n" for line in lines))
    write_json(target / SCORES, scores)  # last: where it is, the other file is too
    return scores


def decoded_sets(
    exp: Path, data_dirs: Sequence[Path], decode_names: Sequence[str], prompts: Path | None = None
) -> list[tuple[Path, Path]]:
    """(decode directory, data directory) of every set in every decoding ``<exp>/decode_<name>/<set>``.

    A set has the name of its folder. The first decoding has every set; of others, such as controls, those count that
    were decoded. Decoded sets in other wordings are included, ``<prompts>/<set>/<number>``.
    Raises DataError: a set was not decoded, or two have one name.
    """
    if twice := [name for name, count in Counter(path.name for path in data_dirs).items() if count > 1]:
        raise DataError(exp, f"two sets have the name {twice[0]!r}", hint="list each set once; its folder is its name")
    pairs = []
    for number, name in enumerate(decode_names):
        folders = [exp / f"{DECODE_PREFIX}{name}" / data_dir.name for data_dir in data_dirs]
        decoded = [(folder / "text").is_file() for folder in folders]
        for data_dir, decode_dir, found in zip(data_dirs, folders, decoded, strict=True):
            if not found and number > 0 and any(decoded):
                continue
            if not found:
                raise DataError(decode_dir, "no such decoding", hint="decode this set first: ./run.sh --stage 4")
            pairs.append((decode_dir, data_dir))
            if prompts is not None:
                reworded = [path.parent for path in sorted(decode_dir.glob(f"{WORDINGS}/*/stats.json"))]
                pairs += [(path, prompts / data_dir.name / path.name) for path in reworded]
    return pairs


def subset_folder(decode_dir: Path, ids: Path | None) -> Path:
    """Folder of the scores of the utterances in the list ``ids``; of all of them: ``decode_dir``."""
    if ids is None:
        return decode_dir
    return decode_dir.parent.with_name(f"{decode_dir.parent.name}.{ids.stem}") / decode_dir.name


def _restrict(data: DataDir, ids: Path) -> tuple[DataDir, dict[str, Any]]:
    """The utterances in the list ``ids``, and a record of the list."""
    listed = set(read_keys(ids, data.text))
    if not listed & data.text.keys():
        hint = f"one key on a line, as in the first column of {data.path / 'text'}"
        raise DataError(ids, f"names no utterance of {data.path}", hint=hint)
    if unknown := sorted(listed - data.text.keys()):
        logging.warning("%s: %s not in %s", ids, _listing(unknown), data.path)
    return data.subset(listed & data.text.keys()), {"file": str(ids), "listed": len(listed)}


def _coverage(data_dir: Path, scored: int) -> dict[str, Any] | None:
    """How much of the set was scored, by its passport: it also lists what was missing or could not be used."""
    if not (data_dir / PASSPORT_NAME).is_file():
        return None
    passport = Passport.load(data_dir)
    classes = Counter(reason.split(":")[0] for reason in passport.skipped.values())
    return {"scored": scored, "of": len(passport.utterances) + len(passport.skipped), "skipped": dict(classes)}


def _check_keys(path: Path, data: DataDir, hypotheses: dict[str, str]) -> None:
    """Both directories must hold the same utterances."""
    if lacking := sorted(data.text.keys() - hypotheses.keys()):
        message = f"no hypothesis for {_listing(lacking)} of {data.path}"
        raise DataError(path, message, hint="decode this set again (stage 4)")
    if unknown := sorted(hypotheses.keys() - data.text.keys()):
        message = f"hypotheses for {_listing(unknown)} that {data.path} does not have"
        raise DataError(path, message, hint="score it against the data directory that was decoded (--data)")


def _listing(keys: Sequence[str]) -> str:
    names = ", ".join(keys[:_LISTED]) + (", ..." if len(keys) > _LISTED else "")
    return f"{len(keys)} utterance{'s' if len(keys) > 1 else ''} ({names})"


def _utterance_lines(task: str, result: TaskResult) -> list[str]:
    """One JSON object per utterance: ``{"utt", "task", <metric>: [numerator, denominator]}`` (BLEU, METEOR: more)."""
    tables = {name: statistics.table.tolist() for name, statistics in result.metrics.items()}
    return [
        json.dumps({"utt": key, "task": task, **{name: table[row] for name, table in tables.items()}})
        for row, key in enumerate(result.utterances)
    ]


def _speed(path: Path) -> dict[str, Any] | None:
    """Real-time factor, tokens per second and peak memory of one process; None where there is no ``stats.json``."""
    if not path.is_file():
        logging.warning("%s: no such file, so no speed is reported", path)
        return None
    stats = read_json(path)
    audio, wall = stats["seconds_audio"], stats["seconds_wall"]  # summed over shards
    return {
        "rtf": wall / audio if audio else None,
        "tokens_per_second": stats["tokens"] / wall if wall else None,
        **{key: stats.get(key) for key in (*_SPEED, *SPEED_CONDITIONS)},
    }


def format_scores(scores: dict[str, Any]) -> str:
    """What ``score_directory`` found, as lines for a terminal; metrics that could not be computed with the reason."""
    lines = []
    if coverage := scores.get("coverage"):
        skipped = ", ".join(f"{count} {reason}" for reason, count in coverage["skipped"].items())
        shown = f"scored {coverage['scored']} of the {coverage['of']} utterances of this set"
        lines.append(f"{shown} (skipped: {skipped})" if skipped else shown)
    if ids := scores.get("ids"):
        lines.append(f"only those in {ids['file']}, which lists {ids['listed']}")
    for task, metrics in scores["tasks"].items():
        main = [name for name in MAIN_METRICS[task_spec(task).metric] if name in metrics]
        for name in (*main, *(name for name in metrics if name not in main)):
            entry = metrics[name]
            lines.append(f"{task:10} {METRICS[name].title:18} {METRICS[name].show_entry(entry)}  (n = {entry['n']})")
        for name, reason in scores["details"].get(task, {}).get("not_computed", {}).items():
            lines.append(f"{task:10} {METRICS[name].label:18} not computed: {reason}")
    if scores["speed"] and scores["speed"]["rtf"] is not None:
        lines.append(f"real-time factor {scores['speed']['rtf']:.3g}")
    return "\n".join(lines)
