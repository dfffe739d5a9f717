"""Reports of early exit side by side, as JSON of tables in READMEs.

    python -m pam_espnet.bin.pam_exit_compare --reports plain=exp/plain/exit_report/exit_report.json \
        joint=exp/joint/exit_report/exit_report.json --set test_asr --out exit

The reports are of pam_exit_report --calibration, with the same candidate blocks; those with the same NAME are seeds of
one model, whose means are shown. Writes to <out> BLOCKS.json (how often each candidate predicts the last block's
token), GATES.json (how often each measure finds the exit block, how fast it may be) and, of reports with a sweep,
SAVINGS.json (blocks of a step at a bounded loss of WER). `pam_evidence --readme README.md` writes the tables between
<!-- table: exit/GATES.json --> and <!-- end -->.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", required=True, nargs="+", metavar="NAME=FILE", help="exit_report.json files")
    parser.add_argument("--set", required=True, help="test set of recognition that all of them have")
    parser.add_argument("--out", required=True, type=Path, help="folder of the JSON files")
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="these of them alone")
    args = parser.parse_args(argv)
    if wrong := [one for one in args.reports if "=" not in one]:
        parser.error(f"--reports: {wrong[0]!r} is not NAME=FILE")
    from pam_espnet.early_exit.comparison import comparison
    from pam_espnet.fileio import read_json, write_json

    files: dict[str, list[str]] = {}
    for name, _, file in (one.partition("=") for one in args.reports):
        files.setdefault(name, []).append(file)
    tables = comparison({name: [read_json(file) for file in some] for name, some in files.items()}, args.set)
    if unknown := sorted(set(args.tables or ()) - set(tables)):
        parser.error(f"--tables: {', '.join(unknown)} not among {', '.join(tables)}")
    for name, rows in tables.items():
        if args.tables and name not in args.tables:
            continue
        write_json(args.out / f"{name}.json", {"set": args.set, "reports": files, "rows": rows})
        print(f"wrote {args.out / name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
