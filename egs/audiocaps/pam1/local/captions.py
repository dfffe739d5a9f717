"""The official AudioCaps CSVs: one row per caption, read into clips with their captions.

    train.csv, val.csv, test.csv     audiocap_id,youtube_id,start_time,caption

Both releases have these columns. What is known to differ: 49,838 captions in train.csv of release 1 and 91,256 in that
of 2.0; both have 2,475 in val.csv (495 clips) and 4,875 in test.csv (975 clips), five to a clip. Release 2.0 writes
most captions in lower case. The releases lie in the folders ``dataset`` and ``dataset2.0`` of the official repository.
Nothing here reads audio.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pam_espnet.data.tables import one_line
from pam_espnet.errors import ConfigError, DataError

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
FILES = {"train": "train.csv", "dev": "val.csv", "test": "test.csv"}
CAPTIONS = {"train": 1, "dev": 5, "test": 5}  # to a clip
CLIP_SECONDS = 10
_VIDEO = re.compile(r"[A-Za-z0-9_-]{11}", re.ASCII)


@dataclass(frozen=True)
class Release:
    """A release of the captions: its folder in the official repository, and rows per file."""

    folder: str
    rows: dict[str, int]


RELEASES = {
    1: Release("dataset", {"train": 49838, "dev": 2475, "test": 4875}),
    2: Release("dataset2.0", {"train": 91256, "dev": 2475, "test": 4875}),
}


@dataclass(frozen=True)
class Clip:
    """Ten seconds of a video and their captions.

    Attributes:
        key: the utterance, ``Y<youtube_id>_<start>`` (an id may begin with a dash, which a key must not).
        video: the youtube_id.
        start: seconds.
        ids: the audiocap_id of each caption.
        captions: in the order of the file.
    """

    key: str
    video: str
    start: int
    ids: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class _Row:
    line: int
    identity: str
    video: str
    start: int
    caption: str


def release(version: int) -> Release:
    """The release by number.

    Raises:
        ConfigError: there is no such release.
    """
    if version not in RELEASES:
        option = "--size v1 or v2; of the multitask recipe --captions"
        raise ConfigError(f"release {version}: AudioCaps has releases 1 and 2 ({option})")
    return RELEASES[version]


def csv_folder(folder: str | Path, version: int) -> Path:
    """Where the CSVs are: ``folder`` itself, or the release's folder in it (a clone of the official repository).

    Raises:
        DataError: neither holds them.
    """
    wanted = release(version).folder
    for candidate in (Path(folder), Path(folder) / wanted):
        if all((candidate / name).is_file() for name in FILES.values()):
            return candidate
    names = ", ".join(FILES.values())
    raise DataError(
        folder,
        f"does not hold {names}, and neither does {wanted}/ in it",
        hint="git clone https://github.com/cdjkim/audiocaps downloads/audiocaps, or name the folder with --csv",
    )


def read_release(folder: str | Path, version: int) -> dict[str, list[Clip]]:
    """Clips of train, dev and test, in the order of their first captions; prints what is not as published.

    A training clip is a row; rows of one clip get their audiocap_id into the key, should there be any. A training clip
    whose video is in val.csv or test.csv is left out.

    Raises:
        DataError: a file is missing, has other columns, or a row that cannot be used; names the file and the line.
    """
    folder = csv_folder(folder, version)
    rows = {name: _read_rows(folder / file) for name, file in FILES.items()}
    _check_counts(folder, rows, version)
    clips = {name: _group(rows[name], one_row_each=CAPTIONS[name] == 1) for name in FILES}
    held_out = {clip.video for name in ("dev", "test") for clip in clips[name]}
    kept = [clip for clip in clips["train"] if clip.video not in held_out]
    if len(kept) < len(clips["train"]):
        left = len(clips["train"]) - len(kept)
        print(f"{folder / FILES['train']}: {left} clips are of videos in val.csv or test.csv: left out of training")
    clips["train"] = kept
    for name in ("dev", "test"):
        counts = Counter(len(clip.captions) for clip in clips[name] if len(clip.captions) != CAPTIONS[name])
        for number, times in sorted(counts.items()):
            print(f"{folder / FILES[name]}: {times} clips have {number} captions instead of {CAPTIONS[name]}")
    return clips


def _read_rows(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    lines: dict[str, int] = {}
    empty = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if missing := [name for name in COLUMNS if name not in header]:
                raise DataError(
                    path,
                    f"has no column {', '.join(missing)}; the columns found are: {', '.join(header) or 'none'}",
                    line=1,
                    hint=f"the official files have {','.join(COLUMNS)}; take them as they are",
                )
            columns = [header.index(name) for name in COLUMNS]
            for fields in reader:
                if not fields:
                    continue
                row = _parse(path, reader.line_num, fields, len(header), columns)
                if row.identity in lines:
                    message = f"audiocap_id {row.identity} is on line {lines[row.identity]} already"
                    raise DataError(path, message, line=row.line, hint="remove one of the two rows")
                lines[row.identity] = row.line
                if row.caption:
                    rows.append(row)
                else:
                    empty += 1
    except UnicodeDecodeError as error:
        raise DataError(path, f"is not UTF-8 ({error.reason})", hint="download it again") from error
    except csv.Error as error:
        raise DataError(path, f"is not CSV: {error}", line=reader.line_num, hint="download it again") from error
    if not rows:
        raise DataError(path, "has no captions", hint="download it again")
    if empty:
        print(f"{path}: {empty} rows have no caption: left out")
    return rows


def _parse(path: Path, line: int, fields: list[str], width: int, columns: list[int]) -> _Row:
    if len(fields) != width:
        message = f"has {len(fields)} fields, and the first line names {width}"
        raise DataError(path, message, line=line, hint="is the file whole? download it again")
    identity, video, start, caption = (fields[column].strip() for column in columns)
    if not identity.isdigit():
        raise DataError(path, f"audiocap_id {identity!r} is not a number", line=line, hint="take the official file")
    if not _VIDEO.fullmatch(video):
        hint = "a spreadsheet program may have changed it: take the official file as it is"
        raise DataError(path, f"youtube_id {video!r} is not the id of a video", line=line, hint=hint)
    if not re.fullmatch(r"\d+(\.0*)?", start):
        raise DataError(path, f"start_time {start!r} is not in whole seconds", line=line, hint="take the official file")
    return _Row(line, identity, video, int(float(start)), one_line(caption))


def _group(rows: list[_Row], one_row_each: bool) -> list[Clip]:
    groups: dict[tuple[str, int], list[_Row]] = {}
    for row in rows:
        groups.setdefault((row.video, row.start), []).append(row)
    clips = []
    for (video, start), group in groups.items():
        key = f"Y{video}_{start}"
        ids, captions = tuple(row.identity for row in group), tuple(row.caption for row in group)
        if one_row_each and len(group) > 1:
            clips += [Clip(f"{key}_{i}", video, start, (i,), (c,)) for i, c in zip(ids, captions, strict=True)]
        else:
            clips.append(Clip(key, video, start, ids, captions))
    return clips


def _check_counts(folder: Path, rows: dict[str, list[_Row]], version: int) -> None:
    """Print where the number of captions is not the published one.

    Raises:
        DataError: train.csv has as many as that of the other release.
    """
    for name, file in FILES.items():
        found, expected = len(rows[name]), release(version).rows[name]
        if found == expected:
            continue
        for other, known in RELEASES.items():
            if other != version and found == known.rows[name]:
                message = f"has {found} captions: those of release {other}, not {version}"
                hint = f"--size v{other} (multitask: --captions v{other}), or the files of release {version}"
                raise DataError(folder / file, message, hint=hint)
        print(f"{folder / file}: {found} captions, and release {version} has {expected}: not the whole official file")
