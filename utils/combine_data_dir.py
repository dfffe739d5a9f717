#!/usr/bin/env python3
"""Combine data directories into one. An utterance that is in two of them is an error that names both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="directory to write")
    parser.add_argument("source", nargs="+", help="directories to combine")
    parser.add_argument("--distinct_speakers", action="store_true", help="a speaker in two of them is an error, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Combine and print the result."""
    args = build_parser().parse_args(argv)
    from pam_espnet.data.datadir import DataDir
    from pam_espnet.data.edit import combine

    union = combine([DataDir.load(path) for path in args.source], args.target, distinct_speakers=args.distinct_speakers)
    print(f"{args.target}: {len(union)} utterances from {len(args.source)} directories")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
