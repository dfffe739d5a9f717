"""LibriCount (Stöter, Chakrabarty, Edler and Habets, 2018; Zenodo record 1216072): its clips, and five folds of them.

    test/3_<name>.wav     5 s, 16 kHz, mono; the number in front is the largest number of people who talk at once
    test/3_<name>.json    [{"sex": "F", "activity": [[0, 51076], ...], "speaker_id": 1221}, ...]

The readers are those of LibriSpeech's test-clean.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from pam_espnet.data.tables import Problem, raise_problems
from pam_espnet.errors import DataError

CLIPS = 5720
MOST = 10
FOLDS = 5
HINT = "unpack LibriCount10-0dB.zip again, all of it"


@dataclass(frozen=True)
class Clip:
    """One clip: ``stem`` of its file names, the number of voices, and whose they are."""

    stem: str
    count: int
    path: str
    speakers: tuple[str, ...]


def find_clips(folder: str | Path) -> Path:
    """The folder with the clips: ``folder``, ``folder/test`` or ``folder/LibriCount10-0dB/test``.

    Raises:
        DataError: there are none.
    """
    folder = Path(folder)
    for candidate in (folder, folder / "test", folder / "LibriCount10-0dB" / "test"):
        if candidate.is_dir() and next(candidate.glob("*_*.wav"), None) is not None:
            return candidate
    what = "holds no clips of LibriCount" if folder.is_dir() else "no such folder"
    raise DataError(folder, what, hint="name the folder that test/3_<name>.wav was unpacked to")


def read_clips(folder: Path) -> list[Clip]:
    """All clips, sorted by stem.

    Raises:
        DataError: lists clips without an annotation, annotations without a clip, and names without a number 0 to 10.
    """
    problems: list[Problem] = []
    clips: list[Clip] = []
    annotated = {path.stem for path in folder.glob("*.json")}
    for path in sorted(folder.glob("*.wav")):
        match = re.fullmatch(r"(\d+)_(.+)", path.stem)
        if match is None or int(match[1]) > MOST:
            problems.append(Problem(path, None, "the name does not begin with a number from 0 to 10 and _", HINT))
        elif path.stem not in annotated:
            problems.append(Problem(path, None, f"there is no {path.stem}.json beside it", HINT))
        else:
            annotation = path.with_suffix(".json")
            try:
                speakers = tuple(str(voice["speaker_id"]) for voice in json.loads(annotation.read_text()))
            except (ValueError, TypeError, KeyError) as error:
                problems.append(Problem(annotation, None, f"is no list of speakers ({error!r})", HINT))
                continue
            clips.append(Clip(path.stem, int(match[1]), str(path), speakers))
    for stem in sorted(annotated - {path.stem for path in folder.glob("*.wav")}):
        problems.append(Problem(folder / f"{stem}.json", None, f"there is no {stem}.wav beside it", HINT))
    raise_problems(folder, problems)
    return clips


def folds_of(clips: list[Clip]) -> list[list[Clip]]:
    """Five folds with as many clips of each number: a number's clips, by the SHA-256 of their stems, dealt in turn.

    HEAR (Turian et al., 2022) scores LibriCount in five folds, too, each of which is once the test set, with the next
    one for validation. Its lists come from another shuffle and are not these.
    """
    folds: list[list[Clip]] = [[] for _ in range(FOLDS)]
    for count in range(MOST + 1):
        own = [clip for clip in clips if clip.count == count]
        own.sort(key=lambda clip: hashlib.sha256(clip.stem.encode()).hexdigest())
        for index, clip in enumerate(own):
            folds[(index + count) % FOLDS].append(clip)
    return folds
