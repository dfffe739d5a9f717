"""Make the data directories train, dev and test of AudioCaps from the official CSVs and folders of clips.

Writes ``DATA/<set>/{wav.scp,text,prompt,utt2task,utt2spk}``, ``references`` (dev and test: all captions of a clip), and
``missing``: clips of the CSV that have no audio, with the reason. Formatting (stage 2) copies that list into the
passport, so that scores come with the share of the official test set.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.errors import DataError  # noqa: E402

if TYPE_CHECKING:
    from captions import Clip

SEED = 2026  # of the prompts of training clips
FEW = 0.5  # less of a set than this deserves a warning


def write_set(
    folder: Path, clips: list[Clip], files: dict[str, Path], prompts: list[str], reasons: dict[str, str], where: str
) -> dict[str, str]:
    """Write one data directory of the clips that ``files`` has, and check it.

    Args:
        folder: to write; its name is that of the set.
        clips: of the CSV.
        files: see ``clips.index_audio``.
        prompts: training clips draw one, dev and test clips get the first.
        reasons: why clips could not be fetched.
        where: what the other missing clips are in: "in no folder of clips".

    Returns:
        clip -> why it is missing.
    """
    from captions import CAPTIONS
    from clips import find_clip

    from pam_espnet.data.datadir import DataDir, validate
    from pam_espnet.data.prompts import draw_prompt
    from pam_espnet.data.tables import one_line, write_table

    found = {clip.key: path for clip in clips if (path := find_clip(clip, files)) is not None}
    kept = [clip for clip in clips if clip.key in found]
    missing = {
        clip.key: one_line("missing: " + reasons.get(f"{clip.video}_{clip.start}", where))
        for clip in clips
        if clip.key not in found
    }
    if not kept:
        return missing
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "missing").unlink(missing_ok=True)
    if missing:
        write_table(folder / "missing", missing)
    asked = prompts if folder.name == "train" else prompts[:1]
    several = CAPTIONS[folder.name] > 1
    DataDir(
        path=folder,
        wav={key: str(path) for key, path in found.items()},
        text={clip.key: clip.captions[0] for clip in kept},
        prompt={clip.key: draw_prompt(asked, clip.key, SEED) for clip in kept},
        utt2task=dict.fromkeys(found, "caption"),
        utt2spk={key: key for key in found},
        references={clip.key: list(clip.captions) for clip in kept} if several else None,
    ).save()
    validate(folder)
    return missing


def prepare(args: argparse.Namespace) -> None:
    """Write all sets and print what is in them."""
    from captions import FILES, csv_folder, read_release
    from clips import NAMES, index_clips
    from fetch import read_outcomes

    from pam_espnet.data.prompts import read_prompts

    clips = read_release(args.csv, args.version)
    prompts = read_prompts(args.prompts)
    if not args.audio and args.hosted is None:
        raise DataError(
            args.data_dir,
            "no folder with clips was named",
            hint="--audio DIR for clips you have, --hf NAME for those of a Hugging Face dataset, or --fetch true",
        )
    files = index_clips(args.audio, args.hosted)
    where = "in no folder of clips" if args.hosted is None else "not in the dataset"
    where += ", in no folder of clips" if args.hosted is not None and args.audio else ""
    reasons: dict[str, str] = {}
    for folder in args.audio:
        reasons |= read_outcomes(folder)
    print(f"{'set':<8}{'clips':>8}{'found':>8}{'missing':>9}{'captions':>10}")
    for name in FILES:
        missing = write_set(args.data_dir / name, clips[name], files, prompts, reasons, where)
        kept = [clip for clip in clips[name] if clip.key not in missing]
        if not kept:
            some = ", ".join(path.name for path in list(files.values())[:3])
            raise DataError(
                [*args.audio, args.hosted][0],
                f"holds none of the {len(clips[name])} clips of {csv_folder(args.csv, args.version) / FILES[name]}; "
                f"its first files are {some}",
                hint=f"clips are files named {NAMES}",
            )
        captions = sum(len(clip.captions) for clip in kept)
        print(f"{name:<8}{len(clips[name]):>8}{len(kept):>8}{len(missing):>9}{captions:>10}")
        if missing:
            common = Counter(reason.removeprefix("missing: ") for reason in missing.values()).most_common(3)
            listed = "; ".join(f"{times} {reason}" for reason, times in common)
            print(f"  missing, all listed in {args.data_dir / name / 'missing'}: {listed}")
        if len(kept) < FEW * len(clips[name]):
            print(f"  warning: only {len(kept) / len(clips[name]):.0%} of {name} is there")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, required=True, help="release of the captions: 1 or 2")
    parser.add_argument("--csv", type=Path, required=True, help="folder with train.csv, val.csv, test.csv")
    parser.add_argument("--audio", type=Path, nargs="*", default=[], help="folders with clips; the first goes first")
    parser.add_argument("--hosted", type=Path, help="what hosted.py filled")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder to fill")
    parser.add_argument("--prompts", type=Path, default=Path("conf/prompts/caption.txt"), help="one prompt on a line")
    prepare(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
