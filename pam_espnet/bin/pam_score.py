"""Score a decoded test set, every task by its own metrics, each with a 95 % interval: WER and CER; count accuracy and
error; CIDEr-D, ROUGE-L, BLEU, and METEOR, SPICE, SPIDEr and FENSE where tools/installers/ has put what they need.

Writes scores.json and utt_scores.jsonl into the decode directory and prints the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: pam_score.py --decode_dir exp/x/decode_beam/test_asr --data_dir dump/raw/test_asr",
    )
    parser.add_argument("--decode_dir", required=True, help="exp/<tag>/decode_<name>/<set>, as decoding wrote it")
    parser.add_argument("--data_dir", required=True, help="data directory with the references of the same set")
    parser.add_argument(
        "--ids",
        help="file of utterance keys (first word of each line): score those of the set that it names alone, into "
        "exp/<tag>/decode_<name>.<stem of FILE>/<set>",
        metavar="FILE",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples behind each interval")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Score one directory; returns the exit status."""
    args = build_parser().parse_args(argv)
    from pam_espnet.score.scoring import format_scores, score_directory, subset_folder

    scores = score_directory(args.decode_dir, args.data_dir, ids=args.ids, resamples=args.resamples, seed=args.seed)
    print(format_scores(scores))
    target = subset_folder(Path(args.decode_dir), Path(args.ids)) if args.ids else Path(args.decode_dir)
    print(f"wrote {target}/scores.json")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
