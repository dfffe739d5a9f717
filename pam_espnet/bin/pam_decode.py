"""Decode formatted data directories with a trained experiment.

Writes text, score, nbest.jsonl and stats.json into each --out. A killed run continues where it stopped; a finished one
returns at once. With --shard i/n several processes share the work and --merge joins their parts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import add_batch_size, add_compute_options, compute_device, run_main, run_record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, help="experiment directory (config.yaml, model.safetensors)")
    parser.add_argument("--data", required=True, nargs="+", help="formatted data directories, dump/raw/<set>")
    parser.add_argument("--out", required=True, nargs="+", help="for each of them, exp/<tag>/decode_<name>/<set>")
    parser.add_argument("--config", help="YAML of decoding options; see pam_espnet/decode/options.py")
    add_batch_size(parser)
    parser.add_argument(
        "--audio_off", nargs="*", default=[], metavar="OUT", help="for the first of --data: also with the waveform zero"
    )
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="decode the I-th of N parts (default: 1/1)")
    parser.add_argument("--merge", action="store_true", help="only join the N finished parts")
    parser.add_argument("--limit", type=int, default=0, help="decode only the first utterances (default: 0 = all)")
    add_compute_options(parser)
    args = parser.parse_args(argv)
    from pam_espnet.config import load_yaml
    from pam_espnet.errors import ConfigError

    try:
        shard, shards = (int(part) for part in args.shard.split("/"))
    except ValueError as error:
        raise ConfigError(f"--shard must look like 2/8, got {args.shard!r}") from error

    from pam_espnet.data.datadir import DataDir
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.shards import DecodeOptions, as_begun, decode_shard, is_complete, merge_shards
    from pam_espnet.decode.speech_llm import SpeechLLM
    from pam_espnet.fileio import sha256_file

    audio_on, audio_off = (DecodeOptions(args.batch_size, mode, shard, shards, args.limit) for mode in ("on", "zero"))
    search = load_yaml(args.config) if args.config else {}
    answers = AnswerOptions.from_dict(search, args.config)
    if answers.exit.mode != "never" and answers.exit.calibration:  # under one name there may be others
        if not Path(answers.exit.calibration).is_file():
            raise ConfigError(f"exit.calibration: no file {answers.exit.calibration}; pam_calibrate_exit makes it")
        search = {**search, "exit_calibration_sha256": sha256_file(answers.exit.calibration)}
    if len(args.data) != len(args.out) or len(args.data) < len(args.audio_off):
        counts = f"{len(args.data)} directories, --out {len(args.out)} and --audio_off {len(args.audio_off)}"
        raise ConfigError(f"--data names {counts}")
    pairs = [(data, out, audio_on) for data, out in zip(args.data, args.out, strict=True)]
    pairs += [(data, out, audio_off) for data, out in zip(args.data, args.audio_off, strict=False)]
    todo = []
    for data, out, given in pairs:
        options = as_begun(given, out, args.device)
        if is_complete(args.exp, data, out, options, {**search, "dtype": args.dtype}):
            print(f"{out}: already decoded")
        else:
            todo.append((data, out, options))
    if todo and not args.merge:
        model = SpeechLLM.load(args.exp, answers, compute_device(args), args.dtype)
        model.keep_prompts({prompt for data, *_ in todo for prompt in DataDir.load(data).prompt.values()})
        for data, out, options in todo:
            decode_shard(model, data, out, options)
    if args.merge or shards == 1:
        run = run_record("pam_decode.py")
        for data, out, options in todo:
            stats = merge_shards(data, out, options, run)
            rtf = stats["seconds_wall"] / max(stats["seconds_audio"], 1e-9)
            print(f"{out}: {stats['seconds_audio']:.0f} s of audio, real-time factor {rtf:.3f} per process")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
