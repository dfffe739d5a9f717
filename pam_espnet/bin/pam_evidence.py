"""Evidence over seeds: a file for each finished training, tables with intervals over seeds, tables in READMEs.

--exp EXP --train DIR --times FILE --name NAME --size SIZE   write evidence/NAME_SIZE_<seed>.json
--table SIZE                                                 EVIDENCE_SIZE.md, .json and pictures from evidence/
--readme FILE...                                             write the tables anew between <!-- table: X.json -->
                                                             and <!-- end -->
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", type=Path, help="a trained, decoded and scored experiment")
    parser.add_argument("--train", type=Path, help="of --exp: the formatted training set")
    parser.add_argument("--times", type=Path, help='of --exp: lines "begin" and "WALL USER SYSTEM" seconds of attempts')
    parser.add_argument("--name", help="of --exp: the row of the table")
    parser.add_argument("--size", help="of --exp: the recipe's size")
    parser.add_argument("--settings", default="", help="of --exp: changes to the configuration beside the seed")
    parser.add_argument("--table", metavar="SIZE", help="make the table of this size")
    parser.add_argument("--readme", nargs="+", type=Path, default=[], metavar="FILE", help="READMEs with marked tables")
    parser.add_argument("--folder", type=Path, default=Path("evidence"), help="folder of the files (evidence)")
    args = parser.parse_args(argv)
    if args.exp and not all((args.train, args.times, args.name, args.size)):
        parser.error("--exp needs --train, --times, --name and --size")
    if not (args.exp or args.table or args.readme):
        parser.error("give --exp, --table or --readme")
    from pam_espnet.fileio import write_text
    from pam_espnet.score.evidence import gather
    from pam_espnet.score.evidence_tables import readme_tables, write_tables

    if args.exp:
        names = {"name": args.name, "size": args.size, "settings": args.settings}
        print(f"wrote {gather(args.exp, args.train, args.times, args.folder, **names)}")
    if args.table:
        print(write_tables(args.folder, args.table, f"EVIDENCE_{args.table}"))
    for readme in args.readme:
        write_text(readme, readme_tables(readme))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
