"""Format a data directory: every utterance becomes its own mono 16-bit file at one sample rate, with a passport that
says where it came from. Silent, NaN, empty, too long, too short and unreadable utterances are left out and listed with
the reason. A killed run goes on where it stopped; a second run does only what changed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="data directory to read, such as data/train")
    parser.add_argument("target", help="directory to write, such as dump/raw/train")
    parser.add_argument("--sample-rate", type=int, default=16000, help="Hz (default: %(default)s)")
    parser.add_argument("--audio-format", choices=("flac", "wav"), default="flac", help="default: %(default)s")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="longest utterance (default: %(default)s)")
    parser.add_argument("--min-seconds", type=float, default=0.1, help="shortest utterance (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--allow-pipes", action="store_true", help="run commands ('cmd |') found in wav.scp")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Format and print the summary."""
    args = build_parser().parse_args(argv)
    from pam_espnet.data.format import format_data_dir

    passport = format_data_dir(
        args.source,
        args.target,
        sample_rate=args.sample_rate,
        audio_format=args.audio_format,
        max_seconds=args.max_seconds,
        min_seconds=args.min_seconds,
        jobs=args.jobs,
        allow_pipes=args.allow_pipes,
    )
    print(f"{args.target}: {passport.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
