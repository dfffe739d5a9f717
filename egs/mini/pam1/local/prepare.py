"""Make the corpus: data directories train, dev, test_asr, test_voices, test_count, test_caption, and their audio.

Reads the packages that download.py unpacked, and packages.yaml, sizes.yaml and the tables of voices and sounds; writes
``DATA/{train,dev,test_*}`` and ``DATA/audio/<task>/<split>/*.flac`` (16 kHz). A task that is complete with the same
options is kept; an unfinished one continues. The same size and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.config import check_number, load_yaml  # noqa: E402
from pam_espnet.errors import ConfigError  # noqa: E402

if TYPE_CHECKING:
    from pam_espnet.data.rendering import Job, Utterance

TASKS = ("asr", "count", "caption")


def make_task(task: str, args: argparse.Namespace, options: dict) -> list[Utterance]:
    """All utterances of one task, their audio made."""
    import asr
    import caption
    import count
    import recordings

    from pam_espnet.data import mixtures, rendering, signals

    folder = args.data_dir / "audio" / task
    module = {"asr": asr, "count": count, "caption": caption}[task]
    plan: Callable[[], list[Job]] = partial(module.plan, args.downloads, folder, options, args.seed, LOCAL)
    if task != "asr":
        recordings.extract_gcompris(args.downloads, caption.all_recordings(caption.read_sounds(LOCAL / "sounds.yaml")))
    lines = ["text.py", "game.py", "queen.py", "synthetic.py", "game_voices.yaml"]
    own = {"asr": lines, "count": ["voices.yaml", "sounds.yaml"], "caption": ["sounds.yaml"]}[task]
    files = [LOCAL / name for name in (f"{task}.py", "recordings.py", "packages.yaml", *own)]
    files += [Path(module.__file__) for module in (mixtures, rendering, signals) if module.__file__]
    key = rendering.fingerprint((options, str(folder), str(args.downloads)), args.seed, files)
    return rendering.build_task(task, folder, key, plan, module.render, args.jobs)


def write_sets(made: dict[str, list[Utterance]], data: Path) -> None:
    """Write the data directories, check them, and print what is in them."""
    from pam_espnet.data.datadir import DataDir, validate
    from pam_espnet.data.tasks import task_spec

    sets: dict[str, list[tuple[str, Utterance]]] = {}
    for task, utterances in made.items():
        for utterance in utterances:
            name = f"test_{task}" if utterance.split == "test" else utterance.split
            sets.setdefault(name, []).append((task, utterance))
    print(f"{'set':<14}{'task':<10}{'utterances':>10}{'hours':>8}{'mean s':>8}{'max s':>7}{'answers':>9}")
    for name, entries in sets.items():
        directory = DataDir(
            path=data / name,
            wav={u.key: u.audio for _, u in entries},
            text={u.key: u.text for _, u in entries},
            prompt={u.key: task_spec(task).default_prompt for task, u in entries},
            utt2task={u.key: task for task, u in entries},
            utt2spk={u.key: u.speaker for _, u in entries},
            references={u.key: list(u.references) for _, u in entries if u.references} or None,
        )
        directory.save()
        validate(directory.path)
        for task in TASKS:
            seconds = [u.seconds for kind, u in entries if kind == task]
            if seconds:
                answers = len({u.text for kind, u in entries if kind == task})
                total = sum(seconds)
                print(
                    f"{name:<14}{task:<10}{len(seconds):>10}{total / 3600:>8.2f}{total / len(seconds):>8.1f}"
                    f"{max(seconds):>7.1f}{answers:>9}"
                )


def prepare(args: argparse.Namespace) -> None:
    """Make all tasks and sets."""
    import caption
    import count

    from pam_espnet.fileio import write_json

    begin = time.monotonic()
    sizes = load_yaml(LOCAL / "sizes.yaml")
    if args.size not in sizes:
        raise ConfigError(f"--size {args.size}: sizes.yaml has {', '.join(sizes)}")
    voices = count.read_voices(LOCAL / "voices.yaml")
    sounds = caption.read_sounds(LOCAL / "sounds.yaml")
    print(f"prepare: size {args.size}, seed {args.seed}, {args.downloads} -> {args.data_dir}, {args.jobs} processes")
    for split in ("train", "dev", "test"):
        held = [entry[split] for entry in sounds.values() if entry.get(split)]
        print(f"  {split}: {len(voices[split])} voices, {len(held)} sound classes, {sum(map(len, held))} sounds")
    made = {task: make_task(task, args, sizes[args.size][task]) for task in TASKS}
    write_sets(made, args.data_dir)
    write_json(args.data_dir / "size.json", {"size": args.size, "seed": args.seed, **sizes[args.size]})
    print(f"prepare: done in {time.monotonic() - begin:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="quick", help="a size of sizes.yaml: quick, full (quick)")
    parser.add_argument("--downloads", type=Path, default=Path("downloads"), help="what download.py filled (downloads)")
    parser.add_argument("--data_dir", type=Path, default=Path("data/quick"), help="folder to fill (data/quick)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of processes (all cores)")
    parser.add_argument("--seed", type=int, default=2026, help="seed of everything random (2026)")
    args = parser.parse_args(argv)
    check_number(args.jobs, "--jobs", at_least=1)
    prepare(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
