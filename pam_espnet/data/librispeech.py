"""LibriSpeech (Panayotov, Chen, Povey and Khudanpur, ICASSP 2015) in the folders that OpenSLR 12 and 31 unpack to.

    LibriSpeech/SPEAKERS.TXT                             ; a comment
                                                         61   | M | test-clean       |  8.08 | a name
    LibriSpeech/test-clean/61/70968/61-70968-0000.flac
    LibriSpeech/test-clean/61/70968/61-70968.trans.txt   61-70968-0000 HE BEGAN A CONFUSED COMPLAINT
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pam_espnet.data.tables import Problem, raise_problems
from pam_espnet.errors import DataError

SPEAKERS = "SPEAKERS.TXT"
TEST_SUBSETS = ("test-clean", "test-other")
UNPACK_HINT = "unpack the subset's archive again, all of it"


@dataclass(frozen=True)
class Published:
    """What a subset holds: number of utterances; hours as the paper's Table 1 gives them. None: not known here."""

    utterances: int | None
    hours: float | None


PUBLISHED: dict[str, Published] = {
    "train-clean-100": Published(28539, 100.6),
    "train-clean-360": Published(104014, 363.6),
    "train-other-500": Published(148688, 496.7),
    "dev-clean": Published(2703, 5.4),
    "dev-other": Published(2864, 5.3),
    "test-clean": Published(2620, 5.4),
    "test-other": Published(2939, 5.1),
    # Mini LibriSpeech (OpenSLR 31), parts of train-clean-100 and dev-clean; its page gives no numbers
    "train-clean-5": Published(None, None),
    "dev-clean-2": Published(None, None),
}
HOURS_TOLERANCE = 0.02  # of the published hours, which have three digits


@dataclass(frozen=True)
class Speaker:
    """A line of SPEAKERS.TXT; ``sex`` is F or M, ``subset`` a part of the whole LibriSpeech."""

    id: str
    sex: str
    subset: str


@dataclass(frozen=True)
class Spoken:
    """One utterance; ``text`` as the corpus has it, in capitals."""

    key: str
    speaker: str
    path: str
    text: str


def find_root(folder: str | Path, subsets: Iterable[str]) -> Path:
    """The folder that holds ``subsets``: ``folder`` itself or ``folder/LibriSpeech``.

    Raises:
        DataError: no such folder, or a subset is not there; says what is.
    """
    folder, wanted = Path(folder), list(subsets)
    if not folder.is_dir():
        raise DataError(folder, "no such folder", hint="name the folder that holds LibriSpeech/ or its subsets")
    candidates = (folder, folder / "LibriSpeech")
    there = {root: [name for name in wanted if (root / name).is_dir()] for root in candidates}
    root = max(candidates, key=lambda candidate: (len(there[candidate]), (candidate / SPEAKERS).is_file()))
    if missing := [name for name in wanted if name not in there[root]]:
        found = [name for name in PUBLISHED if (root / name).is_dir()]
        inside = f"of LibriSpeech it has {', '.join(found)}" if found else "nothing of LibriSpeech is in it"
        hint = (
            f"name the folder that holds LibriSpeech/{missing[0]} or {missing[0]}, unpack {missing[0]}.tar.gz there, "
            "or choose another --size"
        )
        raise DataError(root, f"has no {', '.join(missing)}; {inside}", hint=hint)
    return root


def read_speakers(root: str | Path) -> dict[str, Speaker]:
    """SPEAKERS.TXT of ``root``: {speaker: line}.

    Raises:
        DataError: it is not there, or a line that cannot be understood.
    """
    path = Path(root) / SPEAKERS
    if not path.is_file():
        raise DataError(path, "no such file", hint=f"every archive of LibriSpeech has it: copy it to {path.parent}")
    speakers: dict[str, Speaker] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith(";"):
            continue
        parts = [part.strip() for part in line.split("|", 4)]  # names have bars in them, too
        if len(parts) < 4 or not parts[0].isdigit() or parts[1] not in ("F", "M"):
            message = f"not a line of the form 'id | F or M | subset | minutes | name': {line!r}"
            raise DataError(path, message, line=number, hint="take the file out of the archive again")
        speakers[parts[0]] = Speaker(parts[0], parts[1], parts[2])
    if not speakers:
        raise DataError(path, "lists no speaker", hint="take the file out of the archive again")
    return speakers


