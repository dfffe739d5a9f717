"""Manifests for other toolkits, made of data directories: conversations as ms-swift and LLaMA-Factory read them, and
NeMo's. ``sources`` reads both back into the same tables.

Files are named by their absolute paths. What is no file of its own (a record of an archive, a piece of a recording) is
written to a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pam_espnet.data.audio import read_audio
from pam_espnet.data.audio_ark import locate, read_record
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.edit import NUM_SAMPLES
from pam_espnet.data.exchange.json_files import AUDIO_TAG
from pam_espnet.data.passport import Passport
from pam_espnet.data.pcm import to_pcm16, write_audio
from pam_espnet.data.tables import read_table
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.fileio import atomic_path

# How files of recordings begin, and the suffix by which others' readers know them.
_SUFFIXES = ((b"fLaC", ".flac"), (b"RIFF", ".wav"), (b"OggS", ".ogg"), (b"ID3", ".mp3"), (b"\xff", ".mp3"))


@dataclass
class Recordings:
    """The recordings of a data directory as files; ``folder``: for those that are written, or None.

    ``seconds`` are the durations where stage 2 has measured them.
    """

    data: DataDir
    folder: Path | None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.data.path / NUM_SAMPLES).is_file():
            rate = Passport.load(self.data.path).sample_rate
            self.seconds = {utt: int(n) / rate for utt, n in read_table(self.data.path / NUM_SAMPLES).items()}

    def whole(self, utt: str) -> str:
        """A file with the utterance and nothing else."""
        value, start, end = self.data.source(utt)
        if start is None:
            return self.file(utt, value)
        path = self._target(utt).with_suffix(".flac")
        if not path.exists():
            wave, rate = read_audio(value, start=start, end=end)
            write_audio(path, to_pcm16(wave)[0], rate, "flac")
        return str(path)

    def file(self, key: str, value: str) -> str:
        """The file that a value of wav.scp names, written under the name ``key`` if it is in an archive.
        Raises DataError: the value is a command, or the audio is not there."""
        path, offset = locate(value)
        if value.endswith("|"):
            raise DataError(value, "is a command", hint="run stage 2 and export what it wrote")
        if offset is None:
            if not os.path.isfile(path):
                raise DataError(value, "no such audio file", hint="relative paths start at the current directory")
            return os.path.abspath(path)
        content = read_record(value)
        suffix = next((suffix for begin, suffix in _SUFFIXES if content.startswith(begin)), ".audio")
        target = self._target(key).with_suffix(suffix)
        if not target.exists():
            with atomic_path(target) as tmp:
                tmp.write_bytes(content)
        return str(target)

    def _target(self, key: str) -> Path:
        if self.folder is None:
            raise ConfigError(f"{key} is no file of its own\n  -> name a folder to write recordings to: --audio DIR")
        return Path(os.path.abspath(self.folder)) / f"{key}.x"  # keys may have dots: a suffix to be replaced


def messages_row(data: DataDir, recordings: Recordings, utt: str) -> dict[str, Any]:
    """A conversation of one question and one answer."""
    question = {"role": "user", "content": f"{AUDIO_TAG}{data.prompt[utt]}"}
    answer = {"role": "assistant", "content": data.text[utt]}
    return {"messages": [question, answer], "audios": [recordings.whole(utt)]}


def nemo_row(data: DataDir, recordings: Recordings, utt: str) -> dict[str, Any]:
    """A line of NeMo's manifests; a piece of a recording has ``offset``."""
    value, start, end = data.source(utt)
    if start is None or end is None:
        piece = {"duration": recordings.seconds.get(utt) or _seconds(value)}
    else:
        piece = {"offset": start, "duration": end - start}
    key = utt if data.segments is None else data.segments[utt].recording
    return {"audio_filepath": recordings.file(key, value), **piece, "text": data.text[utt], "prompt": data.prompt[utt]}


def _seconds(value: str) -> float:
    wave, rate = read_audio(value)
    return len(wave) / rate


KINDS: dict[str, Callable[[DataDir, Recordings, str], dict[str, Any]]] = {"messages": messages_row, "nemo": nemo_row}


def export(data: DataDir, out: str | Path, kind: str, folder: str | Path | None = None) -> dict[str, str]:
    """Write the manifest ``out``, a JSON object per line, whole or not at all.

    Args:
        kind: one of ``KINDS``.
        folder: where recordings go that are no files of their own.

    Returns:
        {utterance: why it was left out}.

    Raises ConfigError: ``folder`` is needed; DataError: nothing could be exported.
    """
    recordings = Recordings(data, None if folder is None else Path(folder))
    left_out: dict[str, str] = {}
    with atomic_path(out) as tmp, open(tmp, "w", encoding="utf-8") as file:
        for row in _rows(data, recordings, kind, left_out):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if len(left_out) == len(data):
            utt, reason = next(iter(left_out.items()))
            raise DataError(data.path, f"no utterance could be exported; {utt}: {reason}", hint="repair wav.scp")
    return left_out


def _rows(data: DataDir, recordings: Recordings, kind: str, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    for utt in tqdm(data.utterances, desc=f"export {data.path.name}"):
        try:
            row = KINDS[kind](data, recordings, utt)
        except DataError as error:
            left_out[utt] = str(error).splitlines()[0]
            continue
        row |= {"id": utt, "task": data.utt2task[utt], "speaker": data.utt2spk[utt]}
        yield row | ({} if data.references is None else {"references": data.references.get(utt, [])})
