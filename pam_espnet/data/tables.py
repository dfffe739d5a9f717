"""Kaldi tables: text files of ``key value`` lines, in bytewise (``LC_ALL=C``) order, every key once.

``read_table`` stops at the first mistake; ``scan_table`` lists every mistake with its line, for the tools that report
or repair a whole directory. ``read_lines`` reads any other text file of a user.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pam_espnet.errors import DataError
from pam_espnet.fileio import write_text

SORT_HINT = "python utils/fix_data_dir.py <data directory> sorts the tables (LC_ALL=C order) and keeps a backup"
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Problem:
    """One mistake in a data file: line (from 1), what, remedy, and the key that cannot be used because of it."""

    path: Path
    line: int | None
    message: str
    hint: str
    key: str = ""

    def error(self) -> DataError:
        """The same as an exception."""
        message = f"{self.key!r}: {self.message}" if self.key else self.message
        return DataError(self.path, message, line=self.line, hint=self.hint)


@dataclass
class Scan:
    """What is usable in a table (first value of each key, and its line), and everything that is wrong with it."""

    path: Path
    values: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    conflicts: list[Problem] = field(default_factory=list)  # those of the problems that no program can repair

    def add(self, line: int | None, message: str, hint: str, *, conflict: bool = False) -> None:
        """Note a problem of this file."""
        self.problems.append(Problem(self.path, line, message, hint))
        if conflict:
            self.conflicts.append(self.problems[-1])


def raise_problems(path: str | Path, problems: list[Problem], limit: int = 100) -> None:
    """Raise one ``DataError`` about ``path`` that lists ``problems`` (the first ``limit`` of them); none: return."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0].error()
    lines = [f"\n{problem.error()}" for problem in problems[:limit]]
    more = f"\n... and {len(problems) - limit} more" if len(problems) > limit else ""
    raise DataError(path, f"{len(problems)} problems:" + "".join(lines) + more)


def _undecodable(path: Path, raw: bytes, error: UnicodeDecodeError) -> tuple[str, str]:
    """(what is wrong, remedy) of a line that is not UTF-8; what Windows calls Unicode is UTF-16."""
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
    message = f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})"
    return message, f"convert it: iconv -f {encoding} -t utf8 {path} > {path}.utf8"


def read_lines(path: str | Path) -> list[str]:
    """The lines of a user's text file: UTF-8 with or without byte order mark, line ends of any system.
    Raises DataError: it cannot be read, or a line is not UTF-8."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", hint="check path and permissions") from error
    lines = []
    for number, raw in enumerate(re.split(rb"\r\n|\r|\n", content.removeprefix(BYTE_ORDER_MARK.encode())), 1):
        try:
            lines.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            message, hint = _undecodable(path, raw, error)
            raise DataError(path, message, line=number, hint=hint) from error
    return lines


def read_keys(path: str | Path, known: Mapping[str, object]) -> list[str]:
    """The first word of every line of a list, in any order; empty lines are skipped, and comments: what begins with
    ``#``, unless it is a key of ``known``. Raises as ``read_lines``."""
    words = [line.split()[0] for line in read_lines(path) if line.strip()]
    return [word for word in words if word in known or not word.startswith("#")]


