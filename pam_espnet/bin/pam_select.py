"""Choose the epoch whose model an experiment keeps.

--by scores decodes the validation set with every epoch that training kept, scores each task by its own metric, and
takes the epoch with the highest mean of the normalised scores; SELECTION.md and selection.json in the experiment have
them all. What was decoded before is kept. --by loss goes back to the average that training left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.cli import add_compute_options, compute_device, run_main, run_record


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, help="experiment directory, trained")
    parser.add_argument("--by", choices=("scores", "loss"), default="scores", help="criterion (default: scores)")
    parser.add_argument("--data", help="formatted validation set, dump/raw/<set>; needed for scores")
    parser.add_argument("--config", help="YAML with options of decoding (conf/decode.yaml)")
    parser.add_argument("--batch_size", type=int, default=8, help="utterances decoded together (default: 8)")
    parser.add_argument("--caption_reference", type=float, default=1.0, help="CIDEr-D that counts as 1 (default: 1)")
    add_compute_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.by == "scores" and not args.data:
        parser.error("--by scores needs --data, the validation set")
    from pathlib import Path

    from pam_espnet.config import load_yaml
    from pam_espnet.decode.shards import DecodeOptions
    from pam_espnet.train.selection import TABLE, select_by_loss, select_by_scores

    if args.by == "loss":
        print(f"wrote {select_by_loss(args.exp)}")
        return 0
    record = select_by_scores(
        args.exp,
        args.data,
        load_yaml(args.config) if args.config else {},
        DecodeOptions(args.batch_size),
        run_record("pam_select.py"),
        device=compute_device(args),
        dtype=args.dtype,
        caption_reference=args.caption_reference,
    )
    print((Path(args.exp) / TABLE).read_text(encoding="utf-8"))
    print(f"{args.exp}: the model is that of epoch {record['selected']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
