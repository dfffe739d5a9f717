"""Score one decoded test set against its data directory, each task by its own metric.

    exp/<tag>/decode_<name>/<set>/text        hypotheses (a value may be empty)            read
    exp/<tag>/decode_<name>/<set>/stats.json  time, tokens, memory of the decoding          read
    dump/raw/<set>/                           text, utt2task, references, ...               read
    .../<set>/scores.json                     figures with intervals, counts, versions      written
    .../<set>/utt_scores.jsonl                what figures are made of, per utterance       written

Nothing is dropped in silence: an utterance without a hypothesis, or a hypothesis for an unknown utterance, is an
error. The second output file is what a paired comparison of two experiments needs (``metrics/compare.py``).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pam_espnet
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import PASSPORT_NAME, Passport
from pam_espnet.data.tables import read_table
from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, write_json, write_text
from pam_espnet.score.captions import score_captions
from pam_espnet.score.choices import parse_choice, score_choices
from pam_espnet.score.counting import parse_count, score_counts
from pam_espnet.score.intervals import LEVEL, RESAMPLES, SEED, bootstrap
from pam_espnet.score.result import MAIN_METRICS, METRICS, TaskResult
from pam_espnet.score.wer import normaliser_record, score_wer

SCORES = "scores.json"
UTT_SCORES = "utt_scores.jsonl"
DECODE_PREFIX = "decode_"
WORDINGS = "prompts"  # folder of a decode directory: the set in other wordings, by their number

# What a speed depends on, kept beside it.
SPEED_CONDITIONS = ("batch_size", "shards", "device", "threads", "dtype")

_LISTED = 20  # keys named in an error message


def _score_wer(data: DataDir, keys: list[str], hypotheses: dict[str, str]) -> TaskResult:
    return score_wer({key: data.text[key] for key in keys}, hypotheses)


def _score_counts(data: DataDir, keys: list[str], hypotheses: dict[str, str]) -> TaskResult:
    _check_references(data, keys, parse_count, "is not a number", "write digits, or zero to ten in words")
    return score_counts({key: data.text[key] for key in keys}, hypotheses)


def _score_captions(data: DataDir, keys: list[str], hypotheses: dict[str, str]) -> TaskResult:
    references = data.references or {}
    alone = [key for key in keys if key not in references]
    if alone:
        logging.warning(
            "%s: %d of %d captions have one reference only (their text); published scores use five",
            data.path, len(alone), len(keys),
        )  # fmt: skip
    return score_captions({key: references.get(key, [data.text[key]]) for key in keys}, hypotheses)


def _score_choices(data: DataDir, keys: list[str], hypotheses: dict[str, str]) -> TaskResult:
    _check_references(data, keys, parse_choice, "is neither yes nor no", "write yes or no")
    return score_choices({key: data.text[key] for key in keys}, hypotheses)


def _check_references(data: DataDir, keys: list[str], parse: Callable[[str], object], wrong: str, hint: str) -> None:
    """DataError, with the line, at the first reference that ``parse`` makes nothing of."""
    for key in keys:
        if parse(data.text[key]) is None:
            line = data.utterances.index(key) + 1  # the table is sorted
            message = f"the reference of {key!r} {wrong}: {data.text[key]!r}"
            raise DataError(data.path / "text", message, line=line, hint=hint)


# By the `metric` of a task.
SCORERS: dict[str, Callable[[DataDir, list[str], dict[str, str]], TaskResult]] = {
    "wer": _score_wer,
    "count": _score_counts,
    "caption": _score_captions,
    "choice": _score_choices,
}


def score_directory(
    decode_dir: str | Path,
    data_dir: str | Path,
    *,
    ids: str | Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Any]:
    """Score the hypotheses of ``decode_dir`` against ``data_dir``; write and return the scores.

    Args:
        decode_dir: ``exp/<tag>/decode_<name>/<set>``.
        data_dir: the data directory that was decoded; one or several tasks.
        ids: a file of utterance keys, the first word of each line; only those of the set that it names are scored, and
            the scores go to a decoding of their own, ``exp/<tag>/decode_<name>.<stem of ids>/<set>``.
        resamples: bootstrap resamples behind each 95 % interval.
        seed: of the bootstrap.

    Returns:
        ``{"tasks": {task: {metric: {value, low, high, n, ...}}}, "details": {task: ...}, "coverage": ..., ...}``.

    Raises:
        DataError: a table is wrong, the keys of the two directories differ, a reference cannot be scored, or ``ids``
            names no utterance of the set.
    """
    decode_dir, data_dir = Path(decode_dir), Path(data_dir)
    data = DataDir.load(data_dir)
    hypotheses = read_table(decode_dir / "text", allow_empty=True)
    _check_keys(decode_dir / "text", data, hypotheses)
    target, wanted = decode_dir, None
    if ids is not None:
        wanted = _read_ids(Path(ids))
        common = wanted & data.text.keys()
        if not common:
            hint = f"one key on a line, as in the first column of {data_dir / 'text'}"
            raise DataError(ids, f"names no utterance of {data_dir}", hint=hint)
        target = subset_folder(decode_dir, Path(ids))
        data = data.subset(common)

    by_task: dict[str, list[str]] = {}
    for key in data.utterances:
        by_task.setdefault(data.utt2task[key], []).append(key)

    tasks: dict[str, Any] = {}
    details: dict[str, Any] = {}
    lines: list[str] = []
    for task, keys in sorted(by_task.items()):
        result = SCORERS[task_spec(task).metric](data, keys, hypotheses)
        tasks[task] = {}
        details[task] = result.details
        for name, statistics in result.metrics.items():
            interval = bootstrap(statistics, resamples=resamples, seed=seed)
            tasks[task][name] = {**interval._asdict(), "n": len(keys), **result.fields.get(name, {})}
        lines += _utterance_lines(task, result)

    scores = {
        "data_dir": str(data_dir),
        "utterances": len(data.utterances),
        "coverage": _coverage(data_dir, len(data.utterances)),
        "ids": None if ids is None or wanted is None else {"file": str(ids), "listed": len(wanted)},
        "tasks": tasks,
        "details": details,
        "speed": _speed(decode_dir / "stats.json"),
        "bootstrap": {"method": "percentile over utterances", "level": LEVEL, "resamples": resamples, "seed": seed},
        "normaliser": normaliser_record(),
        "versions": {
            "pam_espnet": pam_espnet.__version__,
            **{package: version(package) for package in ("jiwer", "whisper-normalizer", "numpy")},
        },
    }
    if target != decode_dir:
        target.mkdir(parents=True, exist_ok=True)
        for name in ("stats.json", "key.json"):  # how it was decoded
            if (decode_dir / name).is_file():
                shutil.copy2(decode_dir / name, target / name)
    write_text(target / UTT_SCORES, "".join(f"{line}\n" for line in lines))
    write_json(target / SCORES, scores)  # last: whoever sees it finds the other file too
    return scores


def decoded_sets(
    exp: Path, data_dirs: Sequence[Path], decode_names: Sequence[str], prompts: Path | None = None
) -> list[tuple[Path, Path]]:
    """(decode directory, data directory) of every set in every decoding of an experiment.

    Args:
        exp: experiment directory.
        data_dirs: formatted sets; a set has the name of its folder.
        decode_names: of ``<exp>/decode_<name>``.
        prompts: folder of ``<set>/<number>``, the sets in other wordings; those that were decoded, to
            ``<exp>/decode_<name>/<set>/prompts/<number>``, are in the list too.

    Raises:
        DataError: a set was not decoded, or two have one name.
    """
    if twice := [name for name, count in Counter(path.name for path in data_dirs).items() if count > 1]:
        raise DataError(exp, f"two sets have the name {twice[0]!r}", hint="name each set once, by its own name")
    pairs = []
    for name in decode_names:
        for data_dir in data_dirs:
            decode_dir = exp / f"{DECODE_PREFIX}{name}" / data_dir.name
            if not (decode_dir / "text").is_file():
                raise DataError(decode_dir, "no such decoding", hint="decode this set first: ./run.sh --stage 4")
            pairs.append((decode_dir, data_dir))
            reworded = sorted(decode_dir.glob(f"{WORDINGS}/*/stats.json")) if prompts else []
            pairs += [(path.parent, prompts / data_dir.name / path.parent.name) for path in reworded if prompts]
    return pairs


def subset_folder(decode_dir: Path, ids: Path | None) -> Path:
    """Where the scores go of the utterances named by the file ``ids``; of all of them: ``decode_dir``."""
    if ids is None:
        return decode_dir
    return decode_dir.parent.with_name(f"{decode_dir.parent.name}.{ids.stem}") / decode_dir.name


def _read_ids(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be read: {error}", hint="write utterance keys, one on a line") from error
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


def _coverage(data_dir: Path, scored: int) -> dict[str, Any] | None:
    """How much of the set was scored, by its passport: it also lists what was missing or could not be used."""
    if not (data_dir / PASSPORT_NAME).is_file():
        return None
    passport = Passport.load(data_dir)
    classes = Counter(reason.split(":")[0] for reason in passport.skipped.values())
    return {"scored": scored, "of": len(passport.utterances) + len(passport.skipped), "skipped": dict(classes)}


def _check_keys(path: Path, data: DataDir, hypotheses: dict[str, str]) -> None:
    """Both directories must hold the same utterances."""
    known = set(data.utterances)
    for wrong, what, hint in (
        (known - hypotheses.keys(), f"no hypothesis for {{}} of {data.path}", "decode this set again (stage 4)"),
        (
            hypotheses.keys() - known,
            f"hypotheses for {{}} that {data.path} does not have",
            "score it against the data directory that was decoded (--data_dir)",
        ),
    ):
        if wrong:
            names = ", ".join(sorted(wrong)[:_LISTED]) + (", ..." if len(wrong) > _LISTED else "")
            plural = "utterance" if len(wrong) == 1 else "utterances"
            raise DataError(path, f"{what.format(f'{len(wrong)} {plural}')}: {names}", hint=hint)


def _utterance_lines(task: str, result: TaskResult) -> list[str]:
    """One JSON object per utterance: ``{"utt", "task", <metric>: [numerator, denominator]}`` (BLEU, METEOR: more)."""
    tables = {name: statistics.table.tolist() for name, statistics in result.metrics.items()}
    return [
        json.dumps({"utt": key, "task": task, **{name: table[row] for name, table in tables.items()}})
        for row, key in enumerate(result.utterances)
    ]


def _speed(path: Path) -> dict[str, Any] | None:
    """Real-time factor, tokens per second and peak memory of one process; None where there is no ``stats.json``.

    Times are summed over the shards of a decoding, so both rates are those of one of its processes.
    """
    if not path.is_file():
        logging.warning("%s: no such file, so no speed is reported", path)
        return None
    stats = read_json(path)
    audio, wall = stats["seconds_audio"], stats["seconds_wall"]
    return {
        "rtf": wall / audio if audio else None,
        "tokens_per_second": stats["tokens"] / wall if wall else None,
        **{
            key: stats.get(key)
            for key in ("peak_memory_bytes", "seconds_audio", "seconds_wall", "tokens", *SPEED_CONDITIONS)
        },
    }


def format_scores(scores: dict[str, Any]) -> str:
    """What ``score_directory`` found, as lines for a terminal; metrics that could not be computed with the reason."""
    lines = []
    if coverage := scores.get("coverage"):
        skipped = ", ".join(f"{count} {reason}" for reason, count in coverage["skipped"].items())
        lines.append(
            f"scored {coverage['scored']} of the {coverage['of']} utterances of this set"
            + (f" (skipped: {skipped})" if skipped else "")
        )
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
