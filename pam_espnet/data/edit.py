"""Changes of data directories: repair, union, subset, other wordings. Everything returns what it did or made.

Formatted directories (``dump/raw/<set>``) keep their passport and ``utt2num_samples`` through all of it.
"""

import random
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from pam_espnet.data.datadir import (
    OPTIONAL_TABLES,
    UTTERANCE_TABLES,
    DataDir,
    audio_problems,
    check_tables,
    scan_tables,
)
from pam_espnet.data.format import MISSING
from pam_espnet.data.leakage import MIX_SOURCES, MIX_SPEAKERS
from pam_espnet.data.passport import PASSPORT_NAME, Passport
from pam_espnet.data.prompts import Wordings
from pam_espnet.data.tables import Scan, raise_problems, read_table, write_table
from pam_espnet.data.tasks import task_spec
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
    missing. A missing ``utt2spk`` is written with one speaker for each utterance.

    Args:
        task: write a missing ``utt2task`` with this task, and a missing ``prompt`` with its default prompt.

    Returns:
        (what was repaired or dropped and why, one line each; the backup of the old tables, None if nothing changed).

    Raises DataError: what no program can decide: a key with two different values, a missing ``wav.scp`` or ``text``,
    nothing left.
    """
    path = Path(path)
    scans = scan_tables(path)
    raise_problems(path, [conflict for scan in scans.values() for conflict in scan.conflicts])
    report = _fill_missing(scans, task)
    for name, scan in scans.items():
        if not scan.values:
            raise_problems(path, scan.problems)
        unsorted = [problem for problem in scan.problems if problem.message.startswith("not sorted")]
        report += [f"repaired {name}:{p.line}: {p.message}" for p in scan.problems if p not in unsorted]
        report += [f"sorted {name}"] if unsorted else []
    data, problems = check_tables(path, scans)
    problems += audio_problems(scans["wav.scp"], allow_pipes=True)
    recordings: dict[str, str] = {}  # dropped ones, and why
    utterances: dict[str, str] = {}
    for problem in problems:
        reasons = recordings if problem.path.name == "wav.scp" and data.segments is not None else utterances
        if problem.path.name != "references":
            reasons.setdefault(problem.key, problem.message)
        else:
            report.append(f"dropped the references of {problem.key}: {problem.message}")
    keep = []
    for utt in data.utterances:
        if reason := utterances.get(utt) or (data.segments and recordings.get(data.segments[utt].recording)):
            utterances[utt] = reason
        else:
            keep.append(utt)
    if not keep:
        raise_problems(path, problems)
    report += [f"dropped {utt}: {utterances[utt]}" for utt in sorted(utterances)]
    kept = data.subset(keep)
    unused = sorted(data.wav.keys() - kept.wav.keys()) if data.segments is not None else []
    report += [f"dropped recording {key}: {recordings.get(key, 'no utterance uses it')}" for key in unused]
    if not report:
        return [], None
    backup = _back_up(path, report)
    save_dir(kept, path)
    return report, backup


def _fill_missing(scans: dict[str, Scan], task: str | None) -> list[str]:
    """Fill tables that are missing or empty, where a convention has a value; returns what was done, as lines."""
    text = scans["text"].values
    if not text:
        return []
    fill = {} if scans["utt2spk"].values else {"utt2spk": {utt: utt for utt in text}}
    report = ["wrote utt2spk: one speaker for each utterance"] if fill else []
    if task is not None:
        spec = task_spec(task)
        for name, value in (("utt2task", spec.name), ("prompt", spec.default_prompt)):
            if not scans[name].values:
                fill[name] = dict.fromkeys(text, value)
                report.append(f"wrote {name}: {value!r} for every utterance")
    for name, values in fill.items():
        scans[name] = Scan(scans[name].path, values)
    return report


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


def combine(sources: list[DataDir], target: str | Path, *, distinct_speakers: bool = False) -> DataDir:
    """Write the union of several directories to ``target``.

    Args:
        distinct_speakers: the directories are of different corpora, so no speaker may be in two of them.

    Raises DataError: an utterance in two of them, a recording with two different files, segments in some only, a
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
    # speakers of mixtures, and clips that scoring has to count as missing
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
    """A subset: the given ``utterances``, those of one ``task``, and of these the ``first`` n or a ``sample`` of n.
    Raises DataError: an unknown utterance, or fewer utterances than asked for."""
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


def reword(data_dir: str | Path, wordings: Mapping[str, Wordings], target: str | Path) -> list[Path]:
    """Write ``<target>/2``, ``<target>/3``, ...: the set in the second, third, ... wording; return these directories.

    Args:
        data_dir: a formatted data directory, every prompt in the first wording of its task.
        wordings: task -> wordings, for every task of the directory. Directory n has the utterances whose task has n
            wordings or more; their audio is not copied.
        target: folder for the directories.

    Raises DataError: a prompt that is not the first wording of its task.
    """
    data = DataDir.load(data_dir)
    for utterance in data.utterances:
        known = wordings[data.utt2task[utterance]]
        if known.recognise(data.prompt[utterance])[0] != 0:
            message = f"{utterance} is not asked in the first wording of {known.path}: {data.prompt[utterance]!r}"
            raise DataError(Path(data_dir) / "prompt", message, hint="name a test set; training draws its prompts")
    written = []
    for number in range(1, max(len(wordings[task]) for task in data.per_task())):
        chosen = data.subset(utt for utt in data.utterances if number < len(wordings[data.utt2task[utt]]))
        prompts = {utt: wordings[task].ask(chosen.prompt[utt], number) for utt, task in chosen.utt2task.items()}
        written.append(Path(target) / str(number + 1))
        save_dir(replace(chosen, prompt=prompts), written[-1])
    return written
