"""Report an experiment, or put several side by side.

With --exp: reads every decode_*/*/scores.json and the learning curve, prints one table over all test sets and writes
RESULTS.md, RESULTS.txt, results.json and pictures into the experiment. With --compare: one table over experiments (or
single decode directories), with paired differences to the first of them and their significance, printed, and written
to --output and, as JSON, beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples: pam_report.py --exp exp/x | pam_report.py --compare exp/pam exp/average --output RESULTS.md",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--exp", help="experiment directory to report")
    what.add_argument("--compare", nargs="+", metavar="DIR", help="experiments, or their decode_* directories")
    parser.add_argument("--output", help="Markdown file (.md) of --compare")
    parser.add_argument("--title", default="Results", help="heading of --compare (default: Results)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.compare and not (args.output or "").endswith(".md"):
        parser.error("--compare needs --output FILE.md")
    if args.exp and args.output:
        parser.error("--output belongs to --compare; --exp writes into the experiment")
    if args.compare:
        from pam_espnet.score.compare import compare

        print(compare(args.compare, args.output, title=args.title))
        print(f"wrote {args.output}")
    else:
        from pam_espnet.score.report import write_report

        report = write_report(args.exp)
        print(report.with_suffix(".txt").read_text(encoding="utf-8"))
        print(f"wrote {report}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
