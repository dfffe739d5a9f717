"""Refuse to train or validate on an utterance or a speaker of a set that the model is scored on.

LibriCount is mixed from LibriSpeech's test-clean: what may be trained on depends on all test sets together. Reads
``utt2spk``, ``mix_speakers`` and ``mix_sources`` of the directories that stage 1 wrote; pam.sh calls it in stage 3.
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
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="directories that are to be trained on")
    parser.add_argument("--tests", type=Path, nargs="+", required=True, help="directories that are scored")
    args = parser.parse_args(argv)
    from pam_espnet.data.leakage import refuse_shared

    for folder in args.train:
        refuse_shared(folder, args.tests)
        print(f"{folder}: no utterance and no speaker of {', '.join(path.name for path in args.tests)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
