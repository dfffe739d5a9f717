"""Answer a prompt about recordings with a packed or trained model.

    python -m pam_espnet.bin.pam_inference --model mine.zip dog.wav --prompt "Describe the sounds."
    python -m pam_espnet.bin.pam_inference --model mine.zip talk.mp3 --task asr --format srt > talk.srt
    python -m pam_espnet.bin.pam_inference --model mine.zip party.flac --task count --window 5

On a terminal the answer is shown while it grows: the best one so far, which may still change. The final answer goes to
standard output, alone; of several recordings each with its file name and a tab before it, or as JSON lines. On a GPU
several are answered together, as many as fit. A recording that cannot be used costs no other its answer: it is listed
at the end, and the exit status is 1. Recordings are treated as stage 2 treats data: any sample rate, channels averaged.

A recording may be of any length. One that is longer than --piece_seconds is transcribed in pieces (what has speech,
cut at pauses); to any other question there is an answer for each --window, as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pam_espnet.cli import add_compute_options, compute_device, run_main
from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError, PamError, printable
from pam_espnet.fileio import write_text

if TYPE_CHECKING:
    from pam_espnet.decode.answers import Answer, PartialAnswer
    from pam_espnet.decode.long_recordings import Segment
    from pam_espnet.decode.speech_llm import SpeechLLM

type Show = Callable[[list[PartialAnswer]], None]
REFRESH = 0.1  # seconds between two updates of the text behind a bar
MIN_SECONDS = 0.1  # of a recording, as in stage 2
WINDOW = 10.0  # seconds
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}  # of --format


def add_model_names(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Options that name a model and its pretrained ones; ``several``: --model takes a list."""
    parser.add_argument(
        "--model",
        required=True,
        nargs="+" if several else None,
        help="package (zip file, folder, or org/name on the Hugging Face hub), or experiment directory"
        + ("; several are shown side by side" if several else ""),
    )
    parser.add_argument("--revision", help="branch, tag or commit of --model on the hub (default: the newest commit)")
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="where a pretrained model of the package is; may be given several times "
        "(default: where the recipe has it, seen from here, or the Hugging Face hub)",
    )


def add_model_options(parser: argparse.ArgumentParser, max_seconds: float | None = 30.0, several: bool = False) -> None:
    """Options of ``load_model``, and ``--max_seconds`` with its default; ``several``: see ``add_model_names``."""
    add_model_names(parser, several)
    parser.add_argument("--config", help="YAML with options of decoding (default: as it was packed, or decoded)")
    shown = "any length" if max_seconds is None else f"{max_seconds:g}"
    parser.add_argument("--max_seconds", type=float, default=max_seconds, help=f"longest recording (default: {shown})")
    add_compute_options(parser, default_dtype="as it was decoded")


def load_model(args: argparse.Namespace) -> SpeechLLM:
    """The model of ``add_model_options``; ConfigError where they cannot work."""
    if args.max_seconds is not None:
        check_number(args.max_seconds, "--max_seconds", above=MIN_SECONDS)
    folders = model_folders(args.models)
    device = compute_device(args)

    from pam_espnet.package import load

    return load(args.model, folders, args.config, device, args.dtype, args.revision)


