"""Files of the clips: folders searched for the names that people give to AudioCaps clips."""

import os
from collections.abc import Sequence
from pathlib import Path

from captions import Clip

from pam_espnet.errors import DataError

# In the order of preference, where one clip is there twice.
SUFFIXES = (".flac", ".wav", ".m4a", ".webm", ".opus", ".ogg", ".mp3", ".mp4", ".mka", ".mkv", ".aac")
NAMES = "<youtube_id>_<start>, Y<youtube_id>_<start>, <youtube_id>, Y<youtube_id> or <audiocap_id>"


def index_audio(folders: Sequence[str | Path]) -> dict[str, Path]:
    """File name without suffix -> file, of all audio files at any depth; an earlier folder goes before a later one.

    Raises:
        DataError: a folder is not there, or has no audio file.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise DataError(folder, "no such folder", hint="name the folder that holds the clips: --audio DIR")
        own: dict[str, Path] = {}
        for root, subfolders, files in os.walk(folder, followlinks=True):
            subfolders.sort()
            for name in sorted(files):
                stem, suffix = os.path.splitext(name)
                suffix = suffix.lower()
                if suffix not in SUFFIXES or name.startswith("."):
                    continue
                known = own.get(stem)
                if known is None or SUFFIXES.index(suffix) < SUFFIXES.index(known.suffix.lower()):
                    own[stem] = Path(root) / name
        if not own:
            hint = f"clips are files named {NAMES}, with one of the suffixes {' '.join(SUFFIXES)}"
            raise DataError(folder, "holds no audio files", hint=hint)
        found = {**own, **found}
    return found


def index_clips(folders: Sequence[str | Path], hosted: Path | None) -> dict[str, Path]:
    """``index_audio`` of ``folders``, and what hosted.py put into archives: a folder's file goes before a record."""
    from pam_espnet.data.exchange.writer import JOURNAL_NAME, read_journal

    journals = sorted(hosted.glob(f"*/{JOURNAL_NAME}")) if hosted is not None else []
    records = [record for journal in journals for record in read_journal(journal)]
    found = {record["utt"]: Path(record["wav"]) for record in records if "utt" in record}
    return {**found, **index_audio(folders)}


def find_clip(clip: Clip, files: dict[str, Path]) -> Path | None:
    """The file of a clip, by the names of ``NAMES`` in that order; None where there is none."""
    dated = f"{clip.video}_{clip.start}"
    for stem in (dated, f"Y{dated}", clip.video, f"Y{clip.video}", *clip.ids):
        if stem in files:
            return files[stem]
    return None
