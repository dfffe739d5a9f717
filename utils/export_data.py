#!/usr/bin/env python3
"""Write a data directory as a manifest for another toolkit: a JSON object per line.

    --kind messages    conversations with messages and audios: ms-swift (--dataset OUT), LLaMA-Factory ("sharegpt")
    --kind nemo        audio_filepath, offset, duration, text

utils/import_data.py reads both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="DATA", help="data directory, as in data/ or dump/<size>/raw")
    parser.add_argument("out", metavar="OUT", type=Path, help="manifest to write (.jsonl)")
    parser.add_argument("--kind", choices=("messages", "nemo"), default="messages", help="which (%(default)s)")
    parser.add_argument("--audio", type=Path, metavar="DIR", help="folder for what is in archives or a piece of a file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export and print what was left out."""
    args = build_parser().parse_args(argv)
    from pam_espnet.data.datadir import DataDir
    from pam_espnet.data.exchange.export import export

    data = DataDir.load(args.source)
    left_out = export(data, args.out, args.kind, args.audio)
    print(f"{args.out}: {len(data) - len(left_out)} of {len(data)} utterances")
    for utt, reason in left_out.items():
        print(f"  left out {utt}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
