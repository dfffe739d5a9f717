"""Pack a trained, decoded and scored experiment and send it to the Hugging Face hub, with a model card.

    python -m pam_espnet.bin.pam_upload --exp exp/mine --repo me/mine --dry_run     # shows what would be sent
    python -m pam_espnet.bin.pam_upload --exp exp/mine --repo me/mine

Asks nothing. A new repository is private unless --public true is given. The files and their sizes are printed before
anything is sent, all of it in one commit. The token is that of `hf auth login`, or $HF_TOKEN. Afterwards
pam_inference --model me/mine answers with it, and pam_espnet.load("me/mine") loads it.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, type=Path, help="experiment directory")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository on the hub; made if need be")
    parser.add_argument("--decode_name", default="beam", help="answer as EXP/decode_NAME was decoded (default: beam)")
    for name, words in (
        ("public", "whether all may see it (false)"),
        ("with_models", "send pretrained models, too, where their licences allow it (false)"),
    ):
        parser.add_argument(f"--{name}", choices=("true", "false"), default="false", help=words)
    parser.add_argument("--dry_run", action="store_true", help="show what would be sent, and stop")
    args = parser.parse_args(argv)
    from pam_espnet.hub.upload import upload

    upload(
        args.exp,
        args.repo,
        args.decode_name,
        public=args.public == "true",
        with_models=args.with_models == "true",
        dry_run=args.dry_run,
        show=partial(print, flush=True),  # before it is sent, also where it goes to a file
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
