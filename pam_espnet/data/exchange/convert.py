"""One row as one utterance: key, recording, answer, question, task, speaker; or the reason why it is left out."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from pam_espnet.data.audio_ark import locate
from pam_espnet.data.datadir import MAX_KEY_BYTES
from pam_espnet.data.exchange.json_files import decode_base64
from pam_espnet.data.exchange.rows import NO_AUDIO, Row, Source
from pam_espnet.data.prompts import draw_prompt
from pam_espnet.data.tables import one_line
from pam_espnet.data.tasks import TASKS
from pam_espnet.errors import ConfigError


@dataclass
class Converter:
    """Rows to records of the import's journal; knows which keys were given.

    Attributes:
        source: what is read.
        task: of rows that have none; "" if they must.
        prompts: wordings for rows without a prompt: each key draws one. Empty: the task's default prompt.
        seed: of the draws.
        audio_root: where relative paths of recordings start.
        keys: {key: where it was given}.
    """

    source: Source
    task: str = ""
    prompts: list[str] = field(default_factory=list)
    seed: int = 0
    audio_root: Path = Path()
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError: no such task."""
        if self.task and self.task not in TASKS:
            raise ConfigError(f"--task {self.task}: no such task; there are {', '.join(TASKS)}")

    def convert(self, row: Row) -> dict[str, Any]:
        """``utt``, ``text``, ``prompt``, ``task``, ``speaker``, optional ``references``, ``start``, ``end``,
        ``duration`` (seconds), ``note``, and the recording: ``wav`` (path) or ``audio`` (bytes of a file); else
        ``left_out``, with ``utt`` where only the recording is the matter."""
        record: dict[str, Any] = {"where": row.where}
        try:
            if row.problem and not row.problem.startswith(NO_AUDIO):
                raise ValueError(row.problem)
            record |= self._words(row)
            wav, audio = self._recording(row)
            piece = self._piece(row)
            record["utt"] = key = self._key(row, wav, piece)
            record["prompt"] = record["prompt"] or self._prompt(record["task"], key)
            record["speaker"] = record["speaker"].replace(" ", "_") or key
        except ValueError as error:
            return {"where": row.where, "left_out": one_line(str(error))}
        self.keys[key] = row.where
        reason = row.problem or ("" if audio is not None else _missing(wav))
        if reason:
            return {"where": row.where, "utt": key, "left_out": one_line(reason)}
        record |= piece | ({"audio": audio} if audio is not None else {"wav": wav})
        return record | ({"note": row.note} if row.note else {})

    def _words(self, row: Row) -> dict[str, Any]:
        """text, prompt, task, speaker and references; prompt and speaker may be ""."""
        texts = self.source.value(row, "text")
        references = self.source.value(row, "references")
        answers = [_text(answer, "text") for answer in (texts if isinstance(texts, list) else [texts])]
        if not answers or not answers[0]:
            raise ValueError("no text")
        record: dict[str, Any] = {"text": answers[0]}
        if references is not None or len(answers) > 1:
            several = references if isinstance(references, list) else answers if references is None else [references]
            record["references"] = [text for answer in several if (text := _text(answer, "references"))] or answers[:1]
        record["task"] = _text(self.source.value(row, "task"), "task") or self.task
        if record["task"] not in TASKS:
            known = ", ".join(TASKS)
            raise ValueError(f"task {record['task']!r} is none of {known}" if record["task"] else "no task: see --task")
        for name in ("prompt", "speaker"):
            record[name] = _text(self.source.value(row, name), name)
        return record

    def _recording(self, row: Row) -> tuple[str, bytes | None]:
        """(absolute path or "", bytes of a file or None)."""
        value = self.source.value(row, "audio")
        name = value
        if isinstance(value, dict):
            name = value.get("path") or ""
            if value.get("bytes"):
                return str(name), value["bytes"]
            if "array" in value:
                raise ValueError("its audio is an array of samples; files are what is taken")
        if isinstance(value, bytes):
            return "", value
        if isinstance(value, list):
            raise ValueError(f"has {len(value)} recordings; one is what is taken")
        if not isinstance(name, str | None):
            raise ValueError(f"its audio is of type {type(name).__name__}")
        if not name:
            return "", None
        if name.startswith("data:"):
            return "", decode_base64(name.partition(",")[2])
        name = name.removeprefix("file://").strip()
        if name.endswith("|"):
            raise ValueError("its audio is a command, which is not run: run it and name the file that it makes")
        if re.match(r"[a-z][a-z0-9+]+://", name):
            raise ValueError("its audio is an address, which is not fetched: download it and name the file")
        if "\n" in name or "\r" in name or "\0" in name:
            raise ValueError("the name of its file has a line end in it")
        return os.path.abspath(self.audio_root / name), None

    def _piece(self, row: Row) -> dict[str, float]:
        """start, end and duration in seconds, as far as the row has them."""
        found: dict[str, float] = {}
        for name in ("start", "end", "duration"):
            if (value := self.source.value(row, name)) is not None:
                try:
                    found[name] = float(value)
                except (TypeError, ValueError):
                    raise ValueError(f"{name} {value!r} is not a number of seconds") from None
        if not found.get("duration", 1) > 0 and "start" not in found:  # NeMo's -1: not known
            del found["duration"]
        if "end" in found or "start" in found:
            found.setdefault("start", 0.0)
            if "end" not in found and "duration" in found:
                found["end"] = found["start"] + found["duration"]
            if not 0 <= found["start"] < found.get("end", math.nan) < math.inf:
                raise ValueError(f"needs 0 <= start < end, found {found['start']} and {found.get('end')}")
        return found

    def _key(self, row: Row, wav: str, piece: Mapping[str, float]) -> str:
        """The row's id, or a key made of its recording's name, numbered where there are several of it."""
        given = _text(self.source.value(row, "id"), "id")
        key = make_key(given)
        if given:
            if key in self.keys:
                raise ValueError(f"the id {given!r} is that of {self.keys[key]}")
            return key
        name, root = os.path.splitext(wav)[0], os.path.join(os.path.abspath(self.audio_root), "")
        key = make_key(name.removeprefix(root) if name.startswith(root) else os.path.basename(name))
        key = key or make_key(row.where)
        if "start" in piece:
            key += "".join(f"-{round(1000 * piece[name]):07d}" for name in ("start", "end"))
        return next(new for new in _numbered(key) if new not in self.keys)

    def _prompt(self, task: str, key: str) -> str:
        return draw_prompt(self.prompts, key, self.seed) if self.prompts else TASKS[task].default_prompt


def make_key(text: str) -> str:
    """``text`` as the key of an utterance, which is also a file name: slashes become dashes, white space underlines."""
    key = re.sub(r"[/\\]+", "-", re.sub(r"\s+", "_", text.strip())).lstrip(".-\ufeff").replace("\0", "")
    while len(key.encode()) > MAX_KEY_BYTES - 40:  # room for times and a number
        key = key[1:]
    return key


def _numbered(key: str) -> Iterator[str]:
    yield key
    yield from (f"{key}-{number}" for number in count(2))


def _text(value: Any, name: str) -> str:
    """A value as one line; ValueError: it is neither text nor a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"its {name} is of type {type(value).__name__}")
    return one_line(str(value))


def _missing(wav: str) -> str:
    """Why there is no file, or ""."""
    if not wav:
        return f"{NO_AUDIO}the row has no audio"
    return "" if os.path.isfile(locate(wav)[0]) else f"{NO_AUDIO}no file {wav}"
