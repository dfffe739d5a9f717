#!/usr/bin/env python3
"""Split a data directory into n parts, <data_dir>/split<n>/1 to n; every utterance is in exactly one of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", help="directory to split")
    parser.add_argument("parts", type=int, help="number of parts")
    parser.add_argument("--per-speaker", action="store_true", help="keep the utterances of a speaker together")
    parser.add_argument("--out", help="write the parts to <out>/1 to n instead of <data_dir>/split<n>")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Split and say where the parts are."""
    args = build_parser().parse_args(argv)
    from pam_espnet.data.datadir import DataDir
    from pam_espnet.data.edit import save_dir, split

    out = Path(args.out or Path(args.data_dir) / f"split{args.parts}")
    parts = split(DataDir.load(args.data_dir), args.parts, per_speaker=args.per_speaker)
    for number, part in enumerate(parts, 1):
        save_dir(part, out / str(number))
    print(f"{out}/1 to {out}/{args.parts}: {', '.join(str(len(part)) for part in parts)} utterances")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
