"""Manifests in JSON: lines (also gzipped) or one array, in the kinds of ms-swift and LLaMA-Factory (``messages`` and
``audios``) and of NeMo (``audio_filepath``, ``text``, ``offset``, ``duration``). Read one row at a time."""

from __future__ import annotations

import base64
import binascii
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from pam_espnet.data.exchange.lhotse_cuts import CUTS, check_lhotse, read_cut
from pam_espnet.data.exchange.rows import USUAL, Row, Source, file_stamp
from pam_espnet.errors import DataError

BLOCK = 1 << 16  # characters read at once from an array
AUDIO_TAG = "<audio>"
_USERS, _ANSWERS = ("user", "human"), ("assistant", "gpt")
_NEMO = {**USUAL, "start": ("offset",), "duration": ("duration",)}
# as ``read_messages`` and ``lhotse_cuts`` make them
ENTRIES = {**USUAL, **{name: (name,) for name in ("audio", "text", "prompt", "start", "end")}}
CONVERSATIONS = {"messages", "conversations", "query"}


def open_json(path: Path) -> Source:
    """The manifest ``path``; its kind is found by the keys of its first row.
    Raises DataError: no rows, or they are of no kind known here."""
    first = next((row for row in read_json_rows(path) if not row.problem), Row(""))
    keys = first.values.keys()
    stamp = file_stamp([path])

    def read(state: Any, skip: int) -> Iterator[Row]:
        return islice(read_json_rows(path), skip, None)

    def conversations(state: Any, skip: int) -> Iterator[Row]:
        return map(read_messages, read(state, skip))

    if keys & CONVERSATIONS:
        return Source(str(path), path.parent, stamp, conversations, ENTRIES)
    if str(first.values.get("type")) in CUTS:
        check_lhotse()

        def cuts(state: Any, skip: int) -> Iterator[Row]:
            return islice(chain.from_iterable(map(read_cut, read_json_rows(path))), skip, None)

        # relative paths start at the current folder, as lhotse's do
        return Source(str(path), Path(), stamp, cuts, ENTRIES)
    if "audio_filepath" in keys:
        return Source(str(path), path.parent, stamp, read, _NEMO)
    if any(keys & set(USUAL[name]) for name in ("audio", "text")):
        return Source(str(path), path.parent, stamp, read)
    found = f"the keys of its first row are {', '.join(keys)}" if keys else "it has no row that can be read"
    hint = "rows have messages and audios, or audio_filepath and text, or supervisions (lhotse's cuts)"
    raise DataError(path, f"is no manifest of a known kind: {found}", hint=hint)


def read_json_rows(path: Path) -> Iterator[Row]:
    """Rows of a file of JSON lines or of one JSON array; those that are no objects come as problems.
    Raises DataError: an array that is broken, and text that is not UTF-8: nothing behind that place can be found."""
    with open(path, "rb") as raw:
        unpacked = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        file = io.TextIOWrapper(unpacked, encoding="utf-8-sig")
        try:
            lead = file.read(1)
            while lead.isspace():
                lead = file.read(1)
            yield from _read_array(path, file) if lead == "[" else _read_lines(path, file, lead)
        except UnicodeDecodeError as error:
            raise DataError(path, f"is not UTF-8 ({error.reason})", hint="convert it: iconv -t utf-8") from error
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(path, f"cannot be unpacked ({error})", hint="copy or download it again") from error


