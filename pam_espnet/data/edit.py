"""Changing data directories: repair, split, combine, choose a subset. Everything returns what it did or made.

Formatted directories (``dump/raw/<set>``) keep their passport and ``utt2num_samples`` through all of it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from pam_espnet.data.datadir import (
    OPTIONAL_TABLES,
    UTTERANCE_TABLES,
    DataDir,
    audio_problem,
    key_problem,
    parse_references,
    parse_segment,
    scan_tables,
)
from pam_espnet.data.format import MISSING
from pam_espnet.data.leakage import MIX_SOURCES, MIX_SPEAKERS
from pam_espnet.data.passport import PASSPORT_NAME, Passport
from pam_espnet.data.tables import Problem, raise_problems, read_table, write_table
from pam_espnet.data.tasks import TASKS, task_spec
from pam_espnet.errors import DataError
from pam_espnet.fileio import write_text

NUM_SAMPLES = "utt2num_samples"


def save_dir(data: DataDir, target: str | Path) -> None:
    """Save ``data`` to ``target``, with the passport and sample counts of the directory it was read from, if any."""
    target = Path(target)
    data.save(target)
    for name in (PASSPORT_NAME, NUM_SAMPLES):
        if not (data.path / name).is_file() and target.resolve() != data.path.resolve():
            (target / name).unlink(missing_ok=True)
    if (data.path / PASSPORT_NAME).is_file():
        Passport.load(data.path).restrict(data.utt2task).save(target)
    if (data.path / NUM_SAMPLES).is_file():
        counts = read_table(data.path / NUM_SAMPLES)
        write_table(target / NUM_SAMPLES, {utt: counts[utt] for utt in data.utterances if utt in counts})


def fix(path: str | Path, *, task: str | None = None) -> tuple[list[str], Path | None]:
    """Repair a data directory in place.

    Sorts, removes repeated and unusable lines, drops utterances that are not in every table or whose audio file is
    missing. A missing ``utt2spk`` is written with every utterance as its own speaker.

    Args:
        path: the directory.
        task: write a missing ``utt2task`` with this task, and a missing ``prompt`` with its default prompt.

    Returns:
        (what was repaired or dropped and why, one line each; the backup of the old tables, None if nothing changed).

    Raises:
        DataError: what no program can decide: a key with two different values, a missing ``wav.scp`` or ``text``,
            nothing left.
    """
    path = Path(path)
    scans = scan_tables(path)
    raise_problems(path, [conflict for scan in scans.values() for conflict in scan.conflicts])
    tables = {name: scan.values for name, scan in scans.items()}
    report = _fill_missing(tables, task)
    for name, scan in scans.items():
        if not tables[name]:
            raise_problems(path, scan.problems)
        report += _describe(name, scan.problems)
    segments = None
    if "segments" in tables:
        parsed = {utt: parse_segment(value) for utt, value in tables["segments"].items()}
        segments = {utt: segment for utt, (segment, _) in parsed.items() if segment is not None}
    data = DataDir(
        path,
        wav=tables["wav.scp"],
        **{name: tables[name] for name in UTTERANCE_TABLES},
        segments=segments,
        references=_fix_references(tables, report),
    )
    keep = []
    for utt in sorted(set().union(*(tables[name] for name in tables if name not in ("wav.scp", "references")))):
        if reason := _drop_reason(utt, data, tables):
            report.append(f"dropped {utt}: {reason}")
        else:
            keep.append(utt)
    kept = data.subset(keep)
    unused = data.wav.keys() - kept.wav.keys() if segments is not None else set()
    report += [f"dropped recording {key}: no utterance uses it" for key in sorted(unused)]
    if not report:
        return [], None
    backup = _back_up(path, report)
    save_dir(kept, path)
    return report, backup


def _fill_missing(tables: dict[str, dict[str, str]], task: str | None) -> list[str]:
    """Fill tables that are missing or empty, as far as a convention says with what; what was done, as lines."""
    report = []
    utterances = tables["text"]
    if utterances and not tables["utt2spk"]:
        tables["utt2spk"] = {utt: utt for utt in utterances}
        report.append("wrote utt2spk: every utterance is its own speaker")
    if utterances and task is not None:
        spec = task_spec(task)
        for name, value in (("utt2task", spec.name), ("prompt", spec.default_prompt)):
            if not tables[name]:
                tables[name] = dict.fromkeys(utterances, value)
                report.append(f"wrote {name}: {value!r} for every utterance")
    return report


def _describe(name: str, problems: list[Problem]) -> list[str]:
    """The repairs of one table, one line each; sorting is told once."""
    other = [p for p in problems if not p.message.startswith("not sorted") and p.line is not None]
    lines = [f"repaired {name}:{p.line}: {p.message}" for p in other]
    if any(p.message.startswith("not sorted") for p in problems):
        lines.append(f"sorted {name}")
    return lines


def _fix_references(tables: dict[str, dict[str, str]], report: list[str]) -> dict[str, list[str]] | None:
    if "references" not in tables:
        return None
    references = {}
    for utt, value in tables["references"].items():
        answers, message = parse_references(value)
        if answers is None:
            report.append(f"dropped the references of {utt}: {message}")
        elif utt not in tables["text"]:
            report.append(f"dropped the references of {utt}: not in text")
        else:
            references[utt] = answers
    return references


def _drop_reason(utt: str, data: DataDir, tables: dict[str, dict[str, str]]) -> str:
    """Why an utterance cannot stay, or ""."""
    if message := key_problem(utt):
        return message
    names = [*UTTERANCE_TABLES, "wav.scp" if data.segments is None else "segments"]
    if absent := [name for name in names if utt not in tables[name]]:
        return "not in " + ", ".join(absent)
    if data.utt2task[utt] not in TASKS:
        return f"unknown task {data.utt2task[utt]!r}"
    if data.segments is not None:
        if utt not in data.segments:
            return "segments: " + parse_segment(tables["segments"][utt])[1]
        if data.segments[utt].recording not in data.wav:
            return f"recording {data.segments[utt].recording!r} is not in wav.scp"
    trouble = audio_problem(data.source(utt)[0], allow_pipes=True)
    return trouble[0] if trouble else ""


def _back_up(path: Path, report: list[str]) -> Path:
    """Copy the tables and write the report to ``<path>/.backup-<n>``, the first n that is free."""
    number = 1
    while (backup := path / f".backup-{number}").exists():
        number += 1
    backup.mkdir()
    for name in ("wav.scp", *UTTERANCE_TABLES, *OPTIONAL_TABLES):
        if (path / name).exists():
            shutil.copy2(path / name, backup / name)
    write_text(backup / "report.txt", "\n".join(report) + "\n")
    return backup


def split(data: DataDir, parts: int, *, per_speaker: bool = False) -> list[DataDir]:
    """Split into ``parts`` directories of almost equal size, every utterance in exactly one.

    By utterance, the parts are consecutive runs of the sorted keys. Per speaker, a speaker's utterances stay
    together: the speaker with most utterances goes first, each to the smallest part so far.

    Raises:
        DataError: fewer utterances (or speakers) than parts.
    """
    utterances = data.utterances
    speakers: dict[str, list[str]] = {}
    for utt in utterances:
        speakers.setdefault(data.utt2spk[utt], []).append(utt)
    units, unit = (len(speakers), "speakers") if per_speaker else (len(utterances), "utterances")
    if not 1 <= parts <= units:
        message = f"cannot be split into {parts} parts: it has {units} {unit}"
        raise DataError(data.path, message, hint=f"ask for 1 to {units} parts")
    if not per_speaker:
        bounds = [len(utterances) * i // parts for i in range(parts + 1)]
        return [data.subset(utterances[a:b]) for a, b in pairwise(bounds)]
    shares: list[list[str]] = [[] for _ in range(parts)]
    for _, own in sorted(speakers.items(), key=lambda item: (-len(item[1]), item[0])):
        min(shares, key=len).extend(own)
    return [data.subset(share) for share in shares]


def combine(sources: list[DataDir], target: str | Path, *, distinct_speakers: bool = False) -> DataDir:
    """Write the union of several directories to ``target``.

    Args:
        sources: directories.
        target: directory to write.
        distinct_speakers: the directories are of different corpora, so nobody may be a speaker in two of them.

    Raises:
        DataError: an utterance in two of them, a recording with two different files, segments in some only, a
            target that is one of the sources, or a speaker in two of them.
    """
    target = Path(target)
    owner: dict[str, Path] = {}
    wav: dict[str, str] = {}
    with_segments = [data for data in sources if data.segments is not None]
    if with_segments and len(with_segments) < len(sources):
        other = next(data for data in sources if data.segments is None)
        message = f"has segments, and {other.path} has none"
        raise DataError(with_segments[0].path, message, hint="format both first (that cuts the segments), then combine")
    speakers: dict[str, Path] = {}
    for data in sources:
        for speaker in sorted(set(data.utt2spk.values())) if distinct_speakers else ():
            if speaker in speakers:
                message = f"speaker {speaker!r} is in {speakers[speaker]} and in {data.path}"
                raise DataError(target, message, hint="give the speakers of one of them other names in utt2spk")
            speakers[speaker] = data.path
        if data.path.resolve() == target.resolve():
            raise DataError(target, "is both a source and the target", hint="write to another directory")
        for utt in data.utterances:
            if utt in owner:
                message = f"utterance {utt!r} is in {owner[utt]} and in {data.path}"
                raise DataError(target, message, hint="rename the utterances of one of them, or leave it out")
            owner[utt] = data.path
        for recording, value in data.wav.items():
            if wav.setdefault(recording, value) != value:
                message = f"recording {recording!r} is {wav[recording]} and, in {data.path}, {value}"
                raise DataError(target, message, hint="rename one of the recordings")
    union = DataDir(
        target,
        wav=wav,
        **{name: _union(getattr(data, name) for data in sources) for name in UTTERANCE_TABLES},
        segments=_union(data.segments or {} for data in sources) if with_segments else None,
        references=_union(data.references or {} for data in sources) or None,
    )
    union.save(target)
    _combine_formatted(sources, union)
    # without the first two nobody could tell whose voices are trained on; the third is what scoring did not see
    for name in (MIX_SPEAKERS, MIX_SOURCES, MISSING):
        (target / name).unlink(missing_ok=True)
        tables = [read_table(data.path / name, allow_empty=True) for data in sources if (data.path / name).is_file()]
        if tables:
            write_table(target / name, _union(tables))
    return union


def _union[T](tables: Iterable[dict[str, T]]) -> dict[str, T]:
    return {key: value for table in tables for key, value in table.items()}


def _combine_formatted(sources: list[DataDir], union: DataDir) -> None:
    """Combine passports and sample counts where every source has them; else remove the target's old ones."""
    for name in (PASSPORT_NAME, NUM_SAMPLES):
        (union.path / name).unlink(missing_ok=True)
    if not all((data.path / PASSPORT_NAME).is_file() for data in sources):
        return
    passports = [Passport.load(data.path) for data in sources]
    if rates := {passport.sample_rate for passport in passports} - {passports[0].sample_rate}:
        message = f"sample rates differ: {passports[0].sample_rate} and {rates.pop()} Hz"
        raise DataError(union.path, message, hint="format all sources at one sample rate")
    merged = passports[0].restrict(union.utt2task)
    merged.utterances = dict(sorted(_union(passport.utterances for passport in passports).items()))
    merged.skipped = dict(sorted(_union(passport.skipped for passport in passports).items()))
    merged.tasks = union.per_task()
    merged.save(union.path)
    counts = {utt: str(entry["num_samples"]) for utt, entry in merged.utterances.items()}
    write_table(union.path / NUM_SAMPLES, counts)


def choose(
    data: DataDir,
    *,
    utterances: Iterable[str] | None = None,
    task: str | None = None,
    first: int | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> DataDir:
    """A subset: the named ``utterances``, those of one ``task``, and of these the ``first`` n or a ``sample`` of n.

    Raises:
        DataError: an unknown utterance, or fewer utterances than asked for.
    """
    keys = data.utterances if utterances is None else sorted(data.subset(utterances).text)
    if task is not None:
        keys = [utt for utt in keys if data.utt2task[utt] == task_spec(task).name]
    number = first if first is not None else sample
    if number is not None and not 1 <= number <= len(keys):
        message = f"{number} utterances were asked for, and there are {len(keys)} to choose from"
        raise DataError(data.path, message, hint=f"ask for 1 to {len(keys)}" if keys else "choose another task")
    if first is not None:
        keys = keys[:first]
    elif sample is not None:
        keys = random.Random(seed).sample(keys, sample)
    return data.subset(keys)
