"""Speakers and utterances of test sets in training data, through every table that names them.

    utt2spk        <utterance> <speaker>
    mix_speakers   <utterance> <speaker> <speaker> ...           optional: the voices of a mixture
    mix_sources    <utterance> <utterance of LibriSpeech> ...    optional: the recordings a mixture was made from

LibriCount is mixed from LibriSpeech's test-clean, so training on it spoils LibriSpeech's scores.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pam_espnet.data.librispeech import TEST_SUBSETS, Speaker
from pam_espnet.data.tables import read_table
from pam_espnet.errors import DataError

MIX_SPEAKERS = "mix_speakers"
MIX_SOURCES = "mix_sources"
_SHOWN = 5
_LIBRISPEECH = re.compile(r"^(\d+)-\d+(-\d+)?$")  # reader-chapter or reader-chapter-utterance


def readers_of_tests(speakers: Mapping[str, Speaker]) -> dict[str, str]:
    """{speaker: test set} of the readers that SPEAKERS.TXT puts into a test set."""
    return {speaker: line.subset for speaker, line in speakers.items() if line.subset in TEST_SUBSETS}


def voices_of(data_dir: str | Path) -> dict[str, set[str]]:
    """{utterance: its speakers}, from the three tables; LibriSpeech's READER-CHAPTER-... counts as READER."""
    voices: dict[str, set[str]] = {}
    for name in ("utt2spk", MIX_SPEAKERS, MIX_SOURCES):
        path = Path(data_dir) / name
        if name == "utt2spk" or path.exists():
            for utterance, value in read_table(path, allow_empty=name != "utt2spk").items():
                names = (_LIBRISPEECH.sub(r"\1", word) for word in value.split())
                voices.setdefault(utterance, set()).update(names)
    return voices


def refuse_shared(train_dir: str | Path, test_dirs: Sequence[str | Path]) -> None:
    """Check that no utterance and no speaker of the test sets is in a directory that is to be trained on.
    Raises DataError: one is; names utterances, speakers and the test set."""
    trained = voices_of(train_dir)
    for test_dir in test_dirs:
        tested = voices_of(test_dir)
        if common := sorted(trained.keys() & tested.keys()):
            message = f"{len(common)} of its utterances are in {test_dir}: {', '.join(common[:_SHOWN])}"
            raise DataError(train_dir, message, hint="train on none of them, or do not score on that set")
        refuse_barred(train_dir, {speaker: Path(test_dir).name for speaker in set().union(*tested.values())})


def refuse_barred(data_dir: str | Path, barred: Mapping[str, str]) -> None:
    """Check that no barred speaker, {speaker: test set}, is in a directory that is to be trained on.
    Raises DataError: one is; names utterances, speakers and the test set."""
    voices = voices_of(data_dir)
    found = sorted((utterance, name) for utterance, names in voices.items() for name in names & barred.keys())
    if not found:
        return
    listed = "".join(f"\n  {utterance}: speaker {name} of {barred[name]}" for utterance, name in found[:_SHOWN])
    more = f"\n  ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    message = f"has voices of a test set, so a model trained on it cannot be scored there:{listed}{more}"
    raise DataError(data_dir, message, hint="make the training set from train-clean and train-other speakers only")
