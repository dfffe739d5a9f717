"""Pack a trained, decoded and scored experiment into one file.

    python -m pam_espnet.bin.pam_pack --exp exp/mine --out mine.zip

The file holds the configuration, the trained weights, the options it was decoded with, the score table and licence
notes. The pretrained models are not in it: it names them by id and commit, or by checksum and how to get them. The same
experiment gives the same bytes. pam_inference answers with it, pam_espnet.load loads it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, type=Path, help="experiment directory")
    parser.add_argument("--out", required=True, type=Path, help="archive to write (.zip)")
    parser.add_argument(
        "--decode_name", default="beam", help="the archive answers as EXP/decode_NAME was decoded (default: beam)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = build_parser().parse_args(argv)
    from pam_espnet.errors import ConfigError

    if args.out.suffix != ".zip":
        raise ConfigError(f"--out {args.out}: must end in .zip")

    from pam_espnet.packing.pack import pack

    manifest = pack(args.exp, args.out, args.decode_name)
    for model in manifest["models"]:
        print(f"{model['name']}: {model['source']}; get it {model['get']}")
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB, {len(manifest['members'])} members)")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
