"""Run one frozen encoder once over a formatted data directory and keep its hidden states.

Writes dump/feats/<encoder>/<set>/feats.scp (Kaldi ark, float32, (frames, layers x width)) and
dump/feats/<encoder>/spec.json. Resumable; a cache made with other weights, layers or audio is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import chosen_device, run_main


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="experiment configuration (frontend_conf.encoders)")
    parser.add_argument("--encoder", nargs="*", help="names or numbers (from 1); default: all that the fusion uses")
    parser.add_argument("--data", nargs="+", required=True, help="formatted data directories, dump/raw/<set>")
    parser.add_argument("--out", default="dump/feats", help="root of the cache (default: dump/feats)")
    parser.add_argument("--rebuild", choices=("true", "false"), default="false", help="compute again what is there")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 0 = torch's choice)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = build_parser().parse_args(argv)
    import torch

    from pam_espnet.config import load_yaml, used_encoders
    from pam_espnet.frontend.caching import cache_encoder

    if args.threads:
        torch.set_num_threads(args.threads)
    config = load_yaml(args.config)
    frontend_conf = config.get("frontend_conf") or {}
    device = chosen_device(args.device)
    names = used_encoders(config)
    for name in args.encoder or names:
        if name not in names and name.isdigit() and 1 <= int(name) <= len(names):
            name = names[int(name) - 1]
        for data in args.data:
            cache = cache_encoder(
                name, frontend_conf, data, Path(args.out), rebuild=args.rebuild == "true", device=device
            )
            print(f"{cache.scp}: {cache.num_layers} layers of width {cache.width}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
