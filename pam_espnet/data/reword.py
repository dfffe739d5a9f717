"""Formatted test sets once more for every other wording of their questions, to measure what the wording changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.edit import save_dir
from pam_espnet.data.prompts import Wordings
from pam_espnet.errors import DataError


def reword(data_dir: str | Path, wordings: Mapping[str, Wordings], target: str | Path) -> list[Path]:
    """Write ``<target>/2``, ``<target>/3``, ...: the set in the second, third, ... wording; return these directories.

    Args:
        data_dir: a formatted data directory, every prompt in the first wording of its task.
        wordings: task -> wordings, for every task of the directory. Directory n has the utterances whose task has n
            wordings or more; their audio is not copied.
        target: folder for the directories.

    Raises:
        DataError: a prompt that is not the first wording of its task.
    """
    data = DataDir.load(data_dir)
    for utterance in data.utterances:
        known = wordings[data.utt2task[utterance]]
        if known.recognise(data.prompt[utterance])[0] != 0:
            message = f"{utterance} is not asked in the first wording of {known.path}: {data.prompt[utterance]!r}"
            raise DataError(Path(data_dir) / "prompt", message, hint="name a test set; training draws its prompts")
    written = []
    for number in range(1, max(len(wordings[task]) for task in data.per_task())):
        chosen = data.subset(utt for utt in data.utterances if number < len(wordings[data.utt2task[utt]]))
        prompts = {utt: wordings[task].ask(chosen.prompt[utt], number) for utt, task in chosen.utt2task.items()}
        written.append(Path(target) / str(number + 1))
        save_dir(replace(chosen, prompt=prompts), written[-1])
    return written
