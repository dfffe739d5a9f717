"""Answer one prompt about one recording with a trained experiment.

    python -m pam_espnet.bin.pam_answer --exp exp/mine --wav dog.wav --prompt "Describe the sounds."

On a terminal the answer is shown while it grows: the best one so far, which may still change its mind. The final answer
goes to standard output, alone. The recording is treated as stage 2 treats data: any sample rate, channels averaged.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pam_espnet.bin._cli import run_main

if TYPE_CHECKING:
    from pam_espnet.inference import PartialAnswer

MIN_SECONDS = 0.1  # of a recording, as in stage 2


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, help="experiment directory (config.yaml, model.safetensors)")
    parser.add_argument("--wav", required=True, help="audio file, any format and sample rate")
    parser.add_argument("--prompt", help="what to ask (default: the prompt of --task)")
    parser.add_argument("--task", help="asr, count or caption: its default prompt, its answer set")
    parser.add_argument("--config", help="YAML with options of decoding (conf/decode.yaml; pam_espnet/answering.py)")
    parser.add_argument("--max_seconds", type=float, default=30.0, help="longest recording (default: 30)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision of the LLM (default: as trained)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 0 = torch's choice)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = build_parser().parse_args(argv)
    from pam_espnet.config import load_yaml
    from pam_espnet.data.tasks import task_spec
    from pam_espnet.errors import ConfigError

    if args.prompt is None and args.task is None:
        raise ConfigError('nothing to answer: give --prompt "...", or a --task for its default prompt')
    if args.max_seconds <= MIN_SECONDS:
        raise ConfigError(f"--max_seconds must be more than {MIN_SECONDS}, got {args.max_seconds}")
    prompt = args.prompt if args.prompt is not None else task_spec(args.task).default_prompt
    if not prompt.strip():
        raise ConfigError("--prompt is empty")
    if args.task is not None:
        task_spec(args.task)
    if not Path(args.wav).is_file():  # before a model is loaded for nothing
        raise ConfigError(f"--wav: there is no file {args.wav}")
    options = load_yaml(args.config) if args.config else {}

    import torch

    from pam_espnet.answering import AnswerOptions
    from pam_espnet.data.format import Settings, read_formatted
    from pam_espnet.inference import SpeechLLM

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    model = SpeechLLM.load(args.exp, AnswerOptions.from_dict(options, args.config or "--config"), device, args.dtype)
    settings = Settings(model.model.frontend.sample_rate, "flac", args.max_seconds, MIN_SECONDS)
    wave = read_formatted(args.wav, settings)
    tasks = None if args.task is None else [args.task]
    (answer,) = model.answer([wave], [prompt], tasks, on_partial=_show if sys.stderr.isatty() else None)
    print(answer.texts[0])
    return 0


def _show(partials: list[PartialAnswer]) -> None:
    """The answer so far on one line of the terminal, its end where it is longer than that."""
    (one,) = partials
    text = "" if one.done else one.text[1 - shutil.get_terminal_size().columns :]
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