def model_folders(texts: Sequence[str]) -> dict[str, str]:
    """Name -> folder of each ``--models``. Raises ConfigError: one has no name or folder."""
    folders = dict(text.partition("=")[::2] for text in texts)
    if wrong := [name for name, folder in folders.items() if not (name and folder)]:
        raise ConfigError(f"--models must look like llm=DIR, got {wrong[0]!r}")
    return folders


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wavs", nargs="+", metavar="WAV", help="audio files, any format and sample rate")
    parser.add_argument("--prompt", help="what to ask (default: the prompt of --task)")
    parser.add_argument("--task", help="asr, count or caption: its default prompt, its answer set")
    parser.add_argument("--format", choices=SUFFIXES, default="text", help="json: n-best, scores, routing (text)")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    parser.add_argument("--out_dir", metavar="DIR", help="write a file for each recording there, not standard output")
    parser.add_argument(
        "--window",
        type=float,
        metavar="SECONDS",
        help=f"an answer for each part of this length (default for long recordings, but those of asr: {WINDOW:g})",
    )
    parser.add_argument(
        "--piece_seconds",
        type=float,
        metavar="SECONDS",
        help="longest piece that is answered as a whole (default: 30, or --max_seconds)",
    )
    add_model_options(parser, max_seconds=None)
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
    for name, least in (("window", MIN_SECONDS), ("piece_seconds", 1)):
        if getattr(args, name) is not None:
            check_number(getattr(args, name), f"--{name}", at_least=least)
    several, files = len(args.wavs) > 1, _out_files(args)
    model = load_model(args)
    from pam_espnet.decode.batches import MOST_UTTERANCES, cut

    failed = []
    together = MOST_UTTERANCES if model.on_gpu else 1
    shown = several and sys.stderr.isatty()
    with tqdm(total=len(args.wavs), unit="wav", leave=False, dynamic_ncols=True, disable=not shown) as bar:
        show = _behind(bar) if shown else _alone()
        for wavs in cut(args.wavs, together):
            pieces = {wav for wav in wavs if _in_pieces(wav, args)}
            whole = [wav for wav in wavs if wav not in pieces]
            limit = args.max_seconds or _piece_seconds(args)
            every = iter(answer_all(model, whole, args.prompt, args.task, limit, show))
            for wav in wavs:
                found = _long_answer(model, wav, args) if wav in pieces else next(every)
                bar.update()
                if isinstance(found, PamError):
                    if not several:
                        raise found
                    failed.append(f"error: {str(found).splitlines()[0]}")
                elif files:
                    write_text(files[wav], _content(wav, found, args))
                else:
                    content = _content(wav, found, args)
                    if several and args.format == "text":
                        content = "".join(f"{printable(wav)}\t{line}\n" for line in content.splitlines())
                    bar.write(content, file=sys.stdout, end="")
                    sys.stdout.flush()
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def _out_files(args: argparse.Namespace) -> dict[str, Path] | None:
    """Recording -> file in ``--out_dir``; None without it.
    Raises ConfigError: two recordings would have one file, or several recordings subtitles and no folder."""
    if args.out_dir is None:
        if len(args.wavs) > 1 and args.format in ("srt", "vtt"):
            raise ConfigError(f"--format {args.format}: several recordings need --out_dir DIR, a file for each")
        return None
    files = {wav: Path(args.out_dir) / (Path(wav).stem + SUFFIXES[args.format]) for wav in args.wavs}
    if twice := [wav for wav, count in Counter(files.values()).items() if count > 1]:
        raise ConfigError(f"--out_dir: two recordings would be written to {twice[0]}\n  -> ask about them separately")
    return files


def _piece_seconds(args: argparse.Namespace) -> float:
    return args.piece_seconds or args.max_seconds or 30.0


def _in_pieces(wav: str, args: argparse.Namespace) -> bool:
    """Whether a recording is answered in parts; False also where it cannot be read, of which reading it whole tells."""
    from pam_espnet.data.audio_stream import longer_than

    try:
        if args.max_seconds is not None and longer_than(wav, args.max_seconds):
            return False  # refused
        return args.window is not None or args.format in ("srt", "vtt") or longer_than(wav, _piece_seconds(args))
    except PamError:
        return False


def _long_answer(model: SpeechLLM, wav: str, args: argparse.Namespace) -> list[Segment] | PamError:
    """The answers about the parts of a recording, with a bar of its seconds on a terminal, or why there are none."""
    from tqdm import tqdm

    from pam_espnet.data.audio_stream import stated_seconds

    window = args.window
    if window is None and args.task is None:
        return ConfigError(f"{printable(wav)}: is long: transcribe it (--task asr), or give a --window for the prompt")
    if window is None and args.task != "asr":
        window = WINDOW
    seconds, found = stated_seconds(wav), []
    total = None if seconds is None else round(seconds)
    with tqdm(total=total, unit="s", leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        try:
            for one in model.segments(wav, args.prompt, args.task, window, _piece_seconds(args)):
                found.append(one)
                bar.set_postfix_str(one.text[-40:], refresh=False)
                bar.update(round(one.end) - bar.n)
        except PamError as error:
            return error
    return found


def _content(wav: str, found: list[Segment] | dict[str, Any], args: argparse.Namespace) -> str:
    """What is written about a recording."""
    from pam_espnet.decode import subtitles

    if isinstance(found, dict):
        line = json.dumps({"wav": printable(wav), **found}, ensure_ascii=False)
        return (line if args.format == "json" else found["answer"]) + "\n"
    if args.format == "json":
        about = {"wav": printable(wav), "prompt": args.prompt, "task": args.task}
        return json.dumps({**about, **subtitles.values(found)}, ensure_ascii=False) + "\n"
    if args.format == "text":
        windows = args.window is not None or args.task != "asr"
        return subtitles.to_table(found) if windows else subtitles.to_text(found)
    return (subtitles.to_srt if args.format == "srt" else subtitles.to_vtt)(found)


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
