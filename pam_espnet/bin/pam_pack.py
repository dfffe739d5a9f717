"""Pack a trained, decoded and scored experiment into one zip file or a folder.

    python -m pam_espnet.bin.pam_pack --exp exp/mine --out mine.zip

It holds the configuration, the trained weights, the options it was decoded with, the score table and licence files. The
pretrained models are not in it (unless --with_models true): it names them by id and commit, or by checksum and how to
get them. The same experiment gives the same bytes. pam_inference answers with it, pam_espnet.load loads it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, type=Path, help="experiment directory")
    parser.add_argument("--out", required=True, type=Path, help="what to write: a file that ends in .zip, or a folder")
    parser.add_argument("--decode_name", default="beam", help="answer as EXP/decode_NAME was decoded (default: beam)")
    parser.add_argument(
        "--with_models",
        choices=("true", "false"),
        default="false",
        help="put pretrained models into it, those whose licences allow it (false)",
    )
    args = parser.parse_args(argv)
    from pam_espnet.package import save

    manifest = save(args.exp, args.out, args.decode_name, args.with_models == "true")
    for model in manifest["models"]:
        print(f"{model['name']}: {model['source']}; get it {model['get']}")
    print(f"wrote {args.out} ({len(manifest['members'])} files)")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