def _read_lines(path: Path, file: IO[str], lead: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = lead + line
        if not line.strip():
            continue
        try:
            yield _row(f"line {number}", json.loads(line))
        except json.JSONDecodeError as error:
            yield Row(f"line {number}", problem=f"not JSON: {error.msg} at column {error.colno}")


def _read_array(path: Path, file: IO[str]) -> Iterator[Row]:
    """The elements of an array whose bracket has been read."""
    decoder, text, number = json.JSONDecoder(), "", 0
    while True:
        text = text.lstrip().removeprefix(",").lstrip() if number else text.lstrip()
        if text.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            more = file.read(max(BLOCK, len(text)))  # twice as much each time, so that a long element is read in few
            if not more:
                hint = "repair it, or write one object per line, which can be read around a broken one"
                raise DataError(
                    path, f"element {number + 1} of the array is not JSON: {error.msg}", hint=hint
                ) from error
            text += more
            continue
        if not isinstance(value, dict | list | str) and end == len(text) and (more := file.read(BLOCK)):
            text += more  # a number may go on
            continue
        number += 1
        yield _row(f"element {number}", value)
        text = text[end:]


def _row(where: str, value: Any) -> Row:
    return Row(where, value) if isinstance(value, dict) else Row(where, problem="not a JSON object")


# ---- conversations --------------------------------------------------------------------------------------------------


def read_messages(row: Row) -> Row:
    """A conversation as audio, prompt and text beside its other keys. What cannot be one question with one answer about
    one recording comes as a problem.

    Taken are ``messages`` (role, content), ``conversations`` (from, value) and ``query`` with ``response``; recordings
    are in ``audios``, or in a content's list of parts as chat templates and OpenAI's clients have them.
    """
    if row.problem:
        return row
    try:
        values, note = _one_question(row.values)
    except ValueError as error:
        return replace(row, problem=str(error))
    return replace(row, values=values, note=note)


def _one_question(row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    turns = row.get("messages") or row.get("conversations")
    if turns is None:
        turns = [{"role": "user", "content": row.get("query")}, {"role": "assistant", "content": row.get("response")}]
        turns = [{"role": "user", "content": part} for pair in row.get("history") or () for part in pair] + turns
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("its messages are not a list of objects")
    said: dict[str, list[str]] = {"user": [], "assistant": [], "system": []}
    audios = row.get("audios") or row.get("audio") or []
    audios = list(audios) if isinstance(audios, list) else [audios]
    for turn in turns:
        role = str(turn.get("role", turn.get("from")))
        role = "user" if role in _USERS else "assistant" if role in _ANSWERS else role
        text, found = _content(turn.get("content", turn.get("value")))
        audios += found
        said.setdefault(role, []).append(text.replace(AUDIO_TAG, " ").strip())
    if others := sorted(role for role in said if role not in ("user", "assistant", "system")):
        raise ValueError(f"has a message of {others[0]!r}; a question of the user and an answer are what is taken")
    if (len(said["user"]), len(said["assistant"])) != (1, 1):
        questions, answers = len(said["user"]), len(said["assistant"])
        raise ValueError(f"has {questions} questions and {answers} answers; one of each is what is taken")
    if len(audios) != 1:
        raise ValueError(f"has {len(audios)} recordings; one is what is taken")
    rest = {key: value for key, value in row.items() if key not in ("messages", "conversations", "audios", "text")}
    note = "a system message is not kept" if any(said["system"]) or row.get("system") else ""
    return {**rest, "audio": audios[0], "prompt": said["user"][0], "text": said["assistant"][0]}, note


def _content(content: Any) -> tuple[str, list[Any]]:
    """Text and recordings of a message; ValueError: what is wrong with it."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError("the content of a message is neither text nor a list of parts")
    texts: list[str] = []
    audios: list[Any] = []
    for part in content:
        kind = str(part.get("type"))
        inside = part.get(kind)
        if kind == "text":
            texts.append(str(part.get("text", "")))
        elif "audio" not in kind:
            raise ValueError(f"a message has a part of type {kind!r}; text and audio are what is taken")
        elif isinstance(inside, dict) and "data" in inside:  # OpenAI: {"data": base64, "format": "wav"}
            audios.append({"bytes": decode_base64(inside["data"])})
        elif isinstance(inside, dict):
            audios.append(inside.get("url") or inside.get("path"))
        else:
            audios.append(inside or part.get("audio") or part.get("path") or part.get("url"))
    return " ".join(texts), audios


def decode_base64(text: str) -> bytes:
    """Bytes; ValueError: not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its audio is not base64 ({error})") from error
