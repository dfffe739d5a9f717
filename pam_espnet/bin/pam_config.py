"""Merge configuration files and changes into one file, the configuration of an experiment."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.bin._cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", nargs="+", required=True, help="YAML files; later ones are laid over earlier ones")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.SUB=VALUE", help="changes on top (YAML values)")
    parser.add_argument("--out", required=True, help="file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = build_parser().parse_args(argv)
    from pam_espnet.config import resolve, write_config

    written = write_config(resolve(args.config, args.set), args.out)
    print(f"{args.out}: {'written' if written else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
