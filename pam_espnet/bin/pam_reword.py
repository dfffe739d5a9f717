"""Write formatted test sets once more for every other wording of their questions, so that they can be decoded too.

Prints one line for each directory written, <set>/<number of the wording>, below --out. Wording 1 is what scoring asks
anyway. The audio is not copied.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="formatted test sets, dump/raw/<set>")
    parser.add_argument("--prompts", type=Path, default=Path("conf/prompts"), help="has <task>.txt (conf/prompts)")
    parser.add_argument("--out", required=True, type=Path, help="folder for <set>/<number>")
    args = parser.parse_args(argv)
    from pam_espnet.data.datadir import DataDir
    from pam_espnet.data.edit import reword
    from pam_espnet.data.prompts import read_wordings

    for data in args.data:
        files = {task: args.prompts / f"{task}.txt" for task in DataDir.load(data).per_task()}
        for written in reword(data, read_wordings(files), args.out / data.name):
            print(written.relative_to(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
