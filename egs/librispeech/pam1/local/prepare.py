"""Write the data directories train, dev, test_clean and test_other of LibriSpeech, and check what is in them.

Reads ``LIBRISPEECH/<subset>`` (or ``LIBRISPEECH/LibriSpeech/<subset>``), ``local/sizes.yaml`` and
``conf/prompts/asr.txt``; writes ``DATA/<set>/{wav.scp,text,prompt,utt2task,utt2spk,spk2gender}``. The audio stays where
it is. Directories that were made from the same things are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from download import TEST_SETS, read_sizes, subsets_of  # noqa: E402

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.config import check_number  # noqa: E402

if TYPE_CHECKING:
    from pam_espnet.data.librispeech import Speaker, Spoken

CASES = ("lower", "upper")
DONE = "prepared.json"


def choose_dev(utterances: list[Spoken], number: int, seed: int) -> list[Spoken]:
    """``number`` of the utterances, drawn with ``seed``; all of them where there are no more, or for 0."""
    from pam_espnet.data.rendering import seeded

    if not 0 < number < len(utterances):
        return utterances
    rows = seeded(seed, "dev").permutation(len(utterances))[:number]
    return [utterances[row] for row in sorted(rows)]


def write_set(
    folder: Path, utterances: list[Spoken], prompts: dict[str, str], speakers: dict[str, Speaker], case: str
) -> None:
    """Write one data directory and check it."""
    from pam_espnet.data.datadir import DataDir, validate
    from pam_espnet.data.tables import write_table

    keys = [utterance.key for utterance in utterances]
    directory = DataDir(
        path=folder,
        wav={utterance.key: utterance.path for utterance in utterances},
        text={u.key: u.text.lower() if case == "lower" else u.text for u in utterances},
        prompt=prompts,
        utt2task=dict.fromkeys(keys, "asr"),
        utt2spk={utterance.key: utterance.speaker for utterance in utterances},
    )
    directory.save()
    write_table(folder / "spk2gender", {u.speaker: speakers[u.speaker].sex.lower() for u in utterances})
    validate(folder)


def prepare(args: argparse.Namespace) -> None:
    """Make all sets."""
    from pam_espnet.data.leakage import readers_of_tests, refuse_barred
    from pam_espnet.data.librispeech import check_counts, durations, find_root, read_speakers, read_subset
    from pam_espnet.data.prompts import draw_prompt, read_prompts
    from pam_espnet.errors import DataError
    from pam_espnet.fileio import read_json, write_json

    begin = time.monotonic()
    subsets = subsets_of(args.size)
    root = find_root(args.librispeech, subsets)
    wordings = read_prompts(args.prompts)
    key: dict[str, Any] = {
        "librispeech": str(root.resolve()),
        "subsets": subsets,
        "prompts": wordings,
        **{name: getattr(args, name) for name in ("size", "transcripts", "dev_utterances", "check_counts", "seed")},
    }
    done = args.data_dir / DONE
    names = ["train", "dev", *(subset.replace("-", "_") for subset in TEST_SETS)]
    if done.exists() and read_json(done) == key and all((args.data_dir / name / "text").exists() for name in names):
        print(f"prepare: {args.data_dir} is there already")
        return
    done.unlink(missing_ok=True)  # or a kill would leave sets of two settings that look finished
    print(f"prepare: size {args.size}, {root} -> {args.data_dir}", flush=True)
    speakers = read_speakers(root)
    read: dict[str, list[Spoken]] = {}
    seconds: dict[str, float] = {}
    for subset in subsets:
        read[subset] = read_subset(root, subset)
        if unknown := sorted({utterance.speaker for utterance in read[subset]} - speakers.keys()):
            hint = "take SPEAKERS.TXT out of the archive of this subset"
            raise DataError(root / "SPEAKERS.TXT", f"does not list speaker {unknown[0]} of {subset}", hint=hint)
        seconds |= durations(read[subset], args.jobs)
    hours = {subset: sum(seconds[u.key] for u in utterances) / 3600 for subset, utterances in read.items()}
    found = {subset: (len(utterances), hours[subset]) for subset, utterances in read.items()}
    for sentence in check_counts(root, found, strict=args.check_counts == "true"):
        print(f"prepare: note: {sentence}")

    sizes = read_sizes()[args.size]
    sets = {"train": [u for subset in sizes["train"] for u in read[subset]]}
    dev = [u for subset in sizes["dev"] for u in read[subset]]
    sets["dev"] = choose_dev(dev, args.dev_utterances, args.seed)
    sets |= {subset.replace("-", "_"): read[subset] for subset in TEST_SETS}
    print(f"{'set':<12}{'utterances':>11}{'hours':>9}{'speakers':>10}{'max s':>7}")
    for name, utterances in sets.items():
        # training asks in many wordings; validation and scoring in the first one
        asked = wordings if name == "train" else wordings[:1]
        prompts = {u.key: draw_prompt(asked, u.key, args.seed) for u in utterances}
        write_set(args.data_dir / name, utterances, prompts, speakers, args.transcripts)
        lengths = [seconds[u.key] for u in utterances]
        voices = len({u.speaker for u in utterances})
        print(f"{name:<12}{len(utterances):>11}{sum(lengths) / 3600:>9.2f}{voices:>10}{max(lengths):>7.1f}")
    refuse_barred(args.data_dir / "train", readers_of_tests(speakers))
    write_json(done, key)
    print(f"prepare: done in {time.monotonic() - begin:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data directories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--librispeech", type=Path, required=True, help="folder with LibriSpeech/ or its subsets")
    parser.add_argument("--size", default="clean100", help="a size of local/sizes.yaml (clean100)")
    parser.add_argument("--data_dir", type=Path, default=Path("data/clean100"), help="folder to fill (data/clean100)")
    parser.add_argument("--prompts", type=Path, default=Path("conf/prompts/asr.txt"), help="(conf/prompts/asr.txt)")
    parser.add_argument("--transcripts", choices=CASES, default="lower", help="case of the transcripts (lower)")
    parser.add_argument("--dev_utterances", type=int, default=1000, help="size of dev, 0 for all of it (1000)")
    parser.add_argument("--check_counts", choices=("true", "false"), default="true", help="stop if they differ (true)")
    parser.add_argument("--seed", type=int, default=2026, help="of prompts and dev utterances (2026)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="threads (all cores)")
    args = parser.parse_args(argv)
    check_number(args.jobs, "--jobs", at_least=1)
    check_number(args.dev_utterances, "--dev_utterances", at_least=0)
    prepare(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
