#!/usr/bin/env python3
"""Check Kaldi-style data directories: every mistake with its file, its line and what to do about it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", nargs="+", help="directory with wav.scp text prompt utt2task utt2spk")
    parser.add_argument("--allow-pipes", action="store_true", help="accept commands ('cmd |') in wav.scp")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Validate each directory; stops at the first bad one."""
    args = build_parser().parse_args(argv)
    from pam_espnet.data.datadir import validate

    for path in args.data_dir:
        data = validate(path, allow_pipes=args.allow_pipes)
        tasks = ", ".join(f"{task} {count}" for task, count in data.per_task().items())
        print(f"{path}: {len(data)} utterances ({tasks}), {len(data.wav)} recordings: good")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