def scan_table(path: str | Path, *, allow_empty: bool = False) -> Scan:
    """Read a table and list all its mistakes instead of raising; with ``allow_empty`` a key may have no value (``""``),
    as in a table of hypotheses."""
    scan = Scan(Path(path))
    try:
        content = scan.path.read_bytes()
    except FileNotFoundError:
        scan.add(None, "no such file", f"write it: one '<key> <value>' line per key; see ls {scan.path.parent}")
        return scan
    except OSError as error:
        scan.add(None, f"cannot be read ({error.strerror})", "check the path and its permissions")
        return scan
    if not content:
        scan.add(None, "the file is empty", "write it again: one '<key> <value>' line per key")
        return scan
    previous = ""
    for number, raw in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        entry = _parse_line(scan, number, raw, allow_empty)
        if entry is None:
            continue
        key, value = entry
        if key in scan.values:
            first = scan.lines[key]
            if scan.values[key] == value:
                scan.add(number, f"duplicate key {key!r}, first on line {first}", "remove one of the two lines")
            else:
                message = f"duplicate key {key!r} with another value than on line {first}"
                scan.add(number, message, "decide which line is right and remove the other", conflict=True)
            continue
        # code point order of str is the bytewise order of its UTF-8, so no encoding is needed to compare
        if key < previous:
            scan.add(number, f"not sorted: {key!r} comes after {previous!r}", SORT_HINT)
        previous = max(previous, key)
        scan.values[key], scan.lines[key] = value, number
    return scan


def _parse_line(scan: Scan, number: int, raw: bytes, allow_empty: bool) -> tuple[str, str] | None:
    """Split one line into key and value; None (and a problem noted) when it has none."""
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        scan.add(number, *_undecodable(scan.path, raw, error))
        return None
    if line.startswith(BYTE_ORDER_MARK):
        hint = f"save it as UTF-8 without one: sed -i 's/^\\xef\\xbb\\xbf//' {scan.path}"
        scan.add(number, "begins with a byte order mark", hint)
        line = line.removeprefix(BYTE_ORDER_MARK)
    line, returns = line.rstrip("\r"), line.endswith("\r")
    if "\r" in line:  # an end of a line, or part of a value
        hint = f"where they end lines: tr '\\r' '\\n' < {scan.path} > {scan.path}.unix; else remove them"
        scan.add(number, "has carriage returns within the line", hint, conflict=True)
        return None
    if returns:
        scan.add(number, "ends in a carriage return", f"convert it to Unix line ends: sed -i 's/\\r*$//' {scan.path}")
    if "\0" in line:
        scan.add(number, "contains a NUL byte", "the file was damaged while it was written; write it again")
        return None
    if not line.strip():
        scan.add(number, "empty line", "remove the line")
        return None
    if line[0].isspace():
        scan.add(number, "the key is empty (the line begins with white space)", "put the key first on the line")
        return None
    key, *rest = line.split(maxsplit=1)
    value = rest[0].rstrip() if rest else ""
    if not value and not allow_empty:
        scan.add(number, f"key {key!r} has no value", "write the value after the key, or remove the key everywhere")
        return None
    return key, value


def read_table(path: str | Path, *, allow_empty: bool = False) -> dict[str, str]:
    """Read a table into ``{key: value}``, in the order of the file; values lose white space around them.
    Raises DataError: the first mistake that ``scan_table`` lists; names the file, the line and the remedy."""
    scan = scan_table(path, allow_empty=allow_empty)
    if scan.problems:
        raise scan.problems[0].error()
    return scan.values


def one_line(text: str) -> str:
    """``text`` as a table value: runs of white space (line ends included) become one space, none around it."""
    return " ".join(text.replace("\0", " ").split())


def write_table(path: str | Path, table: Mapping[str, str]) -> None:
    """Write a table sorted by key, atomically; ``read_table(path, allow_empty=True)`` gives the same mapping back.
    Raises DataError: a key or value that would not be read back as it is (see ``one_line`` for values)."""
    lines = []
    for key in sorted(table):
        value = table[key]
        if not key or key.split() != [key] or "\0" in key or key.startswith(BYTE_ORDER_MARK):
            raise DataError(path, f"key {key!r} is empty or contains white space", hint="rename the key")
        if value != value.strip() or any(mark in value for mark in "\r\n\0"):
            hint = "pass the value through pam_espnet.data.tables.one_line"
            raise DataError(path, f"the value of {key!r} has line ends or white space around it: {value!r}", hint=hint)
        lines.append(f"{key} {value}\n" if value else f"{key}\n")
    write_text(path, "".join(lines))
