"""Answer a prompt about recordings with a packed or trained model.

    python -m pam_espnet.bin.pam_inference --model mine.zip dog.wav --prompt "Describe the sounds."

On a terminal the answer is shown while it grows: the best one so far, which may still change its mind. The final answer
goes to standard output, alone; of several recordings each with its file name and a tab before it, or as JSON lines. The
recordings are treated as stage 2 treats data: any sample rate, channels averaged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pam_espnet.cli import chosen_device, run_main

if TYPE_CHECKING:
    from pam_espnet.decode.speech_llm import PartialAnswer, SpeechLLM

MIN_SECONDS = 0.1  # of a recording, as in stage 2


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wavs", nargs="+", metavar="WAV", help="audio files, any format and sample rate")
    parser.add_argument("--prompt", help="what to ask (default: the prompt of --task)")
    parser.add_argument("--task", help="asr, count or caption: its default prompt, its answer set")
    parser.add_argument("--json", action="store_true", help="one JSON object per recording: n-best, scores, routing")
    add_model_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What ``load_model`` reads, and ``--max_seconds``."""
    parser.add_argument("--model", required=True, help="archive of pam_pack, unpacked one, or experiment directory")
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="where a pretrained model of the archive is; may be given several times "
        "(default: where the recipe has it, seen from here, or the Hugging Face hub)",
    )
    parser.add_argument("--config", help="YAML with options of decoding (default: as it was packed, or decoded)")
    parser.add_argument("--cache", help="folder in which an archive is unpacked (default: beside it)")
    parser.add_argument("--max_seconds", type=float, default=30.0, help="longest recording (default: 30)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        help="precision of the LLM; int8: its weights in the search, on x86 CPUs (default: as it was decoded)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 0 = torch's choice)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = build_parser().parse_args(argv)
    from pam_espnet.data.tasks import task_spec
    from pam_espnet.errors import ConfigError

    if args.prompt is None and args.task is None:
        raise ConfigError('nothing to answer: give --prompt "...", or a --task for its default prompt')
    prompt = args.prompt if args.prompt is not None else task_spec(args.task).default_prompt
    if not prompt.strip():
        raise ConfigError("--prompt is empty")
    if args.task is not None:
        task_spec(args.task)
    for wav in args.wavs:  # before a model is loaded for nothing
        if not Path(wav).is_file():
            raise ConfigError(f"there is no file {wav}")

    from pam_espnet.data.format import Settings, read_formatted

    model = load_model(args)
    settings = Settings(model.model.frontend.sample_rate, "flac", args.max_seconds, MIN_SECONDS)
    tasks = None if args.task is None else [args.task]
    for wav in args.wavs:
        wave = read_formatted(wav, settings)
        (answer,) = model.answer([wave], [prompt], tasks, on_partial=_show if sys.stderr.isatty() else None)
        if args.json:
            nbest = [{"text": text, "score": score} for text, score in zip(answer.texts, answer.scores, strict=True)]
            found = {
                "wav": wav,
                "prompt": prompt,
                "task": args.task,
                "seconds_audio": round(len(wave) / settings.sample_rate, 4),
                "answer": answer.texts[0],
                "hypotheses": nbest,
                "answer_log_probs": answer.answer_log_probs,
                "routing": answer.routing,
            }
            print(json.dumps(found, ensure_ascii=False), flush=True)
        else:
            print(answer.texts[0] if len(args.wavs) == 1 else f"{wav}\t{answer.texts[0]}", flush=True)
    return 0


def model_folders(given: Sequence[str]) -> dict[str, str]:
    """``["llm=DIR"]`` -> ``{"llm": "DIR"}``; ConfigError for what looks otherwise."""
    from pam_espnet.errors import ConfigError

    found = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not (name and folder):
            raise ConfigError(f"--models must look like llm=DIR, got {text!r}")
        found[name] = folder
    return found


def load_model(args: argparse.Namespace) -> SpeechLLM:
    """By the options of ``add_model_options``; ConfigError where they cannot work."""
    from pam_espnet.errors import ConfigError

    if args.max_seconds <= MIN_SECONDS:
        raise ConfigError(f"--max_seconds must be more than {MIN_SECONDS}, got {args.max_seconds}")
    models = model_folders(args.models)

    import torch

    from pam_espnet.packing.load import load

    if args.threads:
        torch.set_num_threads(args.threads)
    device = chosen_device(args.device)
    return load(args.model, models, args.config, device, args.dtype, args.cache)


def _show(partials: list[PartialAnswer]) -> None:
    """The answer so far on one line of the terminal, its end where it is longer than that."""
    (one,) = partials
    text = "" if one.done else one.text[1 - shutil.get_terminal_size().columns :]
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
