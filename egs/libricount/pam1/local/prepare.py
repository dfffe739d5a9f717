"""Write the data directories of the speaker count: LibriCount as test sets, mixtures of LibriSpeech for training.

Reads ``LIBRICOUNT/test/*.{wav,json}``, ``LIBRISPEECH/<subset>``, ``local/sizes.yaml``, ``conf/prompts/*.txt``; writes
``DATA/{train,dev,test_count,test_verify}``, with ``--folds true`` ``DATA/{train,dev,test}_fold<0..4>``, and
``DATA/audio/{train,dev}/*.flac``. Mixtures that are complete with the same options are kept, unfinished ones continue.
The same options give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.config import check_number, load_yaml  # noqa: E402
from pam_espnet.errors import ConfigError, DataError  # noqa: E402

if TYPE_CHECKING:
    from libricount import Clip

    from pam_espnet.data.rendering import Utterance

FRAMINGS = ("count", "verify")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def size_of(name: str) -> dict:
    """A size of sizes.yaml."""
    sizes = load_yaml(LOCAL / "sizes.yaml")
    if name not in sizes:
        raise ConfigError(f"--size {name}: local/sizes.yaml has {', '.join(sizes)}")
    return sizes[name]


def read_wordings(folder: Path) -> dict[str, list[str]]:
    """{framing: prompts}."""
    from pam_espnet.data.prompts import read_prompts

    fields = {"count": (), "verify": ("number",)}
    return {framing: read_prompts(folder / f"{framing}.txt", fields[framing]) for framing in FRAMINGS}


def write_set(
    folder: Path,
    audio: dict[str, str],
    counts: dict[str, int],
    framings: list[str],
    wordings: dict[str, list[str]],
    seed: int,
    speakers: dict[str, list[str]],
    sources: dict[str, list[str]] | None = None,
) -> None:
    """Write one data directory and check it; ``audio``, ``counts``, ``speakers``, ``sources`` are keyed by clip."""
    from questions import questions

    from pam_espnet.data.datadir import DataDir, validate
    from pam_espnet.data.leakage import MIX_SOURCES, MIX_SPEAKERS
    from pam_espnet.data.tables import write_table

    table = questions(counts, framings, wordings, seed)
    DataDir(
        path=folder,
        wav={key: audio[clip] for key, (clip, _, _, _) in table.items()},
        text={key: answer for key, (_, _, _, answer) in table.items()},
        prompt={key: prompt for key, (_, _, prompt, _) in table.items()},
        utt2task={key: task for key, (_, task, _, _) in table.items()},
        utt2spk={key: clip for key, (clip, _, _, _) in table.items()},
    ).save()
    for name, lists in ((MIX_SPEAKERS, speakers), (MIX_SOURCES, sources)):
        if lists is not None:
            write_table(folder / name, {key: " ".join(lists[clip]) for key, (clip, _, _, _) in table.items()})
    validate(folder)
    tasks = Counter(task for _, task, _, _ in table.values())
    voices = len({name for names in speakers.values() for name in names})
    listed = ", ".join(f"{number} {task}" for task, number in sorted(tasks.items()))
    print(f"  {folder.name}: {len(counts)} clips, {voices} voices; {listed}", flush=True)


def make_mixtures(args: argparse.Namespace) -> None:
    """Mix, and write train and dev."""
    import libricount
    import mix

    from pam_espnet.data import librispeech, mixtures, rendering, signals
    from pam_espnet.data.leakage import readers_of_tests, refuse_barred
    from pam_espnet.fileio import write_text

    size = size_of(args.size)
    subsets = [*size["train"], *size["dev"]]
    root = librispeech.find_root(args.librispeech, subsets)
    barred = readers_of_tests(librispeech.read_speakers(root))
    read = {subset: librispeech.read_subset(root, subset) for subset in subsets}
    if args.check_counts == "true":
        numbers = {name: (len(read[name]), librispeech.PUBLISHED[name][1] or 0.0) for name in subsets}
        librispeech.check_counts(root, numbers, strict=True)
    utterances = {split: [u for subset in size[split] for u in read[subset]] for split in ("train", "dev")}
    if barred_here := sorted({u.speaker for own in utterances.values() for u in own} & barred.keys()):
        message = f"reader {barred_here[0]} of {subsets} is one of {barred[barred_here[0]]}"
        raise DataError(root, message, hint="voices of a test set must not be trained on; unpack LibriSpeech again")
    noises = sorted(str(path) for path in args.noise.rglob("*") if path.suffix in AUDIO_SUFFIXES) if args.noise else []
    if args.noise and not noises:
        raise DataError(args.noise, "has no recordings", hint=f"name a folder with {', '.join(AUDIO_SUFFIXES)} files")

    folder = args.data_dir / "audio"
    jobs, speakers, sources = mix.plan(utterances, size["clips"], noises, folder, args.seed)
    modules = (libricount, mix, mixtures, rendering, signals)
    files = [Path(module.__file__) for module in modules if module.__file__]
    key = rendering.fingerprint((size, str(root), noises, str(folder)), args.seed, files)
    made: list[Utterance] = rendering.build_task("mixtures", folder, key, lambda: jobs, mix.render, args.jobs)
    wordings = read_wordings(args.prompts)
    for split in ("train", "dev"):
        own = [utterance for utterance in made if utterance.split == split]
        write_set(
            args.data_dir / split,
            {u.key: u.audio for u in own},
            {u.key: int(u.text) for u in own},
            args.framings,
            wordings if split == "train" else {name: prompts[:1] for name, prompts in wordings.items()},
            args.seed,
            {u.key: speakers[u.key] for u in own},
            {u.key: sources[u.key] for u in own},
        )
        names = sorted({u.speaker for u in utterances[split]}, key=int)
        write_text(args.data_dir / f"speakers_{split}.txt", "".join(f"{name}\n" for name in names))
        refuse_barred(args.data_dir / split, barred)


def read_libricount(args: argparse.Namespace) -> list[Clip]:
    """LibriCount's clips, as many as there should be."""
    from libricount import CLIPS, HINT, find_clips, read_clips

    folder = find_clips(args.libricount)
    clips = read_clips(folder)
    if len(clips) != CLIPS:
        message = f"has {len(clips)} clips, published are {CLIPS}"
        if args.check_counts == "true":
            raise DataError(folder, message, hint=f"{HINT}; or, to go on with these, --check_counts false")
        print(f"prepare: note: {folder} {message}")
    if strange := [clip.stem for clip in clips if len(clip.speakers) != clip.count]:
        print(f"prepare: note: {len(strange)} annotations list another number of speakers, such as {strange[0]}.json")
    return clips


