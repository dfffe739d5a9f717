"""A CSV with a header line and a line for each recording; commas, tabs, semicolons or bars between fields."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pam_espnet.data.exchange.rows import Row, Source, file_stamp
from pam_espnet.errors import DataError

DELIMITERS = ",\t;|"
NAMES = ("metadata.csv", "metadata.tsv")  # the table of a folder, as Hugging Face's audio folders have it


def open_folder(folder: Path) -> Source:
    """The CSV of a folder: metadata.csv, or the only one that is there.
    Raises DataError: none, or several."""
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv"))
    chosen = [path for path in tables if path.name in NAMES] or tables
    if len(chosen) != 1:
        found = f"holds {', '.join(path.name for path in chosen)}" if chosen else "has no CSV"
        hint = "name the file; paths in it start at its folder, or at --audio_root"
        raise DataError(folder, f"{found}: which rows belong to its recordings?", hint=hint)
    return open_csv(chosen[0])


def open_csv(path: Path) -> Source:
    """Raises DataError: no header line, or a name in it twice."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        line = file.readline()
    delimiter = max(DELIMITERS, key=line.count)
    header = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    if len(header) < 2 or len(set(header)) < len(header):
        message = f"its first line names no two columns, or one twice: {line.strip()[:200]!r}"
        raise DataError(path, message, line=1, hint="write a line with the names: file_name,text")

    def read(state: Any, skip: int) -> Iterator[Row]:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                if delimiter in "\t|":  # quotes in such tables are those of texts
                    reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
                else:
                    reader = csv.reader(file, delimiter=delimiter, strict=True)
                next(reader)
                number = 0
                for fields in reader:
                    number += bool(fields)
                    if not fields or number <= skip:
                        continue
                    where, wrong = f"line {reader.line_num}", len(fields) != len(header)
                    problem = f"{len(fields)} fields, and the first line names {len(header)}" if wrong else ""
                    values = dict(zip(header, (text.strip() for text in fields), strict=False))
                    yield Row(where, values, problem)
        except UnicodeDecodeError as error:
            raise DataError(path, f"is not UTF-8 ({error.reason})", hint="convert it: iconv -t utf-8") from error
        except csv.Error as error:
            hint = "repair the quotes: the rest of the file cannot be read around them"
            raise DataError(path, f"is not CSV: {error}", line=reader.line_num, hint=hint) from error

    return Source(str(path), path.parent, file_stamp([path]), read)
