"""Kaldi-style data directories: their tables, and everything that can be wrong with them.

    wav.scp      <recording> <audio file, relative to the current directory; or <archive>.ark:<offset> (audio_ark)>
    text         <utterance> <answer>
    prompt       <utterance> <question to the model>
    utt2task     <utterance> <asr | count | caption | verify>
    utt2spk      <utterance> <speaker>
    segments     <utterance> <recording> <start> <end>     optional, seconds; without it utterance = recording
    references   <utterance> <JSON list of strings>        optional, several right answers, for some utterances

Reads tables only: no audio is decoded here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pam_espnet.data.audio_ark import check_record, locate
from pam_espnet.data.tables import Problem, Scan, raise_problems, scan_table, write_table
from pam_espnet.data.tasks import TASKS
from pam_espnet.errors import DataError

UTTERANCE_TABLES = ("text", "prompt", "utt2task", "utt2spk")
OPTIONAL_TABLES = ("segments", "references")
MAX_KEY_BYTES = 200  # a key becomes a file name; file systems stop at 255 bytes
_SHOWN = 100  # characters of a value in an error message


@dataclass(frozen=True)
class Segment:
    """A piece of a recording; ``start`` and ``end`` in seconds."""

    recording: str
    start: float
    end: float


@dataclass
class DataDir:
    """The tables of one data directory in memory; ``wav`` is keyed by recording, everything else by utterance."""

    path: Path
    wav: dict[str, str]
    text: dict[str, str]
    prompt: dict[str, str]
    utt2task: dict[str, str]
    utt2spk: dict[str, str]
    segments: dict[str, Segment] | None = None
    references: dict[str, list[str]] | None = None

    @classmethod
    def load(cls, path: str | Path) -> DataDir:
        """Read a directory and check its tables against each other, without looking for the audio files.
        Raises DataError: lists every problem with file, line and remedy."""
        data, problems = inspect(path)
        raise_problems(path, problems)
        return data

    @property
    def utterances(self) -> list[str]:
        """The utterance keys, in bytewise order."""
        return sorted(self.text)

    def __len__(self) -> int:
        return len(self.text)

    def source(self, utterance: str) -> tuple[str, float | None, float | None]:
        """Audio of an utterance: (value of wav.scp, start, end), times in seconds or None for all of it."""
        if self.segments is None:
            return self.wav[utterance], None, None
        segment = self.segments[utterance]
        return self.wav[segment.recording], segment.start, segment.end

    def digest(self) -> str:
        """SHA-256 over texts, prompts and tasks of all utterances."""
        table = [[utt, self.text[utt], self.prompt[utt], self.utt2task[utt]] for utt in self.utterances]
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()

    def per_task(self) -> dict[str, int]:
        """Number of utterances of each task, in the order of ``TASKS``."""
        counts = Counter(self.utt2task.values())
        return {task: counts[task] for task in TASKS if counts[task]}

    def subset(self, keys: Iterable[str]) -> DataDir:
        """The directory restricted to some utterances (and the recordings they need).
        Raises DataError: a key that is not in the directory, or no key at all."""
        wanted = set(keys)
        if unknown := sorted(wanted - self.text.keys()):
            message = f"has no utterance {unknown[0]!r} ({len(unknown)} unknown keys)"
            raise DataError(self.path, message, hint=f"the keys are the first column of {self.path / 'text'}")
        if not wanted:
            raise DataError(self.path, "no utterance is left", hint="choose other keys, or more of them")
        segments = _keep(self.segments, wanted)
        recordings = {segment.recording for segment in segments.values()} if segments is not None else wanted
        references = _keep(self.references, wanted)
        tables = {name: {key: getattr(self, name)[key] for key in sorted(wanted)} for name in UTTERANCE_TABLES}
        wav = {key: self.wav[key] for key in sorted(recordings)}
        return DataDir(self.path, wav=wav, **tables, segments=segments, references=references or None)

    def save(self, path: str | Path | None = None) -> None:
        """Write all tables to ``path`` (default: where it was read); optional tables it lacks are removed there."""
        path = Path(path if path is not None else self.path)
        path.mkdir(parents=True, exist_ok=True)
        tables = {name: getattr(self, name) for name in UTTERANCE_TABLES}
        tables["wav.scp"] = self.wav
        if self.segments is not None:
            tables["segments"] = {key: f"{s.recording} {s.start!r} {s.end!r}" for key, s in self.segments.items()}
        if self.references is not None:
            tables["references"] = {key: json.dumps(v, ensure_ascii=False) for key, v in self.references.items()}
        for name, table in tables.items():
            write_table(path / name, table)
        for name in OPTIONAL_TABLES:
            if name not in tables:
                (path / name).unlink(missing_ok=True)


def _keep[T](table: dict[str, T] | None, wanted: set[str]) -> dict[str, T] | None:
    return None if table is None else {key: table[key] for key in sorted(wanted & table.keys())}


def validate(path: str | Path, *, allow_pipes: bool = False) -> DataDir:
    """Check a data directory, its audio files' existence included, and return it; ``allow_pipes`` accepts commands.
    Raises DataError: lists every problem with file, line and remedy."""
    data, problems = inspect(path)
    wav = scan_table(Path(path) / "wav.scp")
    raise_problems(path, problems + audio_problems(wav, allow_pipes))
    return data


def audio_problems(wav: Scan, allow_pipes: bool) -> list[Problem]:
    """Values of ``wav.scp`` that are no file and no record of an archive, and commands unless they are allowed."""
    problems = []
    for recording, value in wav.values.items():
        archive, offset = locate(value)
        if value.endswith("|"):
            message = "the value is a command (it ends in '|')"
            hint = "run the command once and list the file it makes, or pass --allow-pipes if you trust it"
            if allow_pipes:
                continue
        elif offset is not None and os.path.isfile(archive):
            try:
                check_record(value)
                continue
            except DataError as error:
                message, hint = f"{value}: {error.message}", error.hint or ""
        elif not os.path.exists(value):  # False also for what is too long to be a path
            message = f"no such audio file: {value if len(value) <= _SHOWN else value[:_SHOWN] + '...'}"
            hint = "correct the path (relative ones start at the current directory); a command has to end in '|'"
        elif not os.path.isfile(value):
            message, hint = f"{value} is not a file", "list one audio file per key"
        else:
            continue
        problems.append(Problem(wav.path, wav.lines[recording], message, hint, key=recording))
    return problems


def inspect(path: str | Path) -> tuple[DataDir, list[Problem]]:
    """Read a directory as far as it can be read, and list every problem of its tables."""
    path = Path(path)
    if not os.path.isdir(path):
        hint = "name a directory that holds " + ", ".join(("wav.scp", *UTTERANCE_TABLES))
        raise DataError(path, "no such data directory", hint=hint)
    scans = scan_tables(path)
    problems = [problem for scan in scans.values() for problem in scan.problems]
    data, unusable = check_tables(path, scans)
    return data, problems + unusable


def scan_tables(path: Path) -> dict[str, Scan]:
    """Scan every table of a directory; the optional ones only when they exist."""
    names = ("wav.scp", *UTTERANCE_TABLES, *(name for name in OPTIONAL_TABLES if (path / name).exists()))
    return {name: scan_table(path / name) for name in names}


def check_tables(path: Path, scans: dict[str, Scan]) -> tuple[DataDir, list[Problem]]:
    """The directory that some tables are, and what is wrong from one table to another; each problem has its key.

    A table without any usable line is one problem, not one for each key.
    """
    problems: list[Problem] = []

    def wrong(table: str, key: str, message: str, hint: str) -> None:
        problems.append(Problem(scans[table].path, scans[table].lines.get(key), message, hint, key))

    values = {name: scan.values for name, scan in scans.items()}
    text, wav = values["text"], values["wav.scp"]
    for key in text:
        if message := key_problem(key):
            wrong("text", key, message, "rename the utterance in every table")
    # with segments, wav.scp is keyed by recording
    keyed = [name for name in (*UTTERANCE_TABLES, "segments" if "segments" in scans else "wav.scp") if values[name]]
    pairs = [pair for name in keyed for pair in ((name, "text"), ("text", name))]
    if text:
        for have, lack in [*pairs, ("references", "text")]:
            for key in sorted(values.get(have, {}).keys() - values[lack].keys()):
                hint = f"add {key!r} to {lack}, or let utils/fix_data_dir.py drop it from the other tables"
                wrong(have, key, f"not in {lack}", hint)
    for key, task in values["utt2task"].items():
        if task not in TASKS:
            wrong("utt2task", key, f"unknown task {task!r}", f"known tasks: {', '.join(TASKS)}")

    segments: dict[str, Segment] = {}
    for key, value in values.get("segments", {}).items():
        try:
            segments[key] = parse_segment(value)
        except ValueError as error:
            wrong("segments", key, str(error), "write '<utterance> <recording> <start seconds> <end seconds>'")
            continue
        if wav and segments[key].recording not in wav:
            message = f"recording {segments[key].recording!r} is not in wav.scp"
            wrong("segments", key, message, f"add it to {path / 'wav.scp'}")
    used = {segment.recording for segment in segments.values()} if "segments" in scans else wav.keys()
    for key in sorted(wav.keys() - used):
        wrong("wav.scp", key, "no segment uses this recording", "remove it, or let utils/fix_data_dir.py do so")

    references: dict[str, list[str]] = {}
    for key, value in values.get("references", {}).items():
        try:
            references[key] = parse_references(value)
        except ValueError as error:
            hint = 'write a JSON list on one line: ["a dog barks", "barking of a dog"]'
            wrong("references", key, str(error), hint)
    data = DataDir(
        path,
        wav=wav,
        **{name: values[name] for name in UTTERANCE_TABLES},
        segments=segments if "segments" in scans else None,
        references=references if "references" in scans else None,
    )
    return data, problems


def key_problem(key: str) -> str:
    """Why an utterance key cannot be used, or ""; keys become file names."""
    if "/" in key or "\\" in key or key.startswith((".", "-")):
        return "contains a slash or begins with '.' or '-', so it cannot be a file name"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"longer than {MAX_KEY_BYTES} bytes, so it cannot be a file name"
    return ""


def parse_segment(value: str) -> Segment:
    """A ``segments`` value, times in seconds; ValueError: what is wrong with it."""
    fields = value.split()
    if len(fields) != 3:
        raise ValueError(f"expected recording, start and end, found {len(fields)} fields")
    try:
        start, end = float(fields[1]), float(fields[2])
    except ValueError:
        raise ValueError(f"start {fields[1]!r} or end {fields[2]!r} is not a number") from None
    if not 0 <= start < end < math.inf:  # nor are they NaN
        raise ValueError(f"needs 0 <= start < end, found start {start} and end {end}")
    return Segment(fields[0], start, end)


def parse_references(value: str) -> list[str]:
    """A ``references`` value; ValueError: what is wrong with it."""
    try:
        answers = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(answers, list) or not answers:
        raise ValueError("not a list of strings")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError("the list has something else than non-empty strings")
    return answers
