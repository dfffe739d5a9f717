#!/usr/bin/env python3
"""Repair a data directory in place: sort its tables, remove unusable lines, drop utterances that are not in every
table or have no audio file. Prints what it did and why; the old tables go to <data_dir>/.backup-<n>."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main

SHOWN = 30


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", help="directory to repair")
    parser.add_argument("--task", help="write a missing utt2task with this task, and a missing prompt with its default")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Repair and report."""
    args = build_parser().parse_args(argv)
    from pam_espnet.data.edit import fix

    report, backup = fix(args.data_dir, task=args.task)
    for line in report[:SHOWN]:
        print(line)
    if backup is None:
        print(f"{args.data_dir}: nothing to repair")
    else:
        more = f"{len(report) - SHOWN} more; " if len(report) > SHOWN else ""
        print(f"{more}old tables and the full report: {backup}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
