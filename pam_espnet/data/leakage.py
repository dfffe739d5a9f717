"""Who must not be heard in training: the readers of LibriSpeech's test sets, from which LibriCount is mixed.

    mix_speakers   <utterance> <speaker> <speaker> ...     optional table of a data directory: the voices of a mixture
    mix_sources    <utterance> <utterance of LibriSpeech> ...   optional: the recordings a mixture was made from
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pam_espnet.data.librispeech import TEST_SUBSETS, Speaker
from pam_espnet.data.tables import read_table
from pam_espnet.errors import DataError

MIX_SPEAKERS = "mix_speakers"
MIX_SOURCES = "mix_sources"
_SHOWN = 5


def readers_of_tests(speakers: Mapping[str, Speaker]) -> dict[str, str]:
    """{speaker: test set} of the readers that SPEAKERS.TXT puts into a test set."""
    return {speaker: line.subset for speaker, line in speakers.items() if line.subset in TEST_SUBSETS}


def barred_voices(data_dir: str | Path, barred: Mapping[str, str]) -> list[tuple[str, str]]:
    """(utterance, speaker) for every barred speaker in a data directory, through any of its three tables.

    Args:
        data_dir: holds ``utt2spk``, and ``mix_speakers`` and ``mix_sources`` where it has mixtures. Speakers are
            LibriSpeech's numbers; other names (of other corpora) are nobody's.
        barred: {speaker: why}.
    """
    data_dir = Path(data_dir)
    found: set[tuple[str, str]] = set()
    for name in ("utt2spk", MIX_SPEAKERS, MIX_SOURCES):
        if name != "utt2spk" and not (data_dir / name).exists():
            continue
        for utterance, value in read_table(data_dir / name, allow_empty=name != "utt2spk").items():
            # an utterance of LibriSpeech begins with its speaker's number
            found |= {(utterance, speaker) for word in value.split() if (speaker := word.split("-")[0]) in barred}
    return sorted(found)


def voices_of(data_dir: str | Path) -> dict[str, set[str]]:
    """{utterance: who is heard in it}, by ``utt2spk``, ``mix_speakers`` and ``mix_sources``."""
    data_dir = Path(data_dir)
    voices = {utterance: {speaker} for utterance, speaker in read_table(data_dir / "utt2spk").items()}
    for name in (MIX_SPEAKERS, MIX_SOURCES):
        if (data_dir / name).exists():
            for utterance, value in read_table(data_dir / name, allow_empty=True).items():
                voices.setdefault(utterance, set()).update(word.split("-")[0] for word in value.split())
    return voices


def refuse_shared(train_dir: str | Path, test_dirs: Sequence[str | Path]) -> None:
    """Check that no utterance and no speaker of the test sets is in a directory that is to be trained on.

    Raises:
        DataError: one is; names utterances, speakers and the test set.
    """
    heard = voices_of(train_dir)
    for test_dir in test_dirs:
        tested = voices_of(test_dir)
        if common := sorted(heard.keys() & tested.keys()):
            message = f"{len(common)} of its utterances are in {test_dir}: {', '.join(common[:_SHOWN])}"
            raise DataError(train_dir, message, hint="train on none of them, or do not score on that set")
        refuse_barred(train_dir, {speaker: Path(test_dir).name for speaker in set().union(*tested.values())})


def refuse_barred(data_dir: str | Path, barred: Mapping[str, str]) -> None:
    """Check that no barred speaker is heard in a directory that is to be trained on.

    Raises:
        DataError: one is; names utterances, speakers and the test set.
    """
    found = barred_voices(data_dir, barred)
    if not found:
        return
    listed = "".join(f"\n  {utterance}: speaker {name} of {barred[name]}" for utterance, name in found[:_SHOWN])
    more = f"\n  ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    message = f"has voices of a test set, so a model trained on it cannot be scored there:{listed}{more}"
    raise DataError(data_dir, message, hint="make the training set from train-clean and train-other speakers only")
