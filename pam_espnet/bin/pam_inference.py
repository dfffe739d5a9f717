"""Answer a prompt about recordings with a packed or trained model.

    python -m pam_espnet.bin.pam_inference --model mine.zip dog.wav --prompt "Describe the sounds."

On a terminal the answer is shown while it grows: the best one so far, which may still change. The final answer goes to
standard output, alone; of several recordings each with its file name and a tab before it, or as JSON lines. On a GPU
several are answered together, as many as fit. A recording that cannot be used costs no other its answer: it is listed
at the end, and the exit status is 1. Recordings are treated as stage 2 treats data: any sample rate, channels averaged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pam_espnet.cli import add_compute_options, compute_device, run_main
from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError, PamError, printable

if TYPE_CHECKING:
    from pam_espnet.decode.speech_llm import Answer, PartialAnswer, SpeechLLM

type Show = Callable[[list[PartialAnswer]], None]
REFRESH = 0.1  # seconds between two updates of the text behind a bar
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
    from tqdm import tqdm

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
    from pam_espnet.decode.batches import MOST_UTTERANCES, cut

    failed = []
    together = MOST_UTTERANCES if model.on_gpu else 1
    shown = len(args.wavs) > 1 and sys.stderr.isatty()
    with tqdm(total=len(args.wavs), unit="wav", leave=False, dynamic_ncols=True, disable=not shown) as bar:
        show = _behind(bar) if shown else _alone()
        for wavs in cut(args.wavs, together):
            every = answer_all(model, wavs, args.prompt, args.task, args.max_seconds, show)
            for wav, found in zip(wavs, every, strict=True):
                bar.update()
                if isinstance(found, PamError):
                    if len(args.wavs) == 1:
                        raise found
                    failed.append(f"error: {str(found).splitlines()[0]}")
                    continue
                line = found["answer"] if len(args.wavs) == 1 else f"{printable(wav)}\t{found['answer']}"
                if args.json:
                    line = json.dumps({"wav": printable(wav), **found}, ensure_ascii=False)
                bar.write(line, file=sys.stdout)
                sys.stdout.flush()
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def answer(model: SpeechLLM, wav: str, prompt: str, task: str | None, max_seconds: float) -> dict[str, Any]:
    """One recording's answer, n-best, scores and routing, as JSON values; PamError where there is none."""
    (found,) = answer_all(model, [wav], prompt, task, max_seconds, _alone())
    if isinstance(found, PamError):
        raise found
    return found


def answer_all(
    model: SpeechLLM, wavs: Sequence[str], prompt: str, task: str | None, max_seconds: float, show: Show | None
) -> list[dict[str, Any] | PamError]:
    """``answer`` of each, or why there is none; ``show`` is called with partial answers."""
    from pam_espnet.data.format import Settings, read_formatted
    from pam_espnet.decode.batches import in_batches, plan_batches, split

    settings = Settings(model.model.frontend.sample_rate, "flac", max_seconds, MIN_SECONDS)
    found: list[dict[str, Any] | PamError] = [ConfigError("not read")] * len(wavs)
    waves = {}
    for index, wav in enumerate(wavs):
        try:
            waves[index] = read_formatted(wav, settings)
        except PamError as error:
            found[index] = error
    seconds = {index: len(wave) / settings.sample_rate for index, wave in waves.items()}

    def answers(batch: list[int]) -> list[Answer | PamError]:
        tasks = None if task is None else [task] * len(batch)
        try:
            return [*model.answer([waves[index] for index in batch], [prompt] * len(batch), tasks, on_partial=show)]
        except PamError as error:  # about one of them, or about all
            return [error] if len(batch) == 1 else [one for index in batch for one in answers([index])]

    order = sorted(waves, key=lambda index: -seconds[index])
    batches = split(order, plan_batches(model, [prompt] * len(order), [seconds[index] for index in order]))
    for batch, some in in_batches(model, batches, answers, lambda _: None, lambda index: printable(wavs[index])):
        for index, one in zip(batch, some, strict=True):
            found[index] = one if isinstance(one, PamError) else _values(one, prompt, task, seconds[index])
    return found


def _values(found: Answer, prompt: str, task: str | None, seconds: float) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "task": task,
        "seconds_audio": round(seconds, 4),
        "answer": found.texts[0],
        "hypotheses": [{"text": text, "score": score} for text, score in zip(found.texts, found.scores, strict=True)],
        "answer_log_probs": found.answer_log_probs,
        "routing": found.routing,
    }


def _alone() -> Show | None:
    """Shows the answer so far on one line of the terminal, its end where it is longer than that; None: no terminal."""

    def show(partials: list[PartialAnswer]) -> None:
        (one,) = partials
        text = "" if one.done else one.text[1 - shutil.get_terminal_size().columns :]
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else None


def _behind(bar: Any) -> Show:
    """Shows behind a tqdm bar the end of an answer that is not done."""
    shown = 0.0

    def show(partials: list[PartialAnswer]) -> None:
        nonlocal shown
        if time.monotonic() - shown >= REFRESH:
            shown = time.monotonic()
            bar.set_postfix_str(next((one.text[-40:] for one in partials if not one.done), ""))

    return show


if __name__ == "__main__":
    sys.exit(run_main(main))
