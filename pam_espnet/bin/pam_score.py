"""Scores of decoded test sets, each task by its own metrics, each figure with a 95 % interval; reports; comparisons.

    --exp EXP --data DIR...       score EXP/decode_<name>/<set> of each set (the folder's name of DIR), then report
    --exp EXP                     the report alone: RESULTS.md, RESULTS.txt, results.json and pictures
    --decode_dir DIR --data DIR   score one decode directory, wherever it is
    --compare DIR... --output X   experiments (or their decode_* directories) in one table, with paired differences to
                                  the first of them and their significance; written to X (Markdown) and X's .json

Scoring writes scores.json and utt_scores.jsonl into the decode directory. METEOR, SPICE, SPIDEr and FENSE are computed
where tools/installers/ has put what they need.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: pam_score --exp exp/x --data dump/raw/test_asr --decode_name beam beam_audio_off",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--exp", type=Path, help="experiment directory")
    what.add_argument("--decode_dir", type=Path, help="one decode directory, as decoding wrote it")
    what.add_argument("--compare", nargs="+", metavar="DIR", help="experiments, or their decode_* directories")
    parser.add_argument(
        "--data", "--data_dir", nargs="+", type=Path, default=[], metavar="DIR", help="formatted sets, dump/raw/<set>"
    )
    parser.add_argument("--decode_name", nargs="+", default=["beam"], help="of --exp: decode_<name> (default: beam)")
    parser.add_argument(
        "--prompts", type=Path, help="of --exp: folder of <set>/<number>, the sets in other wordings (pam_reword --out)"
    )
    parser.add_argument(
        "--ids",
        help="file of utterance keys (first word of each line): score these alone, into decode_<name>.<stem of FILE>",
        type=Path,
        metavar="FILE",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples per interval (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument("--output", type=Path, help="Markdown file (.md) of --compare")
    parser.add_argument("--title", default="Results", help="heading of --compare (default: Results)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.compare) != bool(args.output) or (args.output and args.output.suffix != ".md"):
        parser.error("--compare needs --output FILE.md, and nothing else takes --output")
    if args.compare:
        from pam_espnet.score.compare import compare

        print(compare(args.compare, args.output, title=args.title))
        print(f"wrote {args.output}")
        return 0
    if args.decode_dir and len(args.data) != 1:
        parser.error("--decode_dir needs --data with the one set that was decoded")
    if args.ids and args.prompts:
        parser.error("--ids is for the first wordings; leave --prompts out")

    from pam_espnet.score.scoring import decoded_sets, format_scores, score_directory, subset_folder

    pairs = [(args.decode_dir, *args.data)]
    if args.exp:
        pairs = decoded_sets(args.exp, args.data, args.decode_name, args.prompts)
    for decode_dir, data_dir in pairs:
        scores = score_directory(decode_dir, data_dir, ids=args.ids, resamples=args.resamples, seed=args.seed)
        print(f"{subset_folder(decode_dir, args.ids)}/scores.json:\n{format_scores(scores)}\n")
    if args.exp:
        from pam_espnet.score.report import write_report

        report = write_report(args.exp)
        print(report.with_suffix(".txt").read_text(encoding="utf-8"))
        print(f"wrote {report}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
