"""Rows of other toolkits' data: where they come from, and which of their columns are what an utterance needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pam_espnet.data.format import MISSING
from pam_espnet.errors import ConfigError, DataError

NO_AUDIO = f"{MISSING}: "  # begins the reasons of rows of which the recording alone is the matter
# Column names that are common for each field, the first that a row has is taken. ``start``, ``end`` and ``duration``
# (seconds) have none: most columns of these names are times in something longer than the file.
USUAL: Mapping[str, Sequence[str]] = {
    "id": ("id", "utt_id", "utterance_id", "key"),
    "audio": ("audio", "audio_filepath", "audio_path", "file_name", "filename", "wav", "path", "file"),
    "text": ("text", "sentence", "transcript", "transcription", "caption", "answer"),
    "prompt": ("prompt", "question", "instruction"),
    "task": ("task",),
    "speaker": ("speaker", "speaker_id", "client_id", "spk"),
    "references": ("references", "captions"),
    "start": (),
    "end": (),
    "duration": (),
}


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        where: in the source, as a person would look for it: "line 12".
        values: {column: value}.
        problem: why the row cannot be used, or "".
        note: what of the row is not kept, or "".
        state: where the reader can go on behind this row, if it can; anything that JSON has.
    """

    where: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    note: str = ""
    state: Any = None


@dataclass(frozen=True)
class Source:
    """Something to import.

    Attributes:
        path: as it was given, for messages.
        root: relative paths in its rows start here.
        stamp: what its rows depend on: sizes and times of files, a commit.
        read: called as ``read(state, skip)``: the rows behind the one that had ``state`` (None: all), without the first
            ``skip``.
        names: {field: columns that may hold it, in the order of preference}.
        rows: how many there are, where that is known.
    """

    path: str
    root: Path
    stamp: Mapping[str, Any]
    read: Callable[[Any, int], Iterator[Row]]
    names: Mapping[str, Sequence[str]] = field(default_factory=lambda: USUAL)
    rows: int | None = None

    def value(self, row: Row, name: str) -> Any:
        """A field of a row; None where the row has none. Of several columns that were given for references, a list."""
        found = [value for column in self.names[name] if (value := row.values.get(column)) not in (None, "", [])]
        if name == "references" and len(found) > 1:
            return [text for value in found for text in (value if isinstance(value, list) else [value])]
        return found[0] if found else None

    def map_columns(self, columns: Mapping[str, str]) -> Source:
        """The source with fields taken from columns that were given: ``{"text": "sentence"}``.
        Raises ConfigError: no such field."""
        for name in columns:
            if name not in self.names:
                raise ConfigError(f"--columns {name}=...: no such field; there are {', '.join(self.names)}")
        given = {name: tuple(column.split(",")) for name, column in columns.items()}
        return replace(self, names={**self.names, **given})

    def check_columns(self, row: Row, given: Mapping[str, str]) -> None:
        """Raises DataError: ``row``, the first, lacks a column that was given, or any for audio or text."""
        there = ", ".join(row.values) or "none"
        for name, columns in self.names.items():
            lacking = [column for column in columns if column not in row.values]
            needed = name in ("audio", "text") and len(lacking) == len(columns)
            if (name in given and lacking) or needed:
                wanted = ", ".join(lacking) if name in given else "/".join(columns)
                message = f"{row.where} has no column {wanted} for {name}; its columns are {there}"
                raise DataError(self.path, message, hint=f"name the right one: --columns {name}=COLUMN")


def parse_columns(changes: Sequence[str]) -> dict[str, str]:
    """``["text=sentence"]`` as {field: column}. Raises ConfigError: not of this form."""
    columns = {}
    for change in changes:
        name, found, column = change.partition("=")
        if not (name and found and column):
            raise ConfigError(f"--columns takes FIELD=COLUMN, such as text=sentence, not {change!r}")
        columns[name] = column
    return columns


def file_stamp(paths: Sequence[Path]) -> dict[str, list[int]]:
    """{path: [bytes, time of the last change]}."""
    return {str(path): [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths}
