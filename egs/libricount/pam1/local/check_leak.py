"""Refuse a data directory that has voices of LibriSpeech's test sets (LibriCount's are those of test-clean) in it.

Reads SPEAKERS.TXT and, in each directory, ``utt2spk``, ``mix_speakers`` and ``mix_sources``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

LOCAL = Path(__file__).resolve().parent
sys.path.insert(0, str(LOCAL.parents[3]))

from pam_espnet.cli import run_main  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Check each directory; stop at the first that is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--librispeech", type=Path, required=True, help="folder with SPEAKERS.TXT or LibriSpeech/")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="directories that are to be trained on")
    args = parser.parse_args(argv)
    from pam_espnet.data.leakage import readers_of_tests, refuse_barred
    from pam_espnet.data.librispeech import find_root, read_speakers

    barred = readers_of_tests(read_speakers(find_root(args.librispeech, [])))
    for folder in args.data:
        refuse_barred(folder, barred)
        print(f"{folder}: none of the {len(barred)} readers of the test sets")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
