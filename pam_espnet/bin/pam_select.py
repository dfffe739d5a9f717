"""Choose the epoch whose model an experiment keeps.

--by scores decodes the validation set with every epoch that training kept, scores each task by its own metric, and
takes the epoch with the highest mean of the normalised scores; SELECTION.md and selection.json in the experiment have
them all. What was decoded before is kept. --by loss returns to the average that training made.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import add_batch_size, add_compute_options, compute_device, run_main, run_record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, type=Path, help="experiment directory, trained")
    parser.add_argument("--by", choices=("scores", "loss"), default="scores", help="criterion (default: scores)")
    parser.add_argument("--data", type=Path, help="formatted validation set, dump/raw/<set>; needed for scores")
    parser.add_argument("--config", help="YAML with options of decoding (conf/decode.yaml)")
    add_batch_size(parser)
    add_compute_options(parser)
    args = parser.parse_args(argv)
    if args.by == "scores" and not args.data:
        parser.error("--by scores needs --data, the validation set")
    from pam_espnet.config import load_yaml
    from pam_espnet.decode.shards import DecodeOptions
    from pam_espnet.train.selection import TABLE, select_by_loss, select_by_scores

    if args.by == "loss":
        print(f"wrote {select_by_loss(args.exp)}")
        return 0
    search = load_yaml(args.config) if args.config else {}
    options, run = DecodeOptions(args.batch_size), run_record("pam_select.py")
    record = select_by_scores(args.exp, args.data, search, options, run, compute_device(args), args.dtype)
    print((args.exp / TABLE).read_text(encoding="utf-8"))
    print(f"{args.exp}: the model is that of epoch {record['selected']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