def read_subset(root: str | Path, subset: str) -> list[Spoken]:
    """All utterances of a subset, sorted by key.

    Raises:
        DataError: lists recordings without a transcript, transcripts without a recording, and malformed lines.
    """
    found: list[Spoken] = []
    problems: list[Problem] = []
    for speaker in sorted(Path(root, subset).iterdir()):
        if not speaker.is_dir():
            continue
        for chapter in sorted(speaker.iterdir()):
            if chapter.is_dir():
                found += _read_chapter(speaker.name, chapter, problems)
    raise_problems(Path(root, subset), problems)
    if not found:
        raise DataError(Path(root, subset), "has no utterance", hint=UNPACK_HINT)
    return sorted(found, key=lambda utterance: utterance.key)


def _read_chapter(speaker: str, chapter: Path, problems: list[Problem]) -> list[Spoken]:
    """The utterances of one chapter; what is wrong is added to ``problems``."""
    name = f"{speaker}-{chapter.name}"
    transcripts = chapter / f"{name}.trans.txt"
    audio = {entry.name.removesuffix(".flac") for entry in os.scandir(chapter) if entry.name.endswith(".flac")}
    if not transcripts.is_file():
        problems.append(Problem(transcripts, None, "no such file", UNPACK_HINT))
        return []
    texts: dict[str, str] = {}
    for number, line in enumerate(transcripts.read_text(encoding="utf-8").splitlines(), 1):
        key, _, text = line.partition(" ")
        if re.fullmatch(rf"{re.escape(name)}-\d+", key) is None or not text.strip():
            problems.append(Problem(transcripts, number, f"not '{name}-NUMBER WORDS': {line!r}", UNPACK_HINT))
            continue
        if key not in audio:
            problems.append(Problem(transcripts, number, f"there is no {key}.flac beside it", UNPACK_HINT))
        texts[key] = " ".join(text.split())
    for key in sorted(audio - texts.keys()):
        hint = f"{UNPACK_HINT}; or delete {key}.flac"
        problems.append(Problem(transcripts, None, f"has no line for {key}.flac", hint))
    return [Spoken(key, speaker, str(chapter / f"{key}.flac"), texts[key]) for key in sorted(audio & texts.keys())]


def flac_seconds(path: str | Path) -> float:
    """Duration of a FLAC file from its first 42 bytes.

    Raises:
        DataError: it is no FLAC file, or its header does not say how long it is.
    """
    with open(path, "rb") as file:
        head = file.read(42)
    if len(head) < 42 or head[:4] != b"fLaC" or head[4] & 0x7F != 0:
        raise DataError(path, "is not a FLAC file, or cut short", hint=UNPACK_HINT)
    rate = int.from_bytes(head[18:21], "big") >> 4
    samples = int.from_bytes(head[21:26], "big") & ((1 << 36) - 1)
    if not rate or not samples:
        raise DataError(path, "its header gives no duration", hint=UNPACK_HINT)
    return samples / rate


def durations(utterances: Sequence[Spoken], jobs: int = 1) -> dict[str, float]:
    """{key: seconds}, from the headers; ``jobs`` threads, because a network disk answers slowly."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(
            zip(
                [utterance.key for utterance in utterances],
                pool.map(flac_seconds, [utterance.path for utterance in utterances], chunksize=256),
                strict=True,
            )
        )


def count_differences(found: Mapping[str, tuple[int, float]]) -> list[str]:
    """What differs from the published numbers, one sentence each; ``found``: {subset: (utterances, hours)}."""
    said = []
    for subset, (utterances, hours) in found.items():
        published = PUBLISHED[subset]
        if published.utterances is not None and utterances != published.utterances:
            said.append(f"{subset} has {utterances} utterances, published are {published.utterances}")
        if published.hours is not None and abs(hours - published.hours) > HOURS_TOLERANCE * published.hours:
            said.append(f"{subset} has {hours:.2f} hours, published are {published.hours}")
    return said


def check_counts(root: str | Path, found: Mapping[str, tuple[int, float]], strict: bool) -> list[str]:
    """Compare numbers of utterances and hours with the published ones; return the differences.

    Raises:
        DataError: they differ, and ``strict``.
    """
    said = count_differences(found)
    if said and strict:
        listed = "".join(f"\n  {sentence}" for sentence in said)
        hint = "unpack the archives again; or, to go on with what is there, --check_counts false"
        raise DataError(root, f"is not the whole corpus:{listed}", hint=hint)
    return said
