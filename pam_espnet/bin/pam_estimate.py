"""Estimate memory, disk and time of a training from its configuration alone; no weights of transformers are loaded.

Prints the parameters of each part (frozen and trained, exact), the memory of a step, the size of the feature cache and
a time at an assumed speed. How each is reckoned stands in pam_espnet/estimate/formulas.py. A part whose config.json
is on this machine neither in a folder nor in Hugging Face's cache is "unknown", unless --fetch true may get the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, help="YAML files; later ones are laid over earlier ones")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.SUB=VALUE", help="changes on top (YAML values)")
    parser.add_argument("--data", nargs="*", default=[], help="formatted data: what is trained on, then what is cached")
    parser.add_argument("--ngpu", type=int, default=0, help="GPUs that share a batch (default: 0 = CPU)")
    parser.add_argument("--use_cache", choices=("true", "false"), default="true", help="train on cached hidden states")
    parser.add_argument("--fetch", choices=("true", "false"), default="false", help="get a missing config.json")
    parser.add_argument(
        "--tflops", type=float, help="assumed sustained speed of a device, 10^12 FLOP/s (GPU: 100, CPU: 0.05)"
    )
    parser.add_argument(
        "--encoder_tflops", type=float, help="the same for the encoders, in float32 (GPU: 20, CPU: 0.05)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = build_parser().parse_args(argv)
    if args.fetch == "false":
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no waiting for a hub out of reach
    from pam_espnet.config import resolve
    from pam_espnet.estimate.report import Assumptions, estimate

    # Round numbers to begin with, not measured on any machine.
    fast, slow = (100.0, 20.0) if args.ngpu else (0.05, 0.05)
    tflops = fast if args.tflops is None else args.tflops
    encoder_tflops = slow if args.encoder_tflops is None else args.encoder_tflops
    assumed = Assumptions(args.ngpu, args.use_cache == "true", tflops, encoder_tflops)
    print(estimate(resolve(args.config, args.set), args.data, assumed), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
