"""Merge configuration files and changes into one file, the configuration of an experiment."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", nargs="+", required=True, help="YAML files; later ones are laid over earlier ones")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.SUB=VALUE", help="changes on top (YAML values)")
    parser.add_argument("--specs", help="root of the feature cache; adds frontend_conf.specs")
    parser.add_argument("--list_encoders", action="store_true", help="print the encoders that the fusion listens to")
    parser.add_argument("--experiment", help="experiment directory: an error if it was begun with other settings")
    parser.add_argument("--data", nargs="*", default=[], help="with --experiment: its formatted data directories")
    parser.add_argument("--out", help="file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = build_parser().parse_args(argv)
    from pam_espnet.config import add_specs, resolve, used_encoders, write_config

    config = resolve(args.config, args.set)
    if args.specs:
        config = add_specs(config, args.specs)
    if args.list_encoders:
        print("\n".join(used_encoders(config)))
    if args.experiment:
        from pam_espnet.train.experiment import begin_experiment

        begin_experiment(args.experiment, config, args.data)
    if args.out:
        written = write_config(config, args.out)
        print(f"{args.out}: {'written' if written else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
