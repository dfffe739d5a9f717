"""Format data directories: every utterance becomes a separate mono 16-bit file at one sample rate, with a passport of
where it came from. All directories are checked first. Utterances that are silent, damaged, too long or too short are
skipped and listed with the reason. A killed run continues where it stopped; a second run does only what changed."""

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="directories to read: data/train data/dev")
    parser.add_argument("--out", nargs="+", required=True, help="directory to write for each: dump/raw/train ...")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--max_seconds", "--max-seconds", type=float, default=30.0, help="longest utterance (default: %(default)s)"
    )
    parser.add_argument("--min_seconds", type=float, default=0.1, help="shortest utterance (default: %(default)s)")
    parser.add_argument("--sample_rate", type=int, default=16000, help="Hz (default: %(default)s)")
    parser.add_argument("--audio_format", choices=("flac", "wav"), default="flac", help="default: %(default)s")
    parser.add_argument("--archive_mb", type=float, default=0, help="MB of an archive; 0: one file each (default)")
    parser.add_argument("--allow-pipes", action="store_true", help="run commands ('cmd |') found in wav.scp")
    args = parser.parse_args(argv)
    if len(args.data) != len(args.out):
        parser.error(f"--data names {len(args.data)} directories and --out {len(args.out)}: name one for each")
    from pam_espnet.data.datadir import validate
    from pam_espnet.data.format import format_data_dir

    for source in args.data:
        validate(source, allow_pipes=args.allow_pipes)
    for source, target in zip(args.data, args.out, strict=True):
        passport = format_data_dir(
            source,
            target,
            sample_rate=args.sample_rate,
            audio_format=args.audio_format,
            max_seconds=args.max_seconds,
            min_seconds=args.min_seconds,
            jobs=args.jobs,
            allow_pipes=args.allow_pipes,
            archive_mb=args.archive_mb,
        )
        print(f"{target}: {passport.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
