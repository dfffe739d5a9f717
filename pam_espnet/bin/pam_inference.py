"""Answer a prompt about recordings with a packed or trained model.

    python -m pam_espnet.bin.pam_inference --model mine.zip dog.wav --prompt "Describe the sounds."

On a terminal the answer is shown while it grows: the best one so far, which may still change. The final answer goes to
standard output, alone; of several recordings each with its file name and a tab before it, or as JSON lines. A recording
that cannot be used costs no other its answer: it is listed at the end, and the exit status is 1. Recordings are treated
as stage 2 treats data: any sample rate, channels averaged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pam_espnet.cli import add_compute_options, compute_device, run_main
from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError, PamError, printable

if TYPE_CHECKING:
    from pam_espnet.decode.speech_llm import PartialAnswer, SpeechLLM

MIN_SECONDS = 0.1  # of a recording, as in stage 2


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``load_model``, and ``--max_seconds``."""
    parser.add_argument("--model", required=True, help="package (zip file or folder), or experiment directory")
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="where a pretrained model of the package is; may be given several times "
        "(default: where the recipe has it, seen from here, or the Hugging Face hub)",
    )
    parser.add_argument("--config", help="YAML with options of decoding (default: as it was packed, or decoded)")
    parser.add_argument("--max_seconds", type=float, default=30.0, help="longest recording (default: 30)")
    add_compute_options(parser, default_dtype="as it was decoded")


def load_model(args: argparse.Namespace) -> SpeechLLM:
    """The model of ``add_model_options``; ConfigError where they cannot work."""
    check_number(args.max_seconds, "--max_seconds", above=MIN_SECONDS)
    folders = dict(text.partition("=")[::2] for text in args.models)
    if wrong := [name for name, folder in folders.items() if not (name and folder)]:
        raise ConfigError(f"--models must look like llm=DIR, got {wrong[0]!r}")
    device = compute_device(args)

    from pam_espnet.package import load

    return load(args.model, folders, args.config, device, args.dtype)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wavs", nargs="+", metavar="WAV", help="audio files, any format and sample rate")
    parser.add_argument("--prompt", help="what to ask (default: the prompt of --task)")
    parser.add_argument("--task", help="asr, count or caption: its default prompt, its answer set")
    parser.add_argument("--json", action="store_true", help="one JSON object per recording: n-best, scores, routing")
    add_model_options(parser)
    args = parser.parse_args(argv)
    from pam_espnet.data.tasks import task_spec

    if args.prompt is None and args.task is None:
        raise ConfigError('nothing to answer: give --prompt "...", or a --task for its default prompt')
    if args.task is not None:
        spec = task_spec(args.task)
        args.prompt = spec.default_prompt if args.prompt is None else args.prompt
    if not args.prompt.strip():
        raise ConfigError("--prompt is empty")
    if not any(map(os.path.isfile, args.wavs)):  # before a model is loaded for nothing
        raise ConfigError(f"there is no file {args.wavs[0]}")
    model = load_model(args)
    failed = []
    for wav in args.wavs:
        name = printable(wav)
        try:
            found = answer(model, wav, args.prompt, args.task, args.max_seconds)
        except PamError as error:
            if len(args.wavs) == 1:
                raise
            failed.append(f"error: {str(error).splitlines()[0]}")
            continue
        if args.json:
            print(json.dumps({"wav": name, **found}, ensure_ascii=False), flush=True)
        else:
            print(found["answer"] if len(args.wavs) == 1 else f"{name}\t{found['answer']}", flush=True)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def answer(model: SpeechLLM, wav: str, prompt: str, task: str | None, max_seconds: float) -> dict[str, Any]:
    """One recording's answer, n-best, scores and routing, as JSON values; PamError where there is none."""
    from pam_espnet.data.format import Settings, read_formatted

    settings = Settings(model.model.frontend.sample_rate, "flac", max_seconds, MIN_SECONDS)
    wave = read_formatted(wav, settings)
    show = _show if sys.stderr.isatty() else None
    (found,) = model.answer([wave], [prompt], None if task is None else [task], on_partial=show)
    return {
        "prompt": prompt,
        "task": task,
        "seconds_audio": round(len(wave) / settings.sample_rate, 4),
        "answer": found.texts[0],
        "hypotheses": [{"text": text, "score": score} for text, score in zip(found.texts, found.scores, strict=True)],
        "answer_log_probs": found.answer_log_probs,
        "routing": found.routing,
    }


def _show(partials: list[PartialAnswer]) -> None:
    """The answer so far on one line of the terminal, its end where it is longer than that."""
    (one,) = partials
    text = "" if one.done else one.text[1 - shutil.get_terminal_size().columns :]
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
