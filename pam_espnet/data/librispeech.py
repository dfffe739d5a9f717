"""LibriSpeech (Panayotov, Chen, Povey and Khudanpur, ICASSP 2015) in the folders that OpenSLR 12 and 31 unpack to.

LibriSpeech/SPEAKERS.TXT                             ; a comment
                                                     61   | M | test-clean       |  8.08 | a name
LibriSpeech/test-clean/61/70968/61-70968-0000.flac
LibriSpeech/test-clean/61/70968/61-70968.trans.txt   61-70968-0000 HE BEGAN A CONFUSED COMPLAINT
"""

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
# Utterances of a subset, and hours as the paper's Table 1 gives them; None: not known here.
PUBLISHED: dict[str, tuple[int | None, float | None]] = {
    "train-clean-100": (28539, 100.6),
    "train-clean-360": (104014, 363.6),
    "train-other-500": (148688, 496.7),
    "dev-clean": (2703, 5.4),
    "dev-other": (2864, 5.3),
    "test-clean": (2620, 5.4),
    "test-other": (2939, 5.1),
    # Mini LibriSpeech (OpenSLR 31), parts of train-clean-100 and dev-clean; its page gives no numbers
    "train-clean-5": (None, None),
    "dev-clean-2": (None, None),
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
    Raises DataError: no such folder, or a subset is not there; names those that are."""
    folder, wanted = Path(folder), list(subsets)
    if not folder.is_dir():
        raise DataError(folder, "no such folder", hint="name the folder that holds LibriSpeech/ or its subsets")
    candidates = (folder, folder / "LibriSpeech")
    there = {root: [name for name in wanted if (root / name).is_dir()] for root in candidates}
    root = max(candidates, key=lambda candidate: (len(there[candidate]), (candidate / SPEAKERS).is_file()))
    if missing := [name for name in wanted if name not in there[root]]:
        found = ", ".join(name for name in PUBLISHED if (root / name).is_dir()) or "no subset"
        hint = f"unpack {missing[0]}.tar.gz there, name the folder that holds LibriSpeech/, or choose another --size"
        raise DataError(root, f"has no {', '.join(missing)}; of LibriSpeech it has {found}", hint=hint)
    return root


def read_speakers(root: str | Path) -> dict[str, Speaker]:
    """SPEAKERS.TXT of ``root``: {speaker: line}.
    Raises DataError: it is not there, or a line that cannot be understood."""
    path = Path(root) / SPEAKERS
    if not path.is_file():
        raise DataError(path, "no such file", hint=f"every archive of LibriSpeech has it: copy it to {path.parent}")
    speakers: dict[str, Speaker] = {}
    hint = "take the file out of the archive again"
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith(";"):
            continue
        parts = [part.strip() for part in line.split("|", 4)]  # names may have bars, too
        if len(parts) < 4 or not parts[0].isdigit() or parts[1] not in ("F", "M"):
            message = f"not a line of the form 'id | F or M | subset | minutes | name': {line!r}"
            raise DataError(path, message, line=number, hint=hint)
        speakers[parts[0]] = Speaker(parts[0], parts[1], parts[2])
    if not speakers:
        raise DataError(path, "lists no speaker", hint=hint)
    return speakers


def read_subset(root: str | Path, subset: str) -> list[Spoken]:
    """All utterances of a subset, sorted by key.
    Raises DataError: lists recordings without a transcript, transcripts without a recording, and malformed lines."""
    folder = Path(root, subset)
    problems: list[Problem] = []
    chapters = [chapter for chapter in sorted(folder.glob("*/*")) if chapter.is_dir()]
    found = [utterance for chapter in chapters for utterance in _read_chapter(chapter, problems)]
    raise_problems(folder, problems)
    if not found:
        raise DataError(folder, "has no utterance", hint=UNPACK_HINT)
    return sorted(found, key=lambda utterance: utterance.key)


def _read_chapter(chapter: Path, problems: list[Problem]) -> list[Spoken]:
    """The utterances of one chapter; what is wrong is added to ``problems``."""
    speaker = chapter.parent.name
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
    """Duration of a FLAC file from its header.
    Raises DataError: it is no FLAC file, or its header does not state a duration."""
    with open(path, "rb") as file:
        head = file.read(42)
    rate, samples = int.from_bytes(head[18:21], "big") >> 4, int.from_bytes(head[21:26], "big") & ((1 << 36) - 1)
    if len(head) < 42 or head[:4] != b"fLaC" or not rate or not samples:
        raise DataError(path, "is not a FLAC file that states its duration, or cut short", hint=UNPACK_HINT)
    return samples / rate


def durations(utterances: Sequence[Spoken], jobs: int = 1) -> dict[str, float]:
    """{key: seconds}, from the headers; ``jobs`` threads, because a network disk answers slowly."""
    with ThreadPoolExecutor(jobs) as pool:
        seconds = pool.map(flac_seconds, [utterance.path for utterance in utterances], chunksize=256)
        return {utterance.key: found for utterance, found in zip(utterances, seconds, strict=True)}


def check_counts(root: str | Path, found: Mapping[str, tuple[int, float]], strict: bool) -> list[str]:
    """What differs from the published numbers, one sentence each; ``found``: {subset: (utterances, hours)}.
    Raises DataError: something differs, and ``strict``."""
    differences = []
    for subset, (utterances, hours) in found.items():
        known_utterances, known_hours = PUBLISHED[subset]
        if known_utterances is not None and utterances != known_utterances:
            differences.append(f"{subset} has {utterances} utterances, published are {known_utterances}")
        if known_hours is not None and abs(hours - known_hours) > HOURS_TOLERANCE * known_hours:
            differences.append(f"{subset} has {hours:.2f} hours, published are {known_hours}")
    if differences and strict:
        listed = "".join(f"\n  {difference}" for difference in differences)
        hint = "unpack the archives again; or, to continue with what is there, --check_counts false"
        raise DataError(root, f"is not the whole corpus:{listed}", hint=hint)
    return differences
