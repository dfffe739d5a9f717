"""Make the data directories train, dev and test of AudioCaps from the official CSVs and folders of clips.

Writes ``DATA/<set>/{wav.scp,text,prompt,utt2task,utt2spk}``, ``references`` (dev and test: all captions of a clip), and
``missing``: clips of the CSV that have no audio, with the reason. Formatting (stage 2) carries that list into the
passport, so that scoring can say how much of the official test set it saw.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.errors import DataError  # noqa: E402

TASK = "caption"
FEW = 0.5  # less of a set than this deserves a warning


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: one on a line, ``#`` begins a comment; the first is the one that is scored with.

    Raises:
        DataError: no such file, or no prompt in it.
    """
    from pam_espnet.data.tables import one_line

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", hint="name a file of prompts: --prompts") from error
    prompts = [one_line(line) for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise DataError(path, "has no prompt", hint="write one on a line; the first is used in scoring")
    return prompts


def choose_prompt(prompts: Sequence[str], name: str, key: str, seed: int) -> str:
    """Training clips draw one of the prompts, by seed and key; dev and test clips get the first one."""
    return random.Random(f"{seed} {key}").choice(prompts) if name == "train" else prompts[0]


def prepare(args: argparse.Namespace) -> None:
    """Write all sets and print what is in them."""
    from captions import CAPTIONS, FILES, csv_folder, read_release
    from clips import NAMES, find_clip, index_audio
    from fetch import read_outcomes

    from pam_espnet.data.datadir import DataDir, validate
    from pam_espnet.data.tables import one_line, write_table

    clips = read_release(args.csv, args.version)
    prompts = read_prompts(args.prompts)
    if not args.audio:
        raise DataError(
            args.data_dir, "no folder with clips was named", hint="--audio DIR for clips you have, or --fetch true"
        )
    files = index_audio(args.audio)
    outcomes: Mapping[str, str] = {}
    for folder in args.audio:
        outcomes = {**outcomes, **read_outcomes(folder)}
    print(f"{'set':<8}{'clips':>8}{'found':>8}{'missing':>9}{'captions':>10}")
    for name in FILES:
        found = {clip.key: path for clip in clips[name] if (path := find_clip(clip, files)) is not None}
        kept = [clip for clip in clips[name] if clip.key in found]
        folder = args.data_dir / name
        if not kept:
            some = ", ".join(path.name for path in list(files.values())[:3])
            raise DataError(
                args.audio[0],
                f"holds none of the {len(clips[name])} clips of {csv_folder(args.csv, args.version) / FILES[name]}; "
                f"its first files are {some}",
                hint=f"clips are files named {NAMES}",
            )
        folder.mkdir(parents=True, exist_ok=True)
        missing = {
            clip.key: one_line("missing: " + outcomes.get(f"{clip.video}_{clip.start}", "in no folder of clips"))
            for clip in clips[name]
            if clip.key not in found
        }
        (folder / "missing").unlink(missing_ok=True)
        if missing:
            write_table(folder / "missing", missing)
        several = CAPTIONS[name] > 1
        directory = DataDir(
            path=folder,
            wav={key: str(path) for key, path in found.items()},
            text={clip.key: clip.captions[0] for clip in kept},
            prompt={clip.key: choose_prompt(prompts, name, clip.key, args.seed) for clip in kept},
            utt2task=dict.fromkeys(found, TASK),
            utt2spk={key: key for key in found},
            references={clip.key: list(clip.captions) for clip in kept} if several else None,
        )
        directory.save()
        validate(folder)
        said = sum(len(clip.captions) for clip in kept)
        print(f"{name:<8}{len(clips[name]):>8}{len(kept):>8}{len(missing):>9}{said:>10}")
        if missing:
            reasons = Counter(reason.removeprefix("missing: ") for reason in missing.values())
            listed = "; ".join(f"{times} {reason}" for reason, times in reasons.most_common(3))
            print(f"  missing, all listed in {folder / 'missing'}: {listed}")
        if len(kept) < FEW * len(clips[name]):
            print(f"  warning: only {len(kept) / len(clips[name]):.0%} of {name} is there")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, required=True, help="release of the captions: 1 or 2")
    parser.add_argument("--csv", type=Path, required=True, help="folder with train.csv, val.csv, test.csv")
    parser.add_argument("--audio", type=Path, nargs="*", default=[], help="folders with clips; the first goes first")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder to fill")
    parser.add_argument("--prompts", type=Path, default=Path("conf/prompts/caption.txt"), help="one prompt on a line")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts of training clips (1)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the sets."""
    prepare(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
