"""Hold a validation and a test set out of a data directory, so that neither shares a recording with training.

Utterances of one recording stay together; those of one speaker do, too, where there are speakers enough. The same data
gives the same sets.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.config import check_number  # noqa: E402
from pam_espnet.errors import DataError  # noqa: E402

if TYPE_CHECKING:
    from pam_espnet.data.datadir import DataDir

ENOUGH = 10  # speakers of a task; with fewer a set of unknown speakers says little, and takes much from training
LARGEST = 2.0  # times the wanted size: a group that would make a set larger stays in training


def group(data: DataDir) -> tuple[list[list[str]], list[str]]:
    """Utterances that must stay together, and the tasks of which speakers do."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    speakers: dict[str, Counter[str]] = defaultdict(Counter)
    for utt, task in data.utt2task.items():
        speakers[task][data.utt2spk[utt]] += 1
    # as many speakers as utterances: nobody knows them
    by_speaker = [task for task, counts in speakers.items() if ENOUGH <= len(counts) < counts.total()]
    for utt in data.utterances:
        parent[root(f"utterance {utt}")] = root(f"recording {data.source(utt)[0]}")
        if data.utt2task[utt] in by_speaker:
            parent[root(f"utterance {utt}")] = root(f"speaker {data.utt2spk[utt]}")
    groups: dict[str, list[str]] = defaultdict(list)
    for utt in data.utterances:
        groups[root(f"utterance {utt}")].append(utt)
    return list(groups.values()), by_speaker


def split(data: DataDir, names: Sequence[str], percent: float) -> dict[str, list[str]]:
    """{set: utterances} of ``names`` and train; each task has its share of each set, as far as its groups allow.

    Raises:
        DataError: there is too little to hold something out.
    """
    groups, by_speaker = group(data)
    groups.sort(key=lambda group: hashlib.sha256(group[0].encode()).digest())
    wanted = {task: max(1, round(count * percent / 100)) for task, count in data.per_task().items()}
    sets: dict[str, list[str]] = {name: [] for name in (*names, "train")}
    have: dict[str, Counter[str]] = {name: Counter() for name in sets}

    def takes(name: str, counts: Counter[str]) -> bool:
        open_tasks = [task for task in counts if have[name][task] < wanted[task]]
        return bool(open_tasks) and all(have[name][task] + counts[task] <= LARGEST * wanted[task] for task in counts)

    for part in groups:
        counts = Counter(data.utt2task[utt] for utt in part)
        name = next((name for name in names if takes(name, counts)), "train")
        sets[name] += part
        have[name] += counts
    if empty := [name for name, utterances in sets.items() if not utterances]:
        message = f"{len(data)} utterances in {len(groups)} groups: nothing is left for {', '.join(empty)}"
        raise DataError(data.path, message, hint="name sets of your own (--dev, --test), or import more data")
    if names:
        print(f"held out {percent:g} % for each of {', '.join(names)}; no recording is in two sets")
    if names and by_speaker:
        print(f"  nor is a speaker of {', '.join(by_speaker)}; of other tasks there are too few, or none are known")
    return sets


def main(argv: Sequence[str] | None = None) -> int:
    """Split, and print what is in the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data directory to split")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder for train and what is held out")
    parser.add_argument("--held_out", nargs="*", default=[], help="sets to hold out")
    parser.add_argument("--percent", type=float, default=10, help="of the utterances for each of them (%(default)s)")
    args = parser.parse_args(argv)
    check_number(args.percent, "--held_out", at_least=0.01, below=50)

    from pam_espnet.data.datadir import DataDir

    data = DataDir.load(args.data)
    for name, utterances in split(data, args.held_out, args.percent).items():
        part = data.subset(utterances)
        part.save(args.data_dir / name)
        counts = ", ".join(f"{task} {count}" for task, count in part.per_task().items())
        print(f"{args.data_dir / name}: {len(part)} utterances ({counts})")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
