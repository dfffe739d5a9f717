#!/usr/bin/env python3
"""Write a part of a data directory: listed utterances, one task, the first n, or n drawn with a seed. --task goes
together with the others: --task asr --random 100 draws a hundred of the asr utterances."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="directory to read")
    parser.add_argument("target", help="directory to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--utts", type=Path, help="file whose lines begin with the wanted keys, in any order")
    which.add_argument("--first", type=int, help="this many, from the beginning")
    which.add_argument("--random", type=int, help="this many, drawn at random")
    parser.add_argument("--task", help="utterances of this task only")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Choose and print the number."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.utts is args.first is args.random is args.task is None:
        parser.error("choose a part: --utts, --first, --random or --task")
    from pam_espnet.data.datadir import DataDir
    from pam_espnet.data.edit import choose, save_dir
    from pam_espnet.data.tables import read_keys
    from pam_espnet.errors import DataError

    data = DataDir.load(args.source)
    if Path(args.target).resolve() == Path(args.source).resolve():
        raise DataError(args.target, "is both source and target", hint="write to another directory")
    keys = None if args.utts is None else read_keys(args.utts, data.text)
    part = choose(data, utterances=keys, task=args.task, first=args.first, sample=args.random, seed=args.seed)
    save_dir(part, args.target)
    print(f"{args.target}: {len(part)} of {len(data)} utterances")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
