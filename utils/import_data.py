#!/usr/bin/env python3
"""Make a data directory from data as other toolkits have it. SOURCE is one of:

    owner/name           a dataset of the Hugging Face hub, streamed (--split, --config, --revision)
    a.parquet, folder/   the same as local files (parquet, arrow, save_to_disk)
    a.jsonl, a.json      conversations as in ms-swift and LLaMA-Factory (messages, audios), NeMo's manifests
    a.jsonl.gz           cuts of lhotse, or any of these
    a.csv, folder/       a CSV with a header line, such as file_name,text, and recordings

Recordings that are files stay where they are; those that are bytes in the source go to archives in OUT. A killed import
goes on where it stopped. Rows that cannot be used are listed with the reason in OUT/left_out.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="what to read")
    parser.add_argument("out", metavar="OUT", type=Path, help="data directory to write")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help="columns without a usual name; fields: id, audio, text, prompt, task, speaker, start, end and duration"
        " (seconds), references (several columns separated by commas)",
    )
    parser.add_argument("--task", default="", help="task of rows that have none: asr, count, caption, verify")
    parser.add_argument("--prompt", default="", help="question of rows that have none (the task's default prompt)")
    parser.add_argument("--prompts", type=Path, help="file of wordings instead: each utterance draws one")
    parser.add_argument("--seed", type=int, default=2026, help="of the draws (%(default)s)")
    parser.add_argument("--audio_root", type=Path, help="where relative paths start (folder of SOURCE)")
    parser.add_argument("--copy", action="store_true", help="put recordings that are files into archives, too")
    parser.add_argument("--archive_mb", type=float, default=1000, help="size of an archive (%(default)s)")
    parser.add_argument("--first", type=int, metavar="N", help="take the first N rows only")
    for name in ("split", "config", "revision"):
        parser.add_argument(f"--{name}", help=f"{name} of a Hugging Face dataset")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Import and print the report."""
    args = build_parser().parse_args(argv)
    from pam_espnet.config import check_number
    from pam_espnet.data.exchange.convert import Converter
    from pam_espnet.data.exchange.rows import parse_columns
    from pam_espnet.data.exchange.sources import open_source
    from pam_espnet.data.exchange.writer import KEY_NAME, import_rows
    from pam_espnet.data.prompts import read_prompts
    from pam_espnet.errors import ConfigError
    from pam_espnet.fileio import read_json

    check_number(args.archive_mb, "--archive_mb", at_least=1)
    if args.first is not None:
        check_number(args.first, "--first", at_least=1)
    if args.prompt and args.prompts:
        raise ConfigError("--prompt and --prompts: one of the two, please")
    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt] if args.prompt else []
    columns = parse_columns(args.columns)
    parts = {name: value for name in ("split", "config", "revision") if (value := getattr(args, name))}
    begun = read_json(args.out / KEY_NAME) if (args.out / KEY_NAME).is_file() else {}
    if begun.get("source") == args.source and (commit := begun["stamp"].get("commit")):
        parts.setdefault("revision", commit)  # the hub's may have moved on since
    source = open_source(args.source, parts).map_columns(columns)
    root = args.audio_root if args.audio_root is not None else source.root
    converter = Converter(source, args.task, prompts, args.seed, root)
    options = {"columns": columns, "task": args.task, "prompts": prompts, "seed": args.seed, "audio_root": str(root)}
    report = import_rows(
        source, converter, args.out, options, archive_mb=args.archive_mb, copy=args.copy, first=args.first
    )
    print("\n".join(report.lines(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
