"""Report of early exit in a trained experiment: tables, JSON and one picture.

Runs the model's own best answers (or the references) through all blocks once, per test set: agreement of every block
with the last one, the exit of an oracle, precision and coverage of gates. With --sweep it also decodes the sets at exit
points (never, fixed:24, gate, gate:0.9, confidence:0.9, entropy:0.9, patience:2), in turns with full depth, and scores
them. Both continue where a killed run stopped, and a later call adds points.

Also measures, once per device, what a block, the output layer and the rest of a step cost, and predicts from it the
speed that the exits would bring.

Writes <exp>/exit_report/: EXIT.md, exit_report.json, exit.png, and a decode directory for each point.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pam_espnet.cli import add_batch_size, add_compute_options, compute_device, run_main, run_record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exp", type=Path, help="experiment directory (config.yaml, model.safetensors)")
    parser.add_argument("--data", required=True, nargs="+", help="formatted test sets, dump/raw/<set>")
    parser.add_argument("--decode", type=Path, help="decoding that holds the answers (default: <exp>/decode_beam)")
    parser.add_argument("--answers", choices=("own", "reference"), default="own", help="which answers (default: own)")
    parser.add_argument("--calibration", type=Path, help="maps and gates: <exp>/exit.safetensors of pam_calibrate_exit")
    parser.add_argument("--layers", type=int, nargs="+", help="candidate blocks, without a calibration")
    parser.add_argument("--sweep", nargs="*", metavar="POINT", help="decode at these points; none: a choice of them")
    parser.add_argument("--out", type=Path, help="directory of the report (default: <exp>/exit_report)")
    add_batch_size(parser)
    parser.add_argument(
        "--measure_cost",
        type=float,
        default=60,
        metavar="SECONDS",
        help="time limit for measuring the costs of a step on this device (default: 60; 0: do not measure)",
    )
    add_compute_options(parser, dtypes=())
    args = parser.parse_args(argv)
    from functools import cache

    from pam_espnet.config import check_number
    from pam_espnet.decode.batches import CPU_BATCH
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.shards import DecodeOptions, decoded_of
    from pam_espnet.decode.speech_llm import SpeechLLM
    from pam_espnet.early_exit.cost_report import measured_cost, predictions
    from pam_espnet.early_exit.report import profile_sets, read_decoded, read_sweep
    from pam_espnet.early_exit.sweep import default_points, parse_point, sweep
    from pam_espnet.early_exit.tables import markdown, plot_exits
    from pam_espnet.errors import ConfigError
    from pam_espnet.fileio import write_json, write_text

    device = compute_device(args)
    check_number(args.measure_cost, "--measure_cost", at_least=0)
    if len({Path(data).name for data in args.data}) < len(args.data):
        raise ConfigError("--data: two test sets have the same name")
    if args.calibration and args.layers:
        raise ConfigError("--layers: a calibration has its own candidate blocks; leave one of the two out")
    if args.calibration and not args.calibration.is_file():
        hint = f"python -m pam_espnet.bin.pam_calibrate_exit --exp {args.exp} --data <formatted dev set>"
        raise ConfigError(f"--calibration {args.calibration}: no such file\n  -> make it: {hint}")
    out = args.out or args.exp / "exit_report"
    decode = args.decode or args.exp / "decode_beam"
    answers: Any = None
    search: Any = {}
    if args.answers == "own" or args.decode:
        decoded = {Path(data).name: read_decoded(args.exp, data, decode) for data in args.data}
        _, search = next(iter(decoded.values()))
        if any(own != search for _, own in decoded.values()):
            raise ConfigError(f"{', '.join(decoded)} were decoded with different options; report them apart (--data)")
        if args.answers == "own":
            answers = {name: tokens for name, (tokens, _) in decoded.items()}
    dtype = search.get("dtype")
    unread = ("dtype", "exit", "exit_calibration_sha256")
    beam = {key: value for key, value in search.items() if key not in unread}
    options = AnswerOptions.from_dict(beam, decode)

    @cache
    def load() -> SpeechLLM:
        speech = SpeechLLM.load(args.exp, options, device, dtype)
        if args.sweep is not None and set(args.sweep) != {"never"} and not speech.full_depth.can_exit:  # first
            raise ConfigError(
                "--sweep: exits in the search need a Llama-type LLM and llm_conf.fused_decoding: true; leave it out "
                "or write --sweep never (the profile of the blocks is made for any LLM)"
            )
        return speech

    together = args.batch_size if isinstance(args.batch_size, int) else CPU_BATCH  # all blocks' states are kept
    found = profile_sets(args.exp, load, args.data, answers, args.layers or (), args.calibration, search, out, together)
    run = run_record("pam_exit_report.py")
    cost = measured_cost(args.exp, load, args.data, search, out, together, device, args.measure_cost, run["commit"])
    if args.sweep is not None:
        names = args.sweep or default_points(found["layers"], args.calibration is not None)
        points = [parse_point(name, found["layers"], args.calibration) for name in names]
        noted = {**beam, "dtype": dtype}
        sweep(args.exp, load, args.data, points, out, noted, run, DecodeOptions(args.batch_size), device)
    report = {
        "experiment": args.exp.resolve().name,
        **run,
        "checkpoint_sha256": decoded_of(args.exp, args.data[0])["checkpoint_sha256"],
        "answers": args.answers,
        "search": search,
        "dtype": dtype,
        **found,
        "measured_cost": cost,
        "sweep": read_sweep(args.exp, args.data, out),
    }
    report["predictions"] = predictions(report) if cost and "cost" in cost else []
    write_json(out / "exit_report.json", report)
    plot_exits(report, out / "exit.png", f"{report['experiment']}: early exit")
    write_text(out / "EXIT.md", markdown(report, "exit.png"))
    print(f"wrote {out}/EXIT.md, exit_report.json, exit.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