def write_tests(args: argparse.Namespace, clips: list[Clip]) -> None:
    """Write LibriCount as test sets, and in folds where they are asked for."""
    from libricount import FOLDS, folds_of

    first = {name: prompts[:1] for name, prompts in read_wordings(args.prompts).items()}

    def write(name: str, chosen: list[Clip], framing: str, wordings: dict[str, list[str]]) -> None:
        audio = {clip.stem: clip.path for clip in chosen}
        counts = {clip.stem: clip.count for clip in chosen}
        speakers = {clip.stem: list(clip.speakers) for clip in chosen}
        write_set(args.data_dir / name, audio, counts, [framing], wordings, args.seed, speakers)

    for framing in args.framings:
        write(f"test_{framing}", clips, framing, first)
    if args.folds == "true":
        folds = folds_of(clips)
        for fold in range(FOLDS):
            dev = (fold + 1) % FOLDS
            train = [clip for number in range(FOLDS) if number not in (fold, dev) for clip in folds[number]]
            write(f"train_fold{fold}", train, "count", read_wordings(args.prompts))
            write(f"dev_fold{fold}", folds[dev], "count", first)
            write(f"test_fold{fold}", folds[fold], "count", first)


def prepare(args: argparse.Namespace) -> None:
    """Make all sets."""
    begin = time.monotonic()
    print(f"prepare: size {args.size}, seed {args.seed} -> {args.data_dir}, {args.jobs} processes", flush=True)
    write_tests(args, read_libricount(args))
    make_mixtures(args)
    print(f"prepare: done in {time.monotonic() - begin:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data directories, or print which subsets of LibriSpeech they need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--librispeech", type=Path, help="folder with LibriSpeech/ or its subsets")
    parser.add_argument("--libricount", type=Path, help="folder with LibriCount's clips, or the one above it")
    parser.add_argument("--size", default="clean100", help="a size of local/sizes.yaml (clean100)")
    parser.add_argument("--data_dir", type=Path, default=Path("data/clean100"), help="folder to fill (data/clean100)")
    parser.add_argument("--prompts", type=Path, default=Path("conf/prompts"), help="folder of prompts (conf/prompts)")
    parser.add_argument("--noise", type=lambda text: Path(text) if text else None, help="folder of recordings (none)")
    parser.add_argument("--framings", nargs="+", choices=FRAMINGS, default=list(FRAMINGS), help="(count verify)")
    parser.add_argument("--folds", choices=("true", "false"), default="false", help="write five folds, too (false)")
    parser.add_argument("--check_counts", choices=("true", "false"), default="true", help="stop if they differ (true)")
    parser.add_argument("--seed", type=int, default=2026, help="of everything random (2026)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    parser.add_argument("--list_subsets", choices=("true", "false"), default="false", help="print them, stop (false)")
    args = parser.parse_args(argv)
    if args.list_subsets == "true":
        size = size_of(args.size)
        print(*size["dev"], *size["train"])
        return 0
    check_number(args.jobs, "--jobs", at_least=1)
    if args.librispeech is None or args.libricount is None:
        raise ConfigError("--librispeech and --libricount are needed; local/data.sh downloads what is not given")
    prepare(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
