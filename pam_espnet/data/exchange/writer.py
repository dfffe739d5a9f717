"""Data directories made from other toolkits' data: rows in a stream, a journal, archives of audio, a report.

    OUT/{wav.scp,text,prompt,utt2task,utt2spk}     and segments, references where rows have them
    OUT/audio.<n>.ark     recordings that came as bytes, or all of them (see ``audio_ark``); files stay where they are
    OUT/missing           utterances whose recording is not there, with the reason; stage 2 copies it to the passport
    OUT/left_out.txt      every row that is not in the tables, with the reason
    OUT/import.json       the source, the options, what the result depends on
    OUT/.import.jsonl     the journal: a line for each row; a killed import goes on behind it

Audio is never decoded here, and one recording is in memory at a time; the tables are in memory when they are written.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pam_espnet.data.audio import read_audio
from pam_espnet.data.audio_ark import ARCHIVES, locate, pack
from pam_espnet.data.datadir import DataDir, Segment, validate
from pam_espnet.data.exchange.convert import Converter
from pam_espnet.data.exchange.rows import NO_AUDIO, Row, Source
from pam_espnet.data.format import MAX_SKIPPED, MISSING
from pam_espnet.data.tables import write_table
from pam_espnet.errors import DataError
from pam_espnet.fileio import check_key, exclusive, write_text

JOURNAL_NAME = ".import.jsonl"
LEFT_OUT = "left_out.txt"
KEY_NAME = "import.json"


@dataclass
class Report:
    """What an import did: utterances, rows left out by reason, notes on rows that were taken."""

    utterances: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def lines(self, folder: Path) -> list[str]:
        """As text, the most common reasons first."""
        out = sum(self.left_out.values())
        text = [
            f"{folder}: {self.utterances} utterances" + (f"; {out} rows left out ({folder / LEFT_OUT})" if out else "")
        ]
        text += [f"  {number} left out: {reason}" for reason, number in self.left_out.most_common(5)]
        return text + [f"  note, {number} rows: {note}" for note, number in self.notes.most_common()]


def import_rows(
    source: Source,
    converter: Converter,
    folder: str | Path,
    options: Mapping[str, Any],
    *,
    archive_mb: float = 1000,
    copy: bool = False,
    first: int | None = None,
) -> Report:
    """Make the data directory ``folder``.

    Args:
        source: what is read, through ``converter``.
        options: what the user chose; another choice, or a changed source, is an error where ``folder`` was begun.
        archive_mb: size of an archive; a killed import reads again what was in an unfinished one.
        copy: put files into archives, too.
        first: number of rows to take, from the beginning.

    Raises DataError: the folder was begun with something else, a column is not there, more than half of the rows cannot
    be used, the source cannot be read any further.
    """
    folder = Path(folder)
    if next(read_journal(folder / JOURNAL_NAME), None) is None:  # options that failed at once bind nobody
        (folder / KEY_NAME).unlink(missing_ok=True)
    key = {"source": source.path, "stamp": source.stamp, "options": {**options, "copy": copy, "first": first}}
    check_key(folder / KEY_NAME, key, f"to import it again delete {folder}, or name another directory")
    stored: dict[str, str] = {}  # file -> where it is in an archive

    def convert(row: Row) -> dict[str, Any]:
        record = converter.convert(row)
        if copy and "wav" in record:
            path = record.pop("wav")
            record |= {"file": path, **({"wav": stored[path]} if path in stored else _read_file(path))}
        return record

    def remember(record: Mapping[str, Any]) -> None:
        if "utt" in record:
            converter.keys[record["utt"]] = record["where"]
        if "file" in record and "wav" in record:
            stored[record["file"]] = record["wav"]

    columns = options.get("columns") or {}

    def rows(state: Any, skip: int) -> Iterator[Row]:
        for number, row in enumerate(source.read(state, skip)):
            if number == skip == 0 and not row.problem:
                source.check_columns(row, columns)
            yield row

    total = source.rows if first is None else min(first, source.rows or first)
    journal = run_journaled(rows, convert, folder, archive_mb * 1e6, remember, first, total)
    return _write_tables(source, folder, journal)


def _read_file(path: str) -> dict[str, Any]:
    return {"audio": Path(path).read_bytes()}


# ---- the journal ----------------------------------------------------------------------------------------------------


def run_journaled(
    read: Callable[[Any, int], Iterator[Row]],
    convert: Callable[[Row], dict[str, Any]],
    folder: Path,
    archive_bytes: float,
    remember: Callable[[Mapping[str, Any]], None] = lambda record: None,
    first: int | None = None,
    total: int | None = None,
) -> Path:
    """Write a record of each row to the journal of ``folder``, and what records have as ``audio`` (bytes) to archives.

    Args:
        read: ``Source.read``.
        convert: a row's record, anything that JSON has; ``wav`` is added where ``audio`` was.
        remember: called with every record, in order, also with those of a killed run; after it the next row is read.
        first, total: how many rows to take at most, how many there are.

    Returns:
        the journal. It ends in {"end": true} once all rows are in it; a journal that does is not touched again.
    """
    from tqdm import tqdm

    path = folder / JOURNAL_NAME
    with exclusive(folder / ".import.lock"):
        state, skip, done = None, 0, 0
        kept = folder / f"{JOURNAL_NAME}.kept"
        with open(kept, "w", encoding="utf-8") as file:
            for record in read_journal(path):
                if record.get("end"):
                    kept.unlink()
                    return path
                if "wav" in record and (value := locate(record["wav"]))[1] is not None and not Path(value[0]).is_file():
                    break  # its archive was not finished, and what follows may need it
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                remember(record)
                done, skip = done + 1, skip + 1
                if record.get("state") is not None:
                    state, skip = record["state"], 0
        os.replace(kept, path)
        for leftover in folder.glob(".audio.*.tmp-*.ark"):
            leftover.unlink()
        if done:
            logging.info("%s: %d rows are imported already", folder, done)
        rows = read(state, skip) if first is None else islice(read(state, skip), first - done)
        stopped: list[DataError | KeyboardInterrupt] = []
        with open(path, "a", encoding="utf-8") as file:
            bar = tqdm(
                _records(rows, convert, stopped), desc=f"import {folder.name}", unit="row", initial=done, total=total
            )
            for record in pack(bar, folder, archive_bytes):
                if "ark" in record:
                    record["wav"] = os.path.abspath(folder / record.pop("ark"))
                remember(record)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
            if stopped:
                raise stopped[0]
            file.write('{"end": true}\n')
    return path


def _records(
    rows: Iterable[Row], convert: Callable[[Row], dict[str, Any]], stopped: list[DataError | KeyboardInterrupt]
) -> Iterator[dict[str, Any]]:
    """Records of rows. Where reading stops it is as if they ended, so that the archive of those before is whole."""
    try:
        for row in rows:
            record = convert(row)
            yield record | {"state": row.state} if row.state is not None else record
    except (DataError, KeyboardInterrupt) as error:
        stopped.append(error)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Records up to the first line that is not whole."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run
                return


# ---- tables ---------------------------------------------------------------------------------------------------------


def _write_tables(source: Source, folder: Path, journal: Path) -> Report:
    report = Report()
    tables: dict[str, dict[str, Any]] = {
        name: {} for name in ("text", "prompt", "task", "speaker", "references", "wav")
    }
    pieces: dict[str, tuple[float, float]] = {}
    durations: dict[str, float] = {}
    missing: dict[str, str] = {}
    left_out: list[str] = []
    for record in read_journal(journal):
        if "left_out" in record:
            reason = record["left_out"]
            left_out.append(f"{record['where']}: {reason}\n")
            report.left_out[NO_AUDIO + "no such file" if reason.startswith(NO_AUDIO) else reason] += 1
            if "utt" in record:
                missing[record["utt"]] = reason
        elif "utt" in record:
            utt = record["utt"]
            for name, table in tables.items():
                if name in record:
                    table[utt] = record[name]
            if "start" in record:
                pieces[utt] = record["start"], record["end"]
            if "duration" in record:
                durations[utt] = record["duration"]
            if "note" in record:
                report.notes[record["note"]] += 1
    report.utterances = len(tables["text"])
    if len(left_out) > MAX_SKIPPED * (report.utterances + len(left_out)):
        some = "".join(f"\n  {line.strip()}" for line in left_out[:5])
        message = f"{len(left_out)} of {report.utterances + len(left_out)} rows cannot be used, for example:{some}"
        hint = f"repair them, or check --columns, --task and --audio_root; then delete {folder} and import again"
        raise DataError(source.path, message, hint=hint)
    wav, segments = tables["wav"], None
    if pieces:
        wav, segments = _cut_recordings(tables["wav"], pieces, durations)
    write_text(folder / LEFT_OUT, "".join(left_out))
    (folder / MISSING).unlink(missing_ok=True)
    if missing:
        write_table(folder / MISSING, missing)
    DataDir(
        folder,
        wav=wav,
        text=tables["text"],
        prompt=tables["prompt"],
        utt2task=tables["task"],
        utt2spk=tables["speaker"],
        segments=segments,
        references=tables["references"] or None,
    ).save()
    validate(folder)
    used = {locate(value)[0] for value in wav.values()}
    for archive in folder.glob(ARCHIVES):  # of a killed run, all of its records were read again
        if os.path.abspath(archive) not in used:
            archive.unlink()
    return report


def _cut_recordings(
    wav: Mapping[str, str], pieces: Mapping[str, tuple[float, float]], durations: Mapping[str, float]
) -> tuple[dict[str, str], dict[str, Segment]]:
    """Recordings and segments, where some utterances are pieces: the others are pieces from beginning to end."""
    names = {value: utt for utt, value in sorted(wav.items(), reverse=True)}  # recording -> its first utterance
    segments = {}
    for utt, value in wav.items():
        start, end = pieces.get(utt) or (0.0, durations.get(utt) or _seconds(value))
        segments[utt] = Segment(f"rec-{names[value]}", start, end)
    return {f"rec-{utt}": value for value, utt in names.items()}, segments


def _seconds(value: str) -> float:
    wave, rate = read_audio(value)
    return len(wave) / rate
