"""A Kaldi-style data directory: what is in it, and everything that can be wrong with it.

    wav.scp      <recording> <audio file, relative to the current directory>
    text         <utterance> <answer>
    prompt       <utterance> <question to the model>
    utt2task     <utterance> <asr | count | caption | verify>
    utt2spk      <utterance> <speaker>
    segments     <utterance> <recording> <start> <end>     optional, seconds; without it utterance = recording
    references   <utterance> <JSON list of strings>        optional, several right answers, for some utterances

Reads tables only: no audio file is opened here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pam_espnet.data.tables import Problem, Scan, difference_problems, raise_problems, scan_table, write_table
from pam_espnet.data.tasks import TASKS
from pam_espnet.errors import DataError

UTTERANCE_TABLES = ("text", "prompt", "utt2task", "utt2spk")
OPTIONAL_TABLES = ("segments", "references")
MAX_KEY_BYTES = 200  # a key becomes a file name; file systems stop at 255 bytes


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

        Raises:
            DataError: lists every problem with file, line and remedy.
        """
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
        """Where an utterance's audio is: (value of wav.scp, start, end), times in seconds or None for all of it."""
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

        Raises:
            DataError: a key that is not in the directory, or no key at all.
        """
        wanted = set(keys)
        if unknown := sorted(wanted - self.text.keys()):
            message = f"has no utterance {unknown[0]!r} ({len(unknown)} unknown keys)"
            raise DataError(self.path, message, hint=f"the keys are the first column of {self.path / 'text'}")
        if not wanted:
            raise DataError(self.path, "no utterance is left", hint="choose other keys, or more of them")
        segments = _keep(self.segments, wanted)
        recordings = {segment.recording for segment in segments.values()} if segments is not None else wanted
        references = _keep(self.references, wanted)
        return DataDir(
            path=self.path,
            wav={key: self.wav[key] for key in sorted(recordings)},
            text={key: self.text[key] for key in sorted(wanted)},
            prompt={key: self.prompt[key] for key in sorted(wanted)},
            utt2task={key: self.utt2task[key] for key in sorted(wanted)},
            utt2spk={key: self.utt2spk[key] for key in sorted(wanted)},
            segments=segments,
            references=references or None,
        )

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
    """Check a data directory, its audio files' existence included, and return it.

    Args:
        path: the directory.
        allow_pipes: accept ``wav.scp`` values that end in ``|`` (commands whose output is audio).

    Raises:
        DataError: lists every problem with file, line and remedy.
    """
    data, problems = inspect(path)
    wav = scan_table(Path(path) / "wav.scp")
    for key, value in wav.values.items():
        if trouble := audio_problem(value, allow_pipes):
            problems.append(Problem(wav.path, wav.lines[key], f"{key!r}: {trouble[0]}", trouble[1]))
    raise_problems(path, problems)
    return data


def audio_problem(value: str, allow_pipes: bool) -> tuple[str, str] | None:
    """(what is wrong, remedy) of a ``wav.scp`` value that is an unwanted command or no file; None when it is good."""
    if value.endswith("|"):
        hint = "run the command once and list the file it makes, or pass --allow-pipes if you trust it"
        return None if allow_pipes else ("the value is a command (it ends in '|')", hint)
    if not Path(value).exists():
        hint = "relative paths start at the current directory; go there, or correct the path"
        return f"no such audio file: {value}", hint
    if not Path(value).is_file():
        return f"{value} is not a file", "list one audio file per key"
    return None


def inspect(path: str | Path) -> tuple[DataDir, list[Problem]]:
    """Read a directory as far as it can be read, and list every problem of its tables."""
    path = Path(path)
    if not path.is_dir():
        hint = "name a directory that holds " + ", ".join(("wav.scp", *UTTERANCE_TABLES))
        raise DataError(path, "no such data directory", hint=hint)
    scans = scan_tables(path)
    problems = [problem for scan in scans.values() for problem in scan.problems]
    # a table that is missing altogether is one problem, not one per key
    usable = {name: scan for name, scan in scans.items() if scan.values}
    text = usable.get("text")
    if text is not None:
        for key in text.values:
            if message := key_problem(key):
                problems.append(Problem(text.path, text.lines[key], message, "rename the utterance in every table"))
        # with segments, wav.scp is keyed by recording
        apart = {"text", "references"} | ({"wav.scp"} if "segments" in scans else set())
        others = [name for name in usable if name not in apart]
        for name in others:
            problems += sorted(difference_problems(text, usable[name]), key=lambda p: (p.path.name, p.line or 0))
        if "references" in usable:
            problems += difference_problems(text, usable["references"], subset=True)
    segments = _parse_segments(scans["segments"], usable.get("wav.scp"), problems) if "segments" in scans else None
    references = _parse_references(scans["references"], problems) if "references" in scans else None
    tasks = scans["utt2task"]
    for key, task in tasks.values.items():
        if task not in TASKS:
            message, hint = f"{key!r}: unknown task {task!r}", f"known tasks: {', '.join(TASKS)}"
            problems.append(Problem(tasks.path, tasks.lines[key], message, hint))
    values = {name: scan.values for name, scan in scans.items()}
    tables = {name: values[name] for name in UTTERANCE_TABLES}
    return DataDir(path, wav=values["wav.scp"], **tables, segments=segments, references=references), problems


def scan_tables(path: Path) -> dict[str, Scan]:
    """Scan every table of a directory; the optional ones only when they exist."""
    names = ("wav.scp", *UTTERANCE_TABLES, *(name for name in OPTIONAL_TABLES if (path / name).exists()))
    return {name: scan_table(path / name) for name in names}


def key_problem(key: str) -> str:
    """Why an utterance key cannot be used, or ""; keys become file names."""
    if "/" in key or "\\" in key or key.startswith((".", "-")):
        return f"key {key!r} contains a slash or begins with '.' or '-', so it cannot be a file name"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"key {key[:40]!r}... is longer than {MAX_KEY_BYTES} bytes"
    return ""


def _parse_segments(scan: Scan, wav: Scan | None, problems: list[Problem]) -> dict[str, Segment]:
    segments = {}
    for key, value in scan.values.items():
        segment, message = parse_segment(value)
        if segment is None:
            hint = "write '<utterance> <recording> <start seconds> <end seconds>'"
            problems.append(Problem(scan.path, scan.lines[key], f"{key!r}: {message}", hint))
            continue
        segments[key] = segment
        if wav is not None and segment.recording not in wav.values:
            message, hint = f"{key!r}: recording {segment.recording!r} is not in wav.scp", f"add it to {wav.path}"
            problems.append(Problem(scan.path, scan.lines[key], message, hint))
    if wav is not None:
        for key in wav.values.keys() - {segment.recording for segment in segments.values()}:
            hint = "remove the recording, or let utils/fix_data_dir.py do it"
            problems.append(Problem(wav.path, wav.lines[key], f"no segment uses recording {key!r}", hint))
    return segments


def parse_segment(value: str) -> tuple[Segment | None, str]:
    """A ``segments`` value as a ``Segment``, or None and what is wrong with it."""
    fields = value.split()
    if len(fields) != 3:
        return None, f"expected recording, start and end, found {len(fields)} fields"
    try:
        start, end = float(fields[1]), float(fields[2])
    except ValueError:
        return None, f"start {fields[1]!r} or end {fields[2]!r} is not a number"
    if not (math.isfinite(start) and math.isfinite(end)):
        return None, "start or end is not finite"
    if start < 0 or end <= start:
        return None, f"needs 0 <= start < end, found start {start} and end {end}"
    return Segment(fields[0], start, end), ""


def _parse_references(scan: Scan, problems: list[Problem]) -> dict[str, list[str]]:
    references = {}
    for key, value in scan.values.items():
        answers, message = parse_references(value)
        if answers is None:
            hint = 'write a JSON list on one line: ["a dog barks", "barking of a dog"]'
            problems.append(Problem(scan.path, scan.lines[key], f"{key!r}: {message}", hint))
        else:
            references[key] = answers
    return references


def parse_references(value: str) -> tuple[list[str] | None, str]:
    """A ``references`` value as a list of answers, or None and what is wrong with it."""
    try:
        answers = json.loads(value)
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg} at column {error.colno})"
    if not isinstance(answers, list) or not answers:
        return None, "not a list of strings"
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        return None, "the list has something else than non-empty strings"
    return answers, ""
